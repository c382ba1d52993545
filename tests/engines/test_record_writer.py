"""The thread that writes records outlives whatever goes wrong in it, and says what became of each sample."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.parts import save_tiny, spec_of
from torchspec.engines import record_writer
from torchspec.engines.messages import Wrote
from torchspec.engines.record_writer import CapturedSample, RecordWriter
from torchspec.transfer import StoreServer
from torchspec.transfer.record import open_record
from torchspec.transfer.store import StoreError


@pytest.fixture
def writer(tmp_path: Path, server: StoreServer) -> Any:
    """One thread of it: what happens in which order."""
    made = RecordWriter(server.address, spec_of(save_tiny(tmp_path / "target")), producer="test", device="cpu", threads=1)
    yield made
    made.close()


@pytest.fixture
def both(tmp_path: Path, server: StoreServer) -> Any:
    """As engines have it where there are cores."""
    made = RecordWriter(server.address, spec_of(save_tiny(tmp_path / "target")), producer="test", device="cpu", threads=2)
    yield made
    made.close()


def store_of(writer: RecordWriter) -> Any:
    (thread,) = writer._threads
    return thread.store


def batch_of(writer: RecordWriter, samples: list[list[int]], *, number: int = 0) -> list[CapturedSample]:
    """Samples with keys "NUMBER/ROW" and random states of one padded batch."""
    longest, hidden = max(map(len, samples)), writer._threads[0].spec.hidden_size
    states = torch.randn(len(samples), longest, 3 * hidden)

    def of(row: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return states[row, :tokens, : 2 * hidden], states[row, :tokens, 2 * hidden :]

    return [
        CapturedSample(f"{number}/{row}", torch.tensor(sample, dtype=torch.int32), len(sample), partial(of, row, len(sample)))
        for row, sample in enumerate(samples)
    ]


def written(writer: RecordWriter, batch: list[CapturedSample]) -> list[Wrote]:
    writer.write(batch)
    found: list[Wrote] = []
    while writer.in_flight:
        got = writer.results(10.0)
        assert got, "nothing for 10 s"
        found += got
    return found


def keys(found: list[Wrote], *, lost: bool) -> list[str]:
    return [wrote.key for wrote in found if bool(wrote.error) is lost]


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
    assert keys(lost, lost=True) == ["0/0", "0/1"] and all(type(error).__name__ in wrote.error for wrote in lost)
    for _ in range(3):  # a third batch would wait for good for a thread that has ended
        assert keys(written(writer, batch_of(writer, samples)), lost=False) == ["0/0", "0/1"]


def test_a_bad_record_takes_no_neighbour_along(writer: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_of(writer), "put", raising(store_of(writer).put, [Odd("the batch"), Odd("the first")]))
    result = written(writer, batch_of(writer, [[1, 2, 3], [4, 5]]))
    assert keys(result, lost=True) == ["0/0"] and keys(result, lost=False) == ["0/1"]


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
    assert keys(result, lost=True) == [sample.key for sample in batch] and all("full" in wrote.error for wrote in result)
    assert 0.5 < sum(wrote.seconds for wrote in result) < 2.0
    assert full[-8:] == [[sample.key] for sample in batch]  # each was tried once more


def test_a_buffer_that_was_outgrown_is_given_back(writer: RecordWriter) -> None:
    for length in (10, 100, 400, 50, 450):
        assert keys(written(writer, batch_of(writer, [list(range(length))])), lost=False)
    assert [buffer.numel() for buffer in store_of(writer)._buffers] == [writer._threads[0].spec.nbytes(400) * 5 // 4]  # type: ignore[attr-defined]


def test_a_batch_is_written_while_the_put_of_another_has_not_ended(both: RecordWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come as they are ready, with everything in the store, and a put that hangs holds up its own batch alone."""
    released, calls = threading.Event(), itertools.count()
    for thread in both._threads:
        put = thread.store.put

        def slow(keys: list[str], values: Any, put: Any = put) -> None:
            if next(calls) == 0:
                assert released.wait(30)
            put(keys, values)

        monkeypatch.setattr(thread.store, "put", slow)
    batches = [batch_of(both, [[number, 2, 3], [number, 5]], number=number) for number in range(4)]
    for batch in batches:
        both.write(batch)
    seen: list[Wrote] = []
    deadline = time.monotonic() + 20
    while len(seen) < 6 and time.monotonic() < deadline:
        seen += both.results(1.0)
    assert len(seen) == 6 and both.in_flight == 2
    released.set()
    while both.in_flight and time.monotonic() < deadline:
        seen += both.results(10.0)
    assert sorted(keys(seen, lost=False)) == sorted(sample.key for batch in batches for sample in batch) and not keys(seen, lost=True)
    spec, store = both._threads[0].spec, both._threads[0].store
    for sample in itertools.chain(*batches):
        out = torch.empty(spec.nbytes(sample.rows), dtype=torch.uint8)
        store.get([sample.key], [out])
        record = open_record(out, spec)
        assert torch.equal(record.input_ids, sample.ids) and torch.equal(record.aux, sample.states()[0].to(spec.torch_dtype))


def test_closing_ends_every_thread(both: RecordWriter) -> None:
    for _ in range(5):
        both.write(batch_of(both, [[1, 2, 3]]))
    both.close()
    assert not [writer for writer in both._threads if writer.thread.is_alive()]
    assert len(both.results(1.0)) == 5
    both.close()
