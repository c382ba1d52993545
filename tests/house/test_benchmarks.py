"""What benchmarks ask of the package by duck typing, which no type checker sees."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch

from benchmarks import launch_failures, sanitize
from torchspec.batch import PackedBatch
from torchspec.transfer.record import Record
from torchspec.transfer.spec import RecordSpec

ROOT = Path(__file__).resolve().parents[2]


def test_the_parity_benchmark_makes_packs_of_records() -> None:
    described = importlib.util.spec_from_file_location("engine_parity", ROOT / "benchmarks" / "engine_parity.py")
    assert described is not None and described.loader is not None
    parity = importlib.util.module_from_spec(described)
    described.loader.exec_module(parity)
    spec = RecordSpec(target="t", tokenizer="", aux_layers=(1, 2), hidden_size=8, dtype="float32")
    lengths = [5, 1, 40]
    records = {i: Record(torch.arange(n, dtype=torch.int32), torch.randn(n, 16), torch.randn(n, 8), {}) for i, n in enumerate(lengths)}
    seen: list[PackedBatch] = []

    def task(batch: PackedBatch) -> SimpleNamespace:
        seen.append(batch)
        return SimpleNamespace(loss=torch.tensor(2.0))

    assert parity.loss_of(task, records, spec, "cpu") == 2.0
    (batch,) = seen
    assert batch.input_ids.shape[0] == sum(lengths) and batch.counts.tolist() == [41.0, 39.0, 37.0, 35.0]


def test_the_sanitizer_looks_at_every_kernel_of_ours_and_at_none_else() -> None:
    names = sanitize.kernel_names()
    assert {"_forward", "_backward", "_losses", "_ask", "_split", "_quantise"} <= set(names)
    for known, option in (("--kernel-name", "--kernel-name"), ("--kernel-regex", "--kernel-regex")):
        words = sanitize.command("compute-sanitizer", "memcheck", f"  {known} arg", ["--seed", "3"])
        chosen = words[words.index(option) + 1].split(",")
        assert chosen == [f"kne={name}" for name in names]
        assert words[-3:] == ["--inside", "--seed", "3"]
    rng = Random(0)
    seen = {sanitize.near(rng, 65, low=4) for _ in range(400)}
    assert {4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65} <= seen and min(seen) == 4 and max(seen) == 65


def test_runs_are_counted_over_sessions() -> None:
    rows = [{"runs": 30, "failed": []}, {"runs": 11, "failed": [{"run": 3}]}]
    assert launch_failures.total(rows).startswith("41 runs in 2 sessions, 1 failed") and "4.8%" in launch_failures.total(rows)
