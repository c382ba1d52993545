"""The thread that deletes keys from the store for the coordinator, because a store call may block. It has a store client of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from torchspec.transfer import open_store
from torchspec.transfer.store import Address

_LATEST = 8
"""Lease timeouts between the last two deletions of a lost worker's keys."""


class LateKeys:
    """Keys of lost workers, which are deleted at once and then again one, three, seven and fifteen lease timeouts later.

    A worker of another host may live on without us and write what it held, and what a dead one sent to a store's server may be read there after our deletion.

    Args:
        timeout: seconds of a lease.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._waiting: list[tuple[float, float, list[str]]] = []
        """(when, seconds since the last time, keys)."""

    def add(self, keys: Sequence[str], *, now: float) -> None:
        if keys:
            self._waiting.append((now + self._timeout, self._timeout, list(keys)))

    def due(self, now: float) -> list[str]:
        """What is to be deleted now."""
        due = [entry for entry in self._waiting if entry[0] <= now]
        self._waiting = [entry for entry in self._waiting if entry[0] > now]
        self._waiting += [(now + 2 * delay, 2 * delay, keys) for _, delay, keys in due if delay < _LATEST * self._timeout]
        return [key for _, _, keys in due for key in keys]


class Cleaner:
    """See the module. Everything queued goes in one call.

    Args:
        address: of the store.
        on_deleted: called in the thread with the keys that are gone.
        on_error: called in the thread, once, when it cannot go on.
    """

    def __init__(self, address: Address, *, on_deleted: Callable[[list[str]], None], on_error: Callable[[str], None]) -> None:
        self._address = address
        self._on_deleted = on_deleted
        self._on_error = on_error
        self.call = 0
        """Number of the call to the store that is going on, from 1; 0 while there is none."""
        self._queue: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cleaner", daemon=True)
        self._thread.start()

    def delete(self, keys: Sequence[str]) -> None:
        """Returns at once."""
        self._queue.put(list(keys))

    def close(self, timeout: float) -> None:
        """Delete what is queued and end."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            store = open_store(self._address)
        except Exception as error:
            self._on_error(f"the coordinator cannot reach its store: {error}")
            return
        try:
            number = 0
            while keys := self._next():
                self.call = number = number + 1
                store.delete(keys)
                self.call = 0
                self._on_deleted(keys)
        except Exception as error:
            self._on_error(f"deleting from the store failed: {error}")
        finally:
            store.close()

    def _next(self) -> list[str]:
        """Keys, at least one; none at the end."""
        keys: list[str] = []
        while not keys or not self._queue.empty():
            more = self._queue.get()
            if more is None:
                self._queue.put(None)  # for the next call
                break
            keys += more
        return keys
