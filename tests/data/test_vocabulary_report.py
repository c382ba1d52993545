"""Counts, coverage and the saved mapping agree with counting by hand; export takes the file of counts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_conversations, save_target
from torchspec.cli import main
from torchspec.data.corpus import count_tokens
from torchspec.data.vocabulary_report import SIZES, TokenCounts, coverage, plot, table
from torchspec.errors import UserError
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig


def test_coverage_is_that_of_the_mapping() -> None:
    counts = torch.randint(0, 1000, (5000,), generator=torch.Generator().manual_seed(0)) ** 3
    counts[7] = 0
    for size in (10, 500, 4096, 5000):
        assert coverage(counts, size, always=[7]) == pytest.approx(VocabularyMapping.from_counts(counts, size, always=[7]).coverage(counts), abs=1e-12)
    found = TokenCounts(counts, (7,), "t")
    lines = table(found).splitlines()
    assert lines[1].split()[:2] == ["4,096", f"{coverage(counts, 4096, always=[7]):.3%}"] and lines[-1].split() == ["5,000", "100.000%", "never"]
    points = ET.fromstring(plot(found, title="x")).findall("{http://www.w3.org/2000/svg}circle")
    assert len(points) == sum(size < 5000 for size in SIZES) == 1


def test_the_command_saves_what_export_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, data = str(save_target(tmp_path / "target", layers=1)), str(save_conversations(tmp_path / "a.jsonl", 20))
    file = tmp_path / "deep" / "counts.safetensors"
    main(["vocabulary", "--target", target, "--input", data, "--output", str(file), "--size", "100", "--plot", str(tmp_path / "p.svg")])
    assert "supervised tokens" in capsys.readouterr().out and ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    facts = Target(TargetConfig(target))
    counts, ends = count_tokens(facts, data)
    again, same_ends = count_tokens(facts, str(file))
    assert torch.equal(counts, again) and ends == same_ends and int(counts.sum()) > 100
    mapping = VocabularyMapping.from_counts(counts, 100, always=ends)
    saved = load_file(file)
    assert torch.equal(saved["draft_ids"], mapping.draft_ids) and torch.equal(saved["d2t"], mapping.d2t) and torch.equal(saved["t2d"], mapping.t2d)
    other = Target(TargetConfig(str(save_target(tmp_path / "other", layers=2))))
    with pytest.raises(UserError, match="counts tokens of the target"):
        count_tokens(other, str(file))
    with pytest.raises(UserError, match="is no file of token counts"):
        count_tokens(facts, str(tmp_path / "none.safetensors"))
