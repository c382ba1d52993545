"""One rank's way through the plan: a background thread fetches packs, the trainer takes finished batches.

    thread:   submit coming packs ─► wait until one is ready ─► read its records ─► verify ─► collate ─► acknowledge ─► queue
    trainer:  next() takes from the queue, in slices of at most half a second: engine health and signals are looked at in between; on a GPU the copy of the
              batch after it begins here (``device_prefetch.py``)

With several ranks, each of them takes or leaves a batch as all do (``agreement.py``): a signal or a failure of one ends all of them at the same batch.
Packs come in plan order whatever order they finish in. What a rank holds is bounded twice: records in the store by the window of submitted bytes (and the
group's budget), batches in memory by ``prefetch_packs``. A record that cannot be read or does not verify is produced again; a sample that was given up is
written to ``failed_samples.jsonl``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torchspec.agreement import Vote
from torchspec.batch import PackedBatch
from torchspec.data.device_prefetch import Prefetched
from torchspec.data.fetcher import SLICE, Channel, Fetcher, Link, LoaderConfig, LoaderStats, Pass
from torchspec.engines.record_writer import quick_handoffs
from torchspec.errors import GroupStopped

if TYPE_CHECKING:
    from torchspec.engines.client import TrainerClient

__all__ = ["LoaderConfig", "LoaderStats", "PackLoader", "PackStream", "Pass"]

_JOIN = 30.0
"""Seconds to wait for the thread when a pass ends early."""


class PackLoader:
    """Iterable over this rank's batches, with a length.

    Args:
        config: the stage.
        connect: opens a connection to the coordinator under a name.
        begin: called when a pass starts; says what to go through.
        length: batches of a whole epoch of a rank (also when a pass starts in its middle: Lightning counts those before as done).
    """

    def __init__(self, config: LoaderConfig, *, connect: Callable[[str], TrainerClient], begin: Callable[[], Pass], length: Callable[[], int]) -> None:
        self.config = config
        self.stats = LoaderStats()
        self._connect = connect
        self._begin = begin
        self._length = length
        self._link: Link | None = None
        self._stream: PackStream | None = None

    def __len__(self) -> int:
        return self._length()

    def __iter__(self) -> Iterator[PackedBatch]:
        self._end_pass()
        self._stream = PackStream(self.config, self._open, self.stats)
        return self._stream

    def _open(self) -> tuple[Link, Pass]:
        if self._link is None or self._link.broken:
            self._link = Link(self._connect, f"rank-{self.config.rank}/{self.config.stage}", read_limit=self.config.read_limit)
        return self._link, self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in the cursor. Tells Lightning that this loader resumes in the middle of an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def _end_pass(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """End the pass and the connection. Idempotent."""
        self._end_pass()
        if self._link is not None:
            self._link.close()
            self._link = None


class PackStream:
    """The iterator of one pass, or of several in a row (``LoaderConfig.chained``).

    It begins with the first ``next``: Lightning also makes iterators that it never uses. Dropping it ends its thread.
    """

    def __init__(self, config: LoaderConfig, begin: Callable[[], tuple[Link, Pass]], stats: LoaderStats) -> None:
        self._config = config
        self._stats = stats
        self._begin: Callable[[], tuple[Link, Pass]] | None = begin
        self._channel = Channel(config.prefetch_packs)
        self._link: Link | None = None
        self._thread: threading.Thread | None = None
        self._left = 0
        self._ahead: Prefetched | None = None
        self._failure: BaseException | None = None

    def _next_pass(self) -> bool:
        """Begin a pass; False when none is left to go through."""
        if self._begin is None:
            return False
        begin, self._begin = self._begin, (self._begin if self._config.chained else None)
        self._end_thread()
        self._link, what = begin()
        self._channel = Channel(self._config.prefetch_packs)
        fetcher = Fetcher(self._config, self._link, what, self._stats, self._channel)
        self._left = len(fetcher.mine)
        if self._left:
            quick_handoffs()
            self._thread = threading.Thread(target=fetcher.run, name=f"{self._config.stage}-loader", daemon=True)
            self._thread.start()
        return self._left > 0

    def __iter__(self) -> PackStream:
        return self

    def __next__(self) -> PackedBatch:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        started = time.monotonic()
        batch: PackedBatch | None = None
        error: Exception | None = None
        try:
            if self._left == 0 and not self._next_pass():
                self.close()
                raise StopIteration
            batch = self._take()
        except StopIteration:  # of every rank at the same batch
            raise
        except Exception as failed:
            error = failed
        finally:
            self._stats.wait_s += time.monotonic() - started
        vote = Vote.FAILED if error is not None else Vote.STOP if batch is None or self._config.interrupted() else Vote.GO
        try:
            agreed = self._config.agree(vote)
        except BaseException:
            self.close()
            raise
        if agreed is Vote.GO and batch is not None:
            self._left -= 1
            return batch
        self.close()
        if error is not None:
            raise error
        if agreed is Vote.FAILED:
            raise GroupStopped("another rank has no data: its log, logs/rank-N.log, says why")
        raise SIGTERMException

    def _take(self) -> PackedBatch | None:
        """The next batch, on the trainer's device, or None as in ``_wait``; begins to copy the one after it where that is there already."""
        prefetch = self._config.prefetch_to
        if prefetch is None:
            return self._wait()
        begun, self._ahead = self._ahead, None
        if begun is None:
            batch = self._wait()
            if batch is None:
                return None
            begun = prefetch.start(batch)
        if self._left > 1:
            item = self._channel.take(0.0)
            if isinstance(item, PackedBatch):
                self._ahead = prefetch.start(item)
            else:
                self._failure = item  # raised once the batch before it was trained
        return prefetch.finish(begun)

    def _wait(self) -> PackedBatch | None:
        """The next batch; None when this rank is told to end before it is there."""
        while True:
            item, self._failure = self._failure or self._channel.take(SLICE), None
            if isinstance(item, PackedBatch):
                return item
            if self._config.interrupted():
                return None
            if item is not None:
                self._config.health()  # knows more than "connection lost"
                raise item
            self._config.health()

    def _end_thread(self) -> None:
        self._channel.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN)
            if self._thread.is_alive() and self._link is not None:
                self._link.broken = True  # it is stuck in a call: never share its connection

    def close(self) -> None:
        """End the thread and give back what it holds. Idempotent."""
        self._begin = None
        self._left = 0
        self._ahead = None
        self._end_thread()

    def __del__(self) -> None:
        self._channel.stop()
