"""Writes the records of finished batches in threads of its own, so that the target computes the next batch meanwhile.

A thread copies states from the device into a registered buffer of the store (on CUDA: on a stream of its own), seals the records and puts them. There are two
where the machine has cores for them, each with a buffer and a client of the store: one copies and seals while the other puts. A batch whose put fails is put
again record by record, so that one bad record does not take its neighbours along. No error ends a thread: each becomes the failure of the leases that it
concerns.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchspec.engines.messages import Failed, Finished, Lease
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
_HANDS, _HAND_CORES = 2, 2
"""Threads, and cores of the machine for each of them: a client of the store keeps one busy while it waits."""


def quick_handoffs() -> None:
    """For this process: threads that write or read records wait less for the interpreter."""
    sys.setswitchinterval(min(sys.getswitchinterval(), _HANDOFF))


@dataclass(frozen=True)
class Captured:
    """States of a batch, padded on the right."""

    leases: list[Lease]
    ids: list[Tensor]
    """Of each lease, [T] int32."""
    aux: Tensor
    """[B, T, n*D] on the target's device."""
    last: Tensor
    """[B, T, D] on the target's device."""


@dataclass
class Written:
    """What became of a batch."""

    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    seconds: float = 0.0
    """Of copying, sealing and putting, without the wait for the device to have computed; divided by the number of threads, so that the sum over
    batches is the time in which all of them were busy."""


_Jobs = queue.Queue[tuple[Captured, Any] | None]
"""Batches with the CUDA event after which their states are there (None on a CPU); None ends the thread that takes it."""


class RecordWriter:
    """See the module.

    Args:
        address: of the store.
        spec: of the records.
        producer: engine and version, for the manifest.
        device: of the states.
        hands: threads; None is as many as the machine has cores for.

    Raises:
        StoreError: the store cannot be reached.
    """

    def __init__(self, address: Address, spec: RecordSpec, *, producer: str, device: str, hands: int | None = None) -> None:
        quick_handoffs()
        self._cuda = device != "cpu"
        self._jobs: _Jobs = queue.Queue(maxsize=1)
        self._results: queue.SimpleQueue[Written] = queue.SimpleQueue()
        self.in_flight = 0
        """Batches given and not yet taken back as results."""
        if hands is None:
            hands = max(1, min(_HANDS, len(os.sched_getaffinity(0)) // _HAND_CORES))
        self._hands: list[_Hand] = []
        try:
            for _ in range(hands):
                self._hands.append(_Hand(open_store(address), spec, producer, device, self._jobs, self._results, hands))
        except BaseException:
            for hand in self._hands:
                hand.store.close()
            raise
        for hand in self._hands:
            hand.thread.start()

    def write(self, batch: Captured) -> None:
        """Takes a batch; waits while another one is waiting."""
        self.in_flight += 1
        ready = torch.cuda.current_stream().record_event() if self._cuda else None
        self._jobs.put((batch, ready))

    def results(self, timeout: float) -> list[Written]:
        """What has been written, in the order in which it was; waits up to ``timeout`` seconds for the first one when any is in flight."""
        found: list[Written] = []
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
            for _ in [hand for hand in self._hands if hand.thread.is_alive()]:
                self._jobs.put(None, timeout=max(0.0, deadline - _ENDS - time.monotonic()))
        for hand in self._hands:
            hand.close(deadline)


class _Hand:
    """One of the writer's threads, with its client of the store and its buffer."""

    def __init__(self, store: Store, spec: RecordSpec, producer: str, device: str, jobs: _Jobs, results: queue.SimpleQueue[Written], hands: int) -> None:
        self.store = store
        self._spec = spec
        self._producer = producer
        self._stream: Any = torch.cuda.Stream(device) if device != "cpu" else None
        self._buffer: Tensor | None = None
        self._jobs = jobs
        self._results = results
        self._hands = hands
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

    @torch.inference_mode()
    def _run(self) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            while (job := self._jobs.get()) is not None:
                batch, ready = job
                started = time.monotonic()
                try:
                    if ready is not None:
                        ready.synchronize()
                        started = time.monotonic()
                    written = self._write(batch)
                except Exception as error:  # of whatever kind: it is these records' failure, and the next batch is written
                    log.exception("%d records were not written", len(batch.leases))
                    written = Written(failed=[Failed(lease.id, one_line(error)) for lease in batch.leases])
                written.seconds = (time.monotonic() - started) / self._hands
                self._results.put(written)
                del job, batch

    def _write(self, batch: Captured) -> Written:
        values = self._fill(batch)
        done = [Finished(lease.id, value.numel(), ids.numel()) for lease, value, ids in zip(batch.leases, values, batch.ids, strict=True)]
        deadline = room_deadline()
        try:
            self.store.put([lease.key for lease in batch.leases], values)
            return Written(finished=done)
        except Exception as error:
            log.warning("put of %d records failed (%s): one by one", len(values), one_line(error))
        written = Written()
        for lease, value, result in zip(batch.leases, values, done, strict=True):
            try:
                put_when_room(self.store, [lease.key], [value], deadline=deadline)
                written.finished.append(result)
            except Exception as error:
                written.failed.append(Failed(lease.id, one_line(error)))
        return written

    def _fill(self, batch: Captured) -> list[Tensor]:
        """Records in the buffer, sealed."""
        sizes = [self._spec.nbytes(ids.numel()) for ids in batch.ids]
        if self._buffer is None or self._buffer.numel() < sum(sizes):
            outgrown, self._buffer = self._buffer, None
            if outgrown is not None:
                self.store.release(outgrown)
            self._buffer = self.store.buffer(sum(sizes) * 5 // 4)
        slots = list(torch.split(self._buffer[: sum(sizes)], sizes))
        try:
            for row, (slot, ids) in enumerate(zip(slots, batch.ids, strict=True)):
                n = ids.numel()
                into_ids, into_aux, into_last = views(slot, self._spec, n, n)
                into_ids.copy_(ids)
                into_aux.copy_(batch.aux[row, :n], non_blocking=True)
                into_last.copy_(batch.last[row, :n], non_blocking=True)
        finally:
            if self._stream is not None:
                self._stream.synchronize()  # also where a copy fails: nothing of it may land in the buffer later
        return [seal(slot, self._spec, ids.numel(), ids.numel(), producer=self._producer) for slot, ids in zip(slots, batch.ids, strict=True)]


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
