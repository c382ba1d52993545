"""``failed_samples.jsonl``: what a resume forgets, and what writes that failed leave behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from torchspec.data.failures import append_failures, cut_failures
from torchspec.engines.messages import Failure


class Places:
    def place(self, index: int) -> str:
        return f"file:{index}"


def append(path: Path, pack: int, *, stage: str = "train", samples: int = 1, reason: str = "too long") -> None:
    dataset: Any = Places()
    append_failures(path, [Failure(pack * 1000 + i, reason, 3) for i in range(samples)], stage=stage, epoch=1, pack=pack, dataset=dataset)


def packs(path: Path) -> list[int]:
    return [json.loads(line)["pack"] for line in path.read_text().splitlines() if line]


def test_training_failures_from_a_position_on_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "run" / "failed_samples.jsonl"
    cut_failures(path, epoch=0, pack=0)  # there is none
    for pack in (1, 2, 3):
        append(path, pack)
    append(path, 7, stage="validation")
    cut_failures(path, epoch=1, pack=4)
    assert packs(path) == [1, 2, 3, 7]
    cut_failures(path, epoch=1, pack=2)
    assert packs(path) == [1, 7]
    append(path, 0, stage="train")
    cut_failures(path, epoch=0, pack=9)
    assert packs(path) == [7]


@pytest.mark.parametrize("torn", [b'{"stage": "tr', b'{"stage": "train", "epoch": 1, "pack": 2, "reason": "\xf0\x9f', b"{"])
def test_a_torn_last_line_is_dropped_and_nothing_is_glued_to_it(torn: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "failed_samples.jsonl"
    append(path, 1)
    before = path.read_bytes()
    path.write_bytes(before + torn)
    cut_failures(path, epoch=1, pack=9)
    assert path.read_bytes() == before and not caplog.records
    path.write_bytes(before + torn)
    append(path, 2)
    whole = path.read_bytes()
    assert whole.splitlines()[1] == torn and json.loads(whole.splitlines()[2])["pack"] == 2
    with caplog.at_level(logging.WARNING):
        cut_failures(path, epoch=1, pack=2)
    assert path.read_bytes() == before + torn + b"\n"  # it may name a sample of before: kept, and said
    assert "kept a line that cannot be read" in caplog.text
    path.write_bytes(torn)
    cut_failures(path, epoch=1, pack=2)
    assert not path.exists()


def test_a_disk_that_is_full_is_an_error_and_the_next_lines_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "failed_samples.jsonl"
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[:20]))
        with pytest.raises(OSError, match="No space left"):
            append(path, 1)
    append(path, 2)
    cut_failures(path, epoch=1, pack=5)
    assert packs_read(path) == [2]


def packs_read(path: Path) -> list[int]:
    return [json.loads(line)["pack"] for line in path.read_text().splitlines() if line.endswith("}")]


def _append_many(path: Path, rank: int, begin: Any) -> None:
    begin.wait()
    for _ in range(20):
        append(path, rank, samples=40, reason="x" * 900)


def test_ranks_that_append_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    path, context = tmp_path / "failed_samples.jsonl", multiprocessing.get_context("fork")
    begin = context.Event()
    ranks = [context.Process(target=_append_many, args=(path, rank, begin)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    begin.set()
    for rank in ranks:
        rank.join(60)
    assert sorted(packs(path)) == [rank for rank in range(3) for _ in range(800)]
