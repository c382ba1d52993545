"""Records → one packed batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchspec.batch import PackedBatch
from torchspec.data.collate import collate
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.prepare import DataOptions, prepare
from torchspec.supervision import Unroll
from torchspec.transfer.record import Record, RecordSpec, open_record, seal, views

SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(1, 3), hidden_size=8, dtype="bfloat16")
MASKS = [[0, 0, 1, 1, 1, 1], [1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 0]]


def data(tmp_path: Path) -> TokenizedDataset:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"input_ids": [10 * i + j for j in range(len(m))], "loss_mask": m}) + "\n" for i, m in enumerate(MASKS)))
    return prepare(str(source), options=DataOptions(max_length=64), tokenizer=None, vocab_size=100, cache_dir=tmp_path / "cache", target_name="t")


def record(dataset: TokenizedDataset, index: int, rows: int | None = None) -> Record:
    tokens = len(dataset.ids(index))
    rows = tokens if rows is None else rows
    buffer = torch.empty(SPEC.nbytes(tokens), dtype=torch.uint8).fill_(0xAB)
    ids, aux, last = views(buffer, SPEC, tokens, rows)
    ids.copy_(torch.from_numpy(dataset.ids(index).copy()))
    generator = torch.Generator().manual_seed(index)
    aux.copy_(torch.randn(aux.shape, generator=generator))
    last.copy_(torch.randn(last.shape, generator=generator))
    return open_record(seal(buffer, SPEC, tokens, rows, producer="test"), SPEC)


def made(records: dict[int, Record], dataset: TokenizedDataset, *, samples: list[int], **given: Any) -> PackedBatch:
    keys = np.array([10 + i for i in samples], dtype=np.uint64)
    return collate(records, dataset=dataset, samples=samples, keys=keys, spec=SPEC, supervision=Unroll(2), stage="train", **given)


def test_a_pack_of_three(tmp_path: Path) -> None:
    dataset = data(tmp_path)
    records = {0: record(dataset, 0), 1: record(dataset, 1), 2: record(dataset, 2, rows=7)}
    batch = made(records, dataset, samples=[2, 0, 1], counts=np.array([9, 0]), pack_index=5)
    assert batch.sample_ids == (2, 0, 1) and batch.pack_index == 5 and batch.num_tokens == 17
    assert batch.cu_seqlens.tolist() == [0, 8, 14, 17] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position.tolist() == [*range(8), *range(6), *range(3)]
    assert batch.sequence.tolist() == [0] * 8 + [1] * 6 + [2] * 3
    assert batch.input_ids.tolist() == [*range(20, 28), *range(6), *range(10, 13)]
    assert batch.turn.tolist() == [-1, 0, 0, -1, 1, 1, 1, -1, -1, -1, 2, 2, 2, 2, 3, 3, 3]  # turns 2 and 3 touch, and are two
    assert batch.counts.tolist() == [9.0, 1.0]  # a step without any position divides its sum of 0 by 1
    assert torch.equal(batch.aux[8:14], records[0].aux) and torch.equal(batch.last[14:], records[1].last)
    assert torch.equal(batch.aux[:7], records[2].aux) and not batch.aux[7].any() and not batch.last[7].any()  # R = T-1: zero, not what the memory held
    assert batch.rows.base.tolist() == [0, 3, 4, 9, 10, 11, 14]
    assert batch.rows.index[1].tolist() == [2 - 1, 3, 4]


def test_a_failed_sample_is_absent_and_its_positions_stay_in_the_counts(tmp_path: Path) -> None:
    dataset = data(tmp_path)
    batch = made({1: record(dataset, 1)}, dataset, samples=[2, 0, 1], counts=np.array([9, 5]), pack_index=0)
    assert batch.sample_ids == (1,) and batch.num_tokens == 3 and batch.counts.tolist() == [9.0, 5.0]


def test_an_empty_pack(tmp_path: Path) -> None:
    batch = made({}, data(tmp_path), samples=[], counts=np.array([3, 1]), pack_index=7)
    assert batch.num_tokens == 0 and batch.cu_seqlens.tolist() == [0] and batch.aux.shape == (0, 16) and batch.last.shape == (0, 8)
    assert batch.rows.base.numel() == 0 and batch.rows.steps == 2
