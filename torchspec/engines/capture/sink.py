"""Records on their way from a library's process to the store, and word of them back to the worker.

A sink belongs to one destination (store, record spec, worker). The thread that runs the model stages states into a registered ring of memory (on CUDA on a
stream of its own, so that the next forward goes on); a thread of the sink writes those that wait (``record_writer.py``) and reports each one. Whatever goes
wrong with a record is reported as that record's failure; nothing here raises into the library.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torchspec.engines.capture.requests import REPORTER, Destination, Introduce
from torchspec.engines.connection import BadFrame, Closed, Connection
from torchspec.engines.handshake import prove
from torchspec.engines.messages import Challenge, Stop, Wrote
from torchspec.engines.record_writer import CapturedSample, StagedRecord, one_line, quick_handoffs, stage, write_records
from torchspec.network import host_port
from torchspec.transfer import open_store
from torchspec.transfer.store import Store

log = logging.getLogger(__name__)
_RING = 64 * 2**20
"""Bytes of records on their way, or twice the largest record where that is more."""
_ANSWERS = 3.0
"""Seconds for an engine to take the connection, and again to challenge: the model waits meanwhile."""


class Ring:
    """Places in a run of bytes, given in order and returned in the same order.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._live: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> int | None:
        """Offset of ``size`` free bytes in one piece, or None now."""
        if not self._live:
            at = 0 if size <= self.capacity else None
        else:
            first = self._live[0][0]
            end = sum(self._live[-1])
            if end > first and end + size <= self.capacity:
                at = end
            elif end > first:
                at = 0 if size <= first else None
            else:
                at = end if end + size <= first else None
        if at is not None:
            self._live.append((at, size))
        return at

    def free_oldest(self) -> None:
        """Return the place that was given first."""
        self._live.popleft()


class Sink:
    """See the module.

    Args:
        destination: of its records.
        token: the shared secret, proved to the engine.
        max_tokens: longest conversation.
        producer: engine and version, for the manifest.
        device: of the states.

    Raises:
        Closed: the engine does not listen, or does not speak as one. (A store that cannot be opened is reported for every record instead.)
    """

    def __init__(self, destination: Destination, *, token: str, max_tokens: int, producer: str, device: torch.device) -> None:
        quick_handoffs()
        self.spec = destination.spec
        self._producer = producer
        self._reports = introduced(destination.report, token)
        self._ring = Ring(max(_RING, 2 * self.spec.nbytes(max_tokens)))
        self._store: Store | None = None
        self._problem = ""
        try:
            self._store = open_store(destination.store)
            self._buffer = self._store.buffer(self._ring.capacity)
        except Exception as error:  # an order may say anything
            self._problem = one_line(error)
            log.error("the store cannot be used: %s", error)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._copies: queue.SimpleQueue[StagedRecord | None] = queue.SimpleQueue()
        self.broken = bool(self._problem)
        """Of no more use: the engine is gone, or the store was not to be opened (the next record tries anew)."""
        self._thread = threading.Thread(target=self._run, name="torchspec-sink", daemon=True)
        self._thread.start()

    def copy(self, sample: CapturedSample) -> Callable[[], bool] | None:
        """Start to copy a conversation's states, which lie as the current stream leaves them.

        Returns:
            What says whether they may be let go; None when the ring has no room now.
        """
        if self._problem:
            self.refuse(sample.key, self._problem)
            return _at_once
        size = self.spec.layout(sample.ids.numel(), sample.rows).total
        with self._lock:
            at = self._ring.take(size)
        if at is None:
            return None
        after = torch.cuda.current_stream().record_event() if self._stream is not None else None
        staged = stage(sample, self._buffer[at : at + size], self.spec, stream=self._stream, after=after)
        self._copies.put(staged)
        return staged.copied.query if staged.copied is not None else _at_once

    def refuse(self, key: str, why: str) -> None:
        """Say of a record that it will not be written."""
        self._report(Wrote(key=key, error=why))

    def gone(self) -> bool:
        """Whether it is of no more use, because the engine at the other end has ended or the store was not to be opened."""
        try:
            self._reports.receive(0.0)
        except (Closed, BadFrame):
            self.broken = True
        return self.broken

    def close(self, wait: float = 0.0) -> None:
        """Let its thread write what is in the ring and end; wait for that, so many seconds. Idempotent."""
        self._copies.put(None)
        self._thread.join(wait)

    # -- in the thread

    def _run(self) -> None:
        going = True
        while going:
            copies, going = self._waiting()
            self._write(copies)
        self._reports.close()
        if self._store is not None:
            self._store.close()

    def _waiting(self) -> tuple[list[StagedRecord], bool]:
        """The oldest copies, about half of the ring at most (waits for the first one), and whether more may come."""
        copies: list[StagedRecord] = []
        room = self._ring.capacity // 2
        while room > 0:
            try:
                copy = self._copies.get(block=not copies)
            except queue.Empty:
                break
            if copy is None:
                return copies, False
            copies.append(copy)
            room -= copy.record.numel()
        return copies, True

    def _write(self, copies: list[StagedRecord]) -> None:
        """Put records, and report each as soon as it is there: those before one that waits for room are not held up."""
        if not copies:
            return
        if self.broken:
            copies = [replace(copy, error=copy.error or "the engine that ordered it is gone") for copy in copies]
        for report in write_records(self._opened(), copies, self.spec, producer=self._producer):
            with self._lock:
                self._ring.free_oldest()
            self._report(report)

    def _opened(self) -> Store:
        assert self._store is not None
        return self._store

    def _report(self, report: Wrote) -> None:
        try:
            self._reports.send(report)
        except Closed:
            self.broken = True


def introduced(address: tuple[str, int], token: str) -> Connection:
    """A connection to an engine that takes reports on it.

    Raises:
        Closed: nobody is there, or somebody else.
    """
    reports = Connection(address, Challenge | Stop, timeout=_ANSWERS)
    try:
        asked = reports.receive(_ANSWERS)
        if not isinstance(asked, Challenge):
            raise Closed(f"{host_port(*address)} does not take reports")
        reports.send(Introduce(proof=prove(token, asked.nonce, REPORTER, REPORTER)))
    except (Closed, BadFrame) as error:
        reports.close()
        raise Closed(str(error)) from error
    return reports


def _at_once() -> bool:
    return True
