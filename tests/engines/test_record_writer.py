"""The thread that writes records outlives whatever goes wrong in it, and says what became of each lease."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.parts import save_tiny, spec_of
from tests.engines.test_transformers_engine import leases_of
from torchspec.engines.record_writer import Captured, RecordWriter, Written
from torchspec.transfer import StoreServer
from torchspec.transfer.store import StoreError


@pytest.fixture
def writer(tmp_path: Path, server: StoreServer) -> Any:
    made = RecordWriter(server.address, spec_of(save_tiny(tmp_path / "target")), producer="test", device="cpu")
    yield made
    made.close()


def batch_of(writer: RecordWriter, samples: list[list[int]]) -> Captured:
    longest, hidden = max(map(len, samples)), writer._spec.hidden_size
    states = torch.randn(len(samples), longest, 3 * hidden)
    ids = [torch.tensor(sample, dtype=torch.int32) for sample in samples]
    return Captured(leases_of(samples), ids, states[..., : 2 * hidden], states[..., 2 * hidden :])


def written(writer: RecordWriter, batch: Captured) -> Written:
    writer.write(batch)
    (result,) = writer.results(10.0)
    return result


class Odd(Exception):
    """None of the errors that a store is to raise."""


def raising(original: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    """The function, after it has raised these."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [StoreError("io", "", "no memory to register"), MemoryError("none"), KeyError("k"), Odd("odd")])
@pytest.mark.parametrize("where", ["buffer", "put"])
def test_no_error_ends_the_thread(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str) -> None:
    samples = [[1, 2, 3], [4, 5]]
    times = 1 if where == "buffer" else 3  # the batch, and each of its two records
    monkeypatch.setattr(writer._store, where, raising(getattr(writer._store, where), [error] * times))
    lost = written(writer, batch_of(writer, samples))
    assert [failed.lease for failed in lost.failed] == [0, 1] and not lost.finished
    assert all(type(error).__name__ in failed.reason for failed in lost.failed)
    for _ in range(3):  # a third batch would wait for good for a thread that has ended
        assert [done.lease for done in written(writer, batch_of(writer, samples)).finished] == [0, 1]


def test_a_bad_record_takes_no_neighbour_along(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer._store, "put", raising(writer._store.put, [Odd("the batch"), Odd("the first")]))
    result = written(writer, batch_of(writer, [[1, 2, 3], [4, 5]]))
    assert [failed.lease for failed in result.failed] == [0] and [done.lease for done in result.finished] == [1]
