"""Records on their way from vLLM's cache to the store, and word of them back to the engine.

A sink belongs to one destination (store, record spec, engine). The model runner's thread copies states into a registered ring of memory (on CUDA on a stream of
its own, so that the next forward goes on); a thread of the sink seals them in order, puts those that wait in one call, and reports each one. Whatever goes
wrong with a record is reported as that record's failure; nothing here raises into vLLM.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.engines.capture.requests import REPORTER, Destination, Introduce, Wrote
from torchspec.engines.connection import BadFrame, Closed, Connection
from torchspec.engines.handshake import prove
from torchspec.engines.messages import Challenge, Stop
from torchspec.engines.record_writer import one_line, put_when_room, quick_handoffs, room_deadline
from torchspec.engines.vllm.cache import HiddenStateCache
from torchspec.network import host_port
from torchspec.transfer import open_store
from torchspec.transfer.record import seal, views
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


@dataclass
class Capture:
    """States of a finished request, to be written."""

    request: str
    """vLLM's id of the request: its blocks are held until the copy is done."""
    key: str
    ids: list[int]
    """Of the conversation, all T."""
    rows: int
    """States computed, T or T-1."""
    blocks: list[int]


@dataclass
class _Copy:
    """One record in the ring."""

    capture: Capture
    record: Tensor
    done: Any
    """CUDA event after the copy; None where it was done at once."""
    seconds: float
    error: str = ""
    """Why there is nothing to write."""


class Sink:
    """See the module.

    Args:
        destination: of its records.
        token: the shared secret, proved to the engine.
        layer_ids: states that the cache keeps, by Transformers' index.
        max_tokens: longest conversation.
        producer: engine and version, for the manifest.
        device: of the cache.

    Raises:
        Closed: the engine does not listen, or does not speak as one. (A store that cannot be opened is reported for every record instead.)
    """

    def __init__(self, destination: Destination, *, token: str, layer_ids: tuple[int, ...], max_tokens: int, producer: str, device: torch.device) -> None:
        quick_handoffs()
        self.spec = destination.spec
        self._aux = [layer_ids.index(i) for i in self.spec.aux_layers]
        self._last = layer_ids.index(max(layer_ids))
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
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self.broken = bool(self._problem)
        """Of no more use: the engine is gone, or the store was not to be opened (the next record tries anew)."""
        self._thread = threading.Thread(target=self._run, name="torchspec-sink", daemon=True)
        self._thread.start()

    def copy(self, capture: Capture, cache: HiddenStateCache) -> Callable[[], bool] | None:
        """Start to take a request's states out of the cache.

        Returns:
            What says whether the blocks may be freed; None when the ring has no room now.
        """
        started = time.monotonic()
        if self._problem:
            self.refuse(capture.key, self._problem)
            return _at_once
        tokens = len(capture.ids)
        size = self.spec.layout(tokens, capture.rows).total
        with self._lock:
            at = self._ring.take(size)
        if at is None:
            return None
        record = self._buffer[at : at + size]
        done: Any = None
        error = ""
        try:
            done = self._fill(record, capture, cache)
        except (RuntimeError, ValueError, IndexError) as problem:
            error = one_line(problem)
            if self._stream is not None:
                self._stream.synchronize()  # nothing of it may be read, or land in the ring, later
        self._copies.put(_Copy(capture, record, done, time.monotonic() - started, error))
        return done.query if done is not None else _at_once

    def _fill(self, record: Tensor, capture: Capture, cache: HiddenStateCache) -> Any:
        """Copy ids and states into a record; returns the event after which they are there (None: they are)."""
        into_ids, aux, last = views(record, self.spec, len(capture.ids), capture.rows)
        into_ids.copy_(torch.tensor(capture.ids, dtype=torch.int32))
        if self._stream is not None:
            self._stream.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            states = cache.read(capture.blocks, capture.rows)
            chosen = states if self._aux == list(range(len(self._aux))) else states[:, self._aux]
            aux.view(capture.rows, len(self._aux), -1).copy_(chosen[:, : len(self._aux)], non_blocking=True)
            last.copy_(states[:, self._last], non_blocking=True)
            return self._stream.record_event() if self._stream is not None else None

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

    @torch.inference_mode()
    def _run(self) -> None:
        going = True
        while going:
            copies, going = self._waiting()
            self._write(copies)
        self._reports.close()
        if self._store is not None:
            self._store.close()

    def _waiting(self) -> tuple[list[_Copy], bool]:
        """The oldest copies, about half of the ring at most (waits for the first one), and whether more may come."""
        copies: list[_Copy] = []
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

    def _write(self, copies: list[_Copy]) -> None:
        """Put records in one call, one by one where that fails (a full store is waited for then, while those before are reported), and report each."""
        since, deadline = time.monotonic(), room_deadline()
        sealed = [self._sealed(copy) for copy in copies]
        good = [(copy.capture.key, value) for copy, value in zip(copies, sealed, strict=True) if isinstance(value, Tensor)]
        together = False
        if len(good) > 1:
            try:
                self._opened().put([key for key, _ in good], [value for _, value in good])
                together = True
            except Exception as error:
                log.warning("put of %d records failed (%s): one by one", len(good), one_line(error))
        for copy, value in zip(copies, sealed, strict=True):
            capture = copy.capture
            try:
                if isinstance(value, str):
                    raise RuntimeError(value)
                if not together:
                    put_when_room(self._opened(), [capture.key], [value], deadline=deadline)
                now = time.monotonic()
                report = Wrote(key=capture.key, nbytes=value.numel(), rows=capture.rows, seconds=copy.seconds + now - since)
                since = now
            except Exception as error:  # of whatever kind: it is this record's failure, and vLLM goes on
                log.warning("record %s was not written: %s", capture.key, error)
                report = Wrote(key=capture.key, error=one_line(error))
            with self._lock:
                self._ring.free_oldest()
            self._report(report)

    def _sealed(self, copy: _Copy) -> Tensor | str:
        """The record once its states are there, or why there is none."""
        capture = copy.capture
        if copy.error or self.broken:
            return copy.error or "the engine that ordered it is gone"
        try:
            if copy.done is not None:
                copy.done.synchronize()
            return seal(copy.record, self.spec, len(capture.ids), capture.rows, producer=self._producer)
        except Exception as error:
            return one_line(error)

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
