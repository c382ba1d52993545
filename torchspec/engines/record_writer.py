"""Writes records: the one loop from computed states to the store, for every engine.

A *sample* says where its states are; *staging* copies them into a registered buffer (on CUDA on a stream of the writer's); :func:`write_records` seals what is
staged and puts it in one call, record by record where that fails, so that a bad one takes no neighbour along, and says of each what became of it. No error ends
a writer: each is the failure of the record that it concerns.

:class:`RecordWriter` is for an engine that can leave its states where they are until they are written: threads of its own stage, seal and put while the target
computes the next batch, two where the machine has cores for them, so that one copies and seals while the other puts. Where states must leave at once,
``capture/sink.py`` stages them into a ring.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from torchspec.engines.messages import Wrote
from torchspec.transfer import open_store
from torchspec.transfer.record import RecordSpec, seal, views
from torchspec.transfer.store import Address, Store, StoreError

log = logging.getLogger(__name__)
_FULL_WAIT = 60.0
"""Seconds to wait for room in a store that is full although credit should prevent that; of a batch, all in all."""
_HANDOFF = 2e-4
"""Seconds after which a thread that asks for the interpreter gets it. A record is written, and read, in a few short calls that give the interpreter up; a
busy thread beside them (the target's, or the training step's) gives it back after 5 ms by default, for each, which is longer than the writing of a record of
some MB."""
_ENDS = 5.0
"""Seconds for a thread to look up, and again to end."""
_WRITERS, _WRITER_CORES = 2, 2
"""Threads, and cores of the machine for each of them: a client of the store keeps one busy while it waits."""


def quick_handoffs() -> None:
    """For this process: threads that write or read records wait less for the interpreter."""
    sys.setswitchinterval(min(sys.getswitchinterval(), _HANDOFF))


@dataclass(frozen=True)
class CapturedSample:
    """A conversation whose states the target has computed."""

    key: str
    """Of its record in the store."""
    ids: Tensor
    """[T] int32, on the CPU."""
    rows: int
    """R states: T, or T-1."""
    states: Callable[[], tuple[Tensor, Tensor]]
    """Gives aux [R, n*D] or [R, n, D], and last [R, D], on the target's device. Called on the stream that copies them, in inference mode."""


@dataclass(frozen=True)
class StagedRecord:
    """A sample on its way: its record lies in a registered buffer, where a copy may still be going on."""

    sample: CapturedSample
    record: Tensor
    """uint8; its size is the record's."""
    copied: Any
    """CUDA event after which it is whole; None where it is."""
    seconds: float = 0.0
    """Spent on staging."""
    error: str = ""
    """Why there is nothing to write."""


