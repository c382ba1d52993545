"""The thread that writes records outlives whatever goes wrong in it, and says what became of each lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.parts import save_tiny, spec_of
from tests.engines.test_transformers_engine import leases_of
from torchspec.engines import record_writer
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


def test_closing_does_not_wait_for_a_put_that_hangs(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "_ENDS", 0.2)
    released, hangs = threading.Event(), threading.Event()
    put, close = writer._store.put, writer._store.close
    closed: list[float] = []

    def slow(keys: Any, values: Any) -> None:
        hangs.set()
        released.wait(30)
        put(keys, values)

    monkeypatch.setattr(writer._store, "put", slow)
    monkeypatch.setattr(writer._store, "close", lambda: closed.append(time.monotonic()) or close())  # type: ignore[func-returns-value]
    try:
        for _ in range(2):  # one in the thread's hands, one in the queue
            writer.write(batch_of(writer, [[1, 2, 3]]))
            assert hangs.wait(10)
        closing = threading.Thread(target=writer.close, daemon=True)
        closing.start()
        closing.join(5.0)
        assert not closing.is_alive()
        assert not closed  # a call is going on in it
    finally:
        released.set()
    writer.results(10.0)
    writer.close()
    assert closed


def test_a_store_that_stays_full_holds_a_batch_for_one_wait(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "_FULL_WAIT", 0.5)
    full: list[list[str]] = []

    def refuse(keys: list[str], values: Any) -> None:
        full.append(keys)
        raise StoreError("full", keys[0], "no room")

    monkeypatch.setattr(writer._store, "put", refuse)
    batch = batch_of(writer, [[1, 2, 3]] * 8)
    result = written(writer, batch)
    assert [failed.lease for failed in result.failed] == list(range(8)) and all("full" in failed.reason for failed in result.failed)
    assert 0.5 < result.seconds < 2.0
    assert full[-8:] == [[lease.key] for lease in batch.leases]  # each was tried once more


def test_a_buffer_that_was_outgrown_is_given_back(writer: RecordWriter) -> None:
    for length in (10, 100, 400, 50, 450):
        assert written(writer, batch_of(writer, [list(range(length))])).finished
    assert [buffer.numel() for buffer in writer._store._buffers] == [writer._spec.nbytes(400) * 5 // 4]  # type: ignore[attr-defined]
