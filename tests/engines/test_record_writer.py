"""The thread that writes records outlives whatever goes wrong in it, and says what became of each lease."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engines.parts import save_tiny, spec_of
from tests.engines.test_transformers_engine import leases_of
from torchspec.engines import record_writer
from torchspec.engines.record_writer import Captured, RecordWriter, Written
from torchspec.transfer import StoreServer
from torchspec.transfer.record import open_record
from torchspec.transfer.store import StoreError


@pytest.fixture
def writer(tmp_path: Path, server: StoreServer) -> Any:
    """One thread of it: what happens in which order."""
    made = RecordWriter(server.address, spec_of(save_tiny(tmp_path / "target")), producer="test", device="cpu", hands=1)
    yield made
    made.close()


@pytest.fixture
def both(tmp_path: Path, server: StoreServer) -> Any:
    """As engines have it."""
    made = RecordWriter(server.address, spec_of(save_tiny(tmp_path / "target")), producer="test", device="cpu")
    yield made
    made.close()


def store_of(writer: RecordWriter) -> Any:
    (hand,) = writer._hands
    return hand.store


def batch_of(writer: RecordWriter, samples: list[list[int]]) -> Captured:
    longest, hidden = max(map(len, samples)), writer._hands[0]._spec.hidden_size
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
    monkeypatch.setattr(store_of(writer), where, raising(getattr(store_of(writer), where), [error] * times))
    lost = written(writer, batch_of(writer, samples))
    assert [failed.lease for failed in lost.failed] == [0, 1] and not lost.finished
    assert all(type(error).__name__ in failed.reason for failed in lost.failed)
    for _ in range(3):  # a third batch would wait for good for a thread that has ended
        assert [done.lease for done in written(writer, batch_of(writer, samples)).finished] == [0, 1]


def test_a_bad_record_takes_no_neighbour_along(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_of(writer), "put", raising(store_of(writer).put, [Odd("the batch"), Odd("the first")]))
    result = written(writer, batch_of(writer, [[1, 2, 3], [4, 5]]))
    assert [failed.lease for failed in result.failed] == [0] and [done.lease for done in result.finished] == [1]


def test_closing_does_not_wait_for_a_put_that_hangs(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "_ENDS", 0.2)
    released, hangs = threading.Event(), threading.Event()
    put, close = store_of(writer).put, store_of(writer).close
    closed: list[float] = []

    def slow(keys: Any, values: Any) -> None:
        hangs.set()
        released.wait(30)
        put(keys, values)

    monkeypatch.setattr(store_of(writer), "put", slow)
    monkeypatch.setattr(store_of(writer), "close", lambda: closed.append(time.monotonic()) or close())  # type: ignore[func-returns-value]
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

    monkeypatch.setattr(store_of(writer), "put", refuse)
    batch = batch_of(writer, [[1, 2, 3]] * 8)
    result = written(writer, batch)
    assert [failed.lease for failed in result.failed] == list(range(8)) and all("full" in failed.reason for failed in result.failed)
    assert 0.5 < result.seconds < 2.0
    assert full[-8:] == [[lease.key] for lease in batch.leases]  # each was tried once more


def test_a_buffer_that_was_outgrown_is_given_back(writer: RecordWriter) -> None:
    for length in (10, 100, 400, 50, 450):
        assert written(writer, batch_of(writer, [list(range(length))])).finished
    assert [buffer.numel() for buffer in store_of(writer)._buffers] == [writer._hands[0]._spec.nbytes(400) * 5 // 4]  # type: ignore[attr-defined]


def test_a_batch_is_written_while_the_put_of_another_has_not_ended(both: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come as they are ready, with everything in the store, and a put that hangs holds up its own batch alone."""
    released, calls = threading.Event(), itertools.count()
    for hand in both._hands:
        put = hand.store.put

        def slow(keys: list[str], values: Any, put: Any = put) -> None:
            if next(calls) == 0:
                assert released.wait(30)
            put(keys, values)

        monkeypatch.setattr(hand.store, "put", slow)
    batches = [batch_of(both, [[number, 2, 3], [number, 5]]) for number in range(4)]
    for number, batch in enumerate(batches):
        batch.leases[:] = [msgspec.structs.replace(lease, id=10 * number + lease.id, key=f"{lease.key}/{number}") for lease in batch.leases]
        both.write(batch)
    seen: list[Written] = []
    deadline = time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < deadline:
        seen += both.results(1.0)
    assert len(seen) == 3 and both.in_flight == 1
    released.set()
    seen += both.results(10.0)
    done = sorted(done.lease for written in seen for done in written.finished)
    assert done == [0, 1, 10, 11, 20, 21, 30, 31] and not [failed for written in seen for failed in written.failed]
    spec, store = both._hands[0]._spec, both._hands[0].store
    for batch in batches:
        for row, (lease, ids) in enumerate(zip(batch.leases, batch.ids, strict=True)):
            out = torch.empty(spec.nbytes(ids.numel()), dtype=torch.uint8)
            store.get([lease.key], [out])
            record = open_record(out, spec)
            assert torch.equal(record.input_ids, ids) and torch.equal(record.aux, batch.aux[row, : ids.numel()].to(spec.torch_dtype))


def test_closing_ends_every_thread(both: RecordWriter) -> None:
    for _ in range(5):
        both.write(batch_of(both, [[1, 2, 3]]))
    both.close()
    assert not [hand for hand in both._hands if hand.thread.is_alive()]
    assert len(both.results(1.0)) == 5
    both.close()