def stage(sample: CapturedSample, record: Tensor, spec: RecordSpec, *, stream: Any, after: Any = None) -> StagedRecord:
    """Begin to copy a sample into its record; whatever goes wrong is the record's error.

    Args:
        sample: as captured.
        record: uint8, of the size that the spec gives it.
        spec: of the record.
        stream: the CUDA stream to copy on; None on a CPU.
        after: CUDA event after which the states are there; None where they are.
    """
    started = time.monotonic()
    copied, error = None, ""
    try:
        ids, aux, last = views(record, spec, sample.ids.numel(), sample.rows)
        ids.copy_(sample.ids)
        if after is not None:
            stream.wait_event(after)
        with torch.inference_mode(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            from_aux, from_last = sample.states()
            aux.view(from_aux.shape).copy_(from_aux, non_blocking=True)
            last.copy_(from_last, non_blocking=True)
            copied = stream.record_event() if stream is not None else None
    except Exception as problem:
        error = one_line(problem)
        if stream is not None:
            with suppress(RuntimeError):  # of a lost device: the next thing that is asked of it says so
                stream.synchronize()  # nothing of it may land in the buffer later
    return StagedRecord(sample, record, copied, time.monotonic() - started, error)


def write_records(store: Store, staged: Sequence[StagedRecord], spec: RecordSpec, *, producer: str) -> Iterator[Wrote]:
    """Seal and put records, and say of each, in order and as soon as it is known, what became of it.

    A store that is full is waited for, a minute for all of them together.

    Args:
        store: where they go.
        staged: with distinct keys.
        spec: of the records.
        producer: engine and version, for the manifest.
    """
    since, deadline = time.monotonic(), room_deadline()
    sealed = [_sealed(record, spec, producer) for record in staged]
    good = [(record.sample.key, value) for record, value in zip(staged, sealed, strict=True) if isinstance(value, Tensor)]
    together = False
    if len(good) > 1:
        try:
            store.put([key for key, _ in good], [value for _, value in good])
            together = True
        except Exception as error:
            log.warning("put of %d records failed (%s): one by one", len(good), one_line(error))
    for record, value in zip(staged, sealed, strict=True):
        key = record.sample.key
        problem = value if isinstance(value, str) else ""
        if isinstance(value, Tensor) and not together:
            try:
                put_when_room(store, [key], [value], deadline=deadline)
            except Exception as error:
                problem = one_line(error)
        now = time.monotonic()
        seconds, since = record.seconds + now - since, now
        if isinstance(value, Tensor) and not problem:
            yield Wrote(key=key, nbytes=value.numel(), rows=record.sample.rows, seconds=seconds)
        else:
            log.warning("record %s was not written: %s", key, problem)
            yield Wrote(key=key, error=problem or "unknown", seconds=seconds)


def _sealed(staged: StagedRecord, spec: RecordSpec, producer: str) -> Tensor | str:
    """The record once its states are there, or why there is none."""
    if staged.error:
        return staged.error
    try:
        if staged.copied is not None:
            staged.copied.synchronize()
        with torch.inference_mode():  # an engine that runs in it owns the buffer
            return seal(staged.record, spec, staged.sample.ids.numel(), staged.sample.rows, producer=producer)
    except Exception as error:
        return one_line(error)


_Jobs = queue.Queue[tuple[Sequence[CapturedSample], Any] | None]
"""Batches with the CUDA event after which their states are there (None on a CPU); None ends the thread that takes it."""


class RecordWriter:
    """See the module.

    Args:
        address: of the store.
        spec: of the records.
        producer: engine and version, for the manifest.
        device: of the states.
        threads: how many; None is as many as the machine has cores for.

    Raises:
        StoreError: the store cannot be reached.
    """

    def __init__(self, address: Address, spec: RecordSpec, *, producer: str, device: str, threads: int | None = None) -> None:
        quick_handoffs()
        self._cuda = device != "cpu"
        self._jobs: _Jobs = queue.Queue(maxsize=1)
        self._results: queue.SimpleQueue[Wrote] = queue.SimpleQueue()
        self.in_flight = 0
        """Samples given and not yet taken back as results."""
        if threads is None:
            threads = max(1, min(_WRITERS, len(os.sched_getaffinity(0)) // _WRITER_CORES))
        self._threads: list[WriterThread] = []
        try:
            for _ in range(threads):
                self._threads.append(WriterThread(open_store(address), spec, producer, device, self._jobs, self._results, share=1 / threads))
        except BaseException:
            for writer in self._threads:
                writer.store.close()
            raise
        for writer in self._threads:
            writer.thread.start()

    def write(self, batch: Sequence[CapturedSample]) -> None:
        """Takes a batch; waits while another one is waiting."""
        self.in_flight += len(batch)
        ready = torch.cuda.current_stream().record_event() if self._cuda else None
        self._jobs.put((batch, ready))

    def results(self, timeout: float) -> list[Wrote]:
        """What has been written, in the order in which it was; waits up to ``timeout`` seconds for the first one when any is in flight.

        Their seconds, summed, are the time in which all threads were busy with copying, sealing and putting.
        """
        found: list[Wrote] = []
        try:
            while len(found) < self.in_flight:
                found.append(self._results.get(timeout=0 if found else timeout) if timeout > 0 else self._results.get_nowait())
        except queue.Empty:
            pass
        self.in_flight -= len(found)
        return found

    def close(self) -> None:
        """Finish what is in the queue and end; a put that does not return is left behind, and its client with it. Idempotent."""
        deadline = time.monotonic() + 2 * _ENDS
        with suppress(queue.Full):
            for _ in [writer for writer in self._threads if writer.thread.is_alive()]:
                self._jobs.put(None, timeout=max(0.0, deadline - _ENDS - time.monotonic()))
        for writer in self._threads:
            writer.close(deadline)


class WriterThread:
    """One of the writer's threads, with its client of the store and its buffer."""

    def __init__(self, store: Store, spec: RecordSpec, producer: str, device: str, jobs: _Jobs, results: queue.SimpleQueue[Wrote], *, share: float) -> None:
        self.store = store
        self.spec = spec
        self._producer = producer
        self._stream: Any = torch.cuda.Stream(device) if device != "cpu" else None
        self._buffer: Tensor | None = None
        self._jobs = jobs
        self._results = results
        self._share = share
        """Of all threads: one that is busy for a second counts for so much."""
        self.thread = threading.Thread(target=self._run, name="record-writer", daemon=True)

    def close(self, deadline: float) -> None:
        """Close the client once the thread has ended; by ``deadline`` (monotonic clock) it is left behind."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            log.warning("the store does not take the last records: they are left behind")
            return
        self._buffer = None
        self.store.close()

    # -- in the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, ready = job
            told = 0
            try:
                if ready is not None:
                    ready.synchronize()
                for wrote in write_records(self.store, self._stage(batch), self.spec, producer=self._producer):
                    self._results.put(replace(wrote, seconds=wrote.seconds * self._share))
                    told += 1
            except Exception as error:  # of whatever kind: it is these records' failure, and the next batch is written
                log.exception("%d records were not written", len(batch) - told)
                for sample in batch[told:]:
                    self._results.put(Wrote(key=sample.key, error=one_line(error)))
            del job, batch

    def _stage(self, batch: Sequence[CapturedSample]) -> list[StagedRecord]:
        """The batch's records in the buffer."""
        sizes = [self.spec.layout(sample.ids.numel(), sample.rows).total for sample in batch]
        if self._buffer is None or self._buffer.numel() < sum(sizes):
            outgrown, self._buffer = self._buffer, None
            if outgrown is not None:
                self.store.release(outgrown)
            self._buffer = self.store.buffer(sum(sizes) * 5 // 4)
        slots = torch.split(self._buffer[: sum(sizes)], sizes)
        return [stage(sample, slot, self.spec, stream=self._stream) for sample, slot in zip(batch, slots, strict=True)]


def room_deadline() -> float:
    """Until when (monotonic clock) a batch that is about to be put waits for room."""
    return time.monotonic() + _FULL_WAIT


def put_when_room(store: Store, keys: Sequence[str], values: Sequence[Tensor], *, deadline: float | None = None) -> None:
    """Put; a full store is waited for.

    Args:
        store, keys, values: as of :meth:`Store.put`.
        deadline: of the waiting, on the monotonic clock; None is a minute from now. Once it is over there is still one try.

    Raises:
        StoreError: as of :meth:`Store.put`; ``full`` at the deadline.
    """
    if deadline is None:
        deadline = room_deadline()
    delay = 0.05
    while True:
        try:
            store.put(keys, values)
            return
        except StoreError as error:
            if error.reason != "full" or time.monotonic() > deadline:
                raise
            log.warning("the store is full; waiting %.2f s", delay)
            time.sleep(delay)
            delay = min(2 * delay, 2.0)


def one_line(error: BaseException) -> str:
    """Type and first line of an error, for a report."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
