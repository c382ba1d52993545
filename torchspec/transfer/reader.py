"""Reads from the store that end: every call on the client has a limit, and one that does not return by then is left behind.

A call into a transport can stay away for good: a peer that stopped, a connection cut without a word, a lost wake-up. Python cannot end it. So a thread of
its own makes the calls, one after the other. When one is late, thread, client and memory are left to it (it may still write there), and the next read takes
new ones. The thread closes the old client if the call ever returns.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torchspec.transfer.store import Address, Store, StoreError

if TYPE_CHECKING:
    from torch import Tensor

READ_LIMIT = 40.0
"""Seconds for a call, and one more for every 20 MB that it reads. Mooncake itself gives up a transfer without progress after 30."""
_SLOWEST = 20e6
_MOST_LATE = 3
"""Late calls in a row after which the store counts as unreachable."""
_CLOSES = 10.0
_SLICE = 0.25
_T = TypeVar("_T")


class Stopped(Exception):
    """The reader was told to stop waiting."""


class StoreReader:
    """A client of the store that only reads. Used by one thread at a time.

    Args:
        address: of the store; it is opened at the first read.
        limit: see :data:`READ_LIMIT`.
    """

    def __init__(self, address: Address, *, limit: float = READ_LIMIT) -> None:
        self._address = address
        self._limit = limit
        self._client: _Client | None = None
        self._buffer: Tensor | None = None
        self._late = 0
        self.late = 0
        """Calls that were left behind."""

    def read(self, keys: Sequence[str], sizes: Sequence[int], *, stopped: Callable[[], bool]) -> tuple[list[Tensor], dict[int, str]]:
        """Read values into the reader's memory: all at once, one by one where that fails.

        Args:
            keys: of the values.
            sizes: room for each, bytes.
            stopped: asked four times a second; True ends the wait.

        Returns:
            A uint8 tensor [size] for each key, valid until the next call, and by position what could not be read, and why.

        Raises:
            StoreError: ``unreachable``; also after three late calls in a row.
            Stopped: see ``stopped``.
        """
        slots = self._slots(sizes, stopped)
        try:
            self._get(keys, slots, stopped)
            return slots, {}
        except StoreError as error:
            if error.reason == "unreachable":
                raise
        if self._client is None:  # late: it may still write
            slots = self._slots(sizes, stopped)
        problems = {}
        for i, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            try:
                self._get([key], [slot], stopped)
            except StoreError as problem:
                if problem.reason == "unreachable":
                    raise
                problems[i] = str(problem)
        return slots, problems

    def close(self) -> None:
        """Idempotent; a call that does not return is not waited for."""
        client = self._leave()
        if client is not None and not client.busy:
            client.thread.join(_CLOSES)

    def _slots(self, sizes: Sequence[int], stopped: Callable[[], bool]) -> list[Tensor]:
        total = sum(sizes)
        while self._buffer is None or self._buffer.numel() < total:
            late = self.late
            outgrown, self._buffer = self._buffer, None
            try:
                self._buffer = self._call(partial(_grown, outgrown=outgrown, nbytes=total), 0, stopped)
            except StoreError as error:
                if error.reason == "unreachable" or self.late == late:
                    raise
        return list(self._buffer[:total].split(list(sizes)))

    def _get(self, keys: Sequence[str], slots: Sequence[Tensor], stopped: Callable[[], bool]) -> None:
        before = self.late
        try:
            self._call(lambda store: store.get(keys, slots), sum(slot.numel() for slot in slots), stopped)
        finally:
            if self.late == before:  # it answered, be it that there is no such key
                self._late = 0

    def _call(self, do: Callable[[Store], _T], nbytes: int, stopped: Callable[[], bool]) -> _T:
        if self._client is None:
            self._client = _Client(self._address)
        limit = self._limit + nbytes / _SLOWEST
        try:
            return self._client.call(do, limit=limit, stopped=stopped)
        except Stopped:
            self._leave()
            raise
        except TimeoutError:
            self._leave()
            self.late += 1
            self._late += 1
            problem = f"a call did not return within {limit:.1f} s"
            if self._late == _MOST_LATE:
                raise StoreError("unreachable", "", f"{problem}, {_MOST_LATE} times in a row") from None
            raise StoreError("io", "", problem) from None

    def _leave(self) -> _Client | None:
        client, self._client, self._buffer = self._client, None, None
        if client is not None:
            client.end()
        return client


def _grown(store: Store, *, outgrown: Tensor | None, nbytes: int) -> Tensor:
    """A larger buffer in the place of one."""
    if outgrown is not None:
        store.release(outgrown)
    return store.buffer(nbytes)


class _Client:
    """A store client and the thread that makes its calls."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._jobs: queue.SimpleQueue[tuple[Callable[[Store], Any], queue.SimpleQueue[tuple[Any, BaseException | None]]] | None] = queue.SimpleQueue()
        self.busy = False
        """A call has not returned."""
        self.thread = threading.Thread(target=self._run, name="store-reader", daemon=True)
        self.thread.start()

    def call(self, do: Callable[[Store], _T], *, limit: float, stopped: Callable[[], bool]) -> _T:
        """What ``do`` gives; raises TimeoutError or Stopped and then must not be used again."""
        answer: queue.SimpleQueue[tuple[_T, BaseException | None]] = queue.SimpleQueue()
        deadline = time.monotonic() + limit
        self.busy = True
        self._jobs.put((do, answer))
        while True:
            try:
                result, error = answer.get(timeout=_SLICE)
            except queue.Empty:
                if stopped():
                    raise Stopped from None
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                continue
            self.busy = False
            if error is not None:
                raise error
            return result

    def end(self) -> None:
        """Close the client as soon as no call is going on."""
        self._jobs.put(None)

    def _run(self) -> None:
        store: Store | None = None
        while (job := self._jobs.get()) is not None:
            do, answer = job
            try:
                if store is None:
                    from torchspec.transfer import open_store

                    store = open_store(self._address)
                answer.put((do(store), None))
            except BaseException as error:
                answer.put((None, error))
            del job, do, answer
        if store is not None:
            store.close()
