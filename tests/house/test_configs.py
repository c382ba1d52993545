"""Every YAML that we ship is accepted by the command line as it is, a misspelt key is refused, and every option says what it means."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_target
from torchspec.cli import main
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.families import DraftFile
from torchspec.target import Target, TargetConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_shipped_config_parses(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(file), "--print_config"])
    printed = capsys.readouterr()
    assert done.value.code in (0, None), printed.err[-2000:]
    effective = yaml.safe_load(printed.out)
    given = yaml.safe_load(file.read_text())
    assert effective["data"]["target"]["path"] == given["data"]["target"]["path"]
    assert effective["model"]["unroll_steps"] == given["model"]["unroll_steps"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs/drafts").glob("*.json")), ids=lambda f: f.name)
def test_a_shipped_draft_fits_a_target(file: Path, tmp_path: Path) -> None:
    target = Target(TargetConfig(str(save_target(tmp_path))))
    described = DraftFile.read(str(file))
    draft = DraftConfig.from_fields(described.given, target=target, aux_layers=(2, 4, 5), where=described.where)
    assert draft.hidden_size == target.hidden_size
    for name, value in json.loads(file.read_text()).items():
        assert getattr(draft, name) == value


@pytest.mark.parametrize("flag", ["--data.max_lenght=5", "--model.unrol_steps=2", "--trainer.max_stepz=1", "--data.max_len=5", "--data.store.budgt=1GiB"])
def test_unknown_and_abbreviated_keys_are_refused(flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), flag, "--print_config"])
    assert done.value.code not in (0, None)
    assert flag.split("=")[0].rsplit(".", 1)[1].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize(("key", "name"), [("model.optimizer", "muon.MuonAdamW"), ("model.lr_scheduler", "schedules.Cosine")])
def test_a_class_that_has_moved_is_named(key: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(ROOT / "configs/default.yaml"), f"--{key}=torchspec.models.{name}", "--print_config"])
    assert done.value.code == 2
    told = f"error: class_path='torchspec.models.{name}' has moved. Fix: write torchspec.models.optim.{name}.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("words", [["fit"], ["validate"], ["extract"], ["fit", "--data.on_policy"]], ids=" ".join)
def test_every_option_of_ours_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*words[:-1], f"{words[-1]}.help"] if "." in words[-1] else [*words, "--help"])
    assert done.value.code == 0
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    ours = [" ".join(option.split()) for option in options if option.startswith(("--data", "--model", "--output", "--part", "--shard_size", "--fp8"))]
    assert len(ours) > 7
    bare = [option for option in ours if re.match(r"(--\S+ [A-Z_]+, )?--\S+ ([A-Z_]+|\{\S+\}) \((required|type|default)", option)]
    assert bare == []


@pytest.mark.parametrize("command", ["show_data", "extract", "regenerate", "export", "acceptance", "worker", "doctor"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: main.py {command}" in capsys.readouterr().out


def test_mixtures_and_named_validation_sets_parse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--data.train", "{a.jsonl: 2, folder: 0.5}", "--data.validate", "{chat: c.jsonl, code: [d.jsonl, e.jsonl]}"]
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *words, "--print_config"])
    printed = capsys.readouterr()
    assert done.value.code in (0, None), printed.err[-2000:]
    data = yaml.safe_load(printed.out)["data"]
    assert data["train"] == {"a.jsonl": 2.0, "folder": 0.5} and data["validate"] == {"chat": "c.jsonl", "code": ["d.jsonl", "e.jsonl"]}


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["trian"])
    assert done.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
