"""What benchmarks ask of the package by duck typing, which no type checker sees."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

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
