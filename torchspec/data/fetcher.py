"""What a loader's background thread does: submit packs, wait for them, read and verify their records, collate, acknowledge.

A pass is one way through a part of a plan; a link is a rank's connection for one stage, kept over its passes; a channel takes finished batches to the
trainer's thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from torchspec.agreement import Vote, alone
from torchspec.batch import PackedBatch
from torchspec.data.collate import collate
from torchspec.data.device_prefetch import DevicePrefetch
from torchspec.data.failures import append_failures
from torchspec.data.plan import Plan
from torchspec.data.prompts import answer_counts
from torchspec.data.sample_source import Samples
from torchspec.engines.messages import Damaged, Pack, PackReady, RecordRef
from torchspec.supervision import Supervision
from torchspec.transfer.reader import READ_LIMIT, Stopped, StoreReader
from torchspec.transfer.record import NOT_FINITE, Record, RecordError, RecordSpec, is_finite, open_record

if TYPE_CHECKING:
    from torchspec.engines.client import TrainerClient

SLICE = 0.5
"""Seconds between two looks at health and signals."""
_MOST_PACKS = 256
"""Packs submitted and not yet acknowledged, at most."""
_LEAST_PACKS = 2


@dataclass(frozen=True)
class Pass:
    """What one iteration goes through: packs ``first + rank, + world, ...`` below ``end``."""

    plan: Plan
    epoch: int
    """Number of the pass for the coordinator, the same on every rank; for training the plan's epoch."""
    first: int
    end: int


@dataclass
class LoaderStats:
    """Counters since the loader was made; they only grow. Seconds are wall clock."""

    packs: int = 0
    samples: int = 0
    failed: int = 0
    reissued: int = 0
    tokens: int = 0
    bytes: int = 0
    wait_s: float = 0.0
    """The trainer waited for a batch."""
    read_s: float = 0.0
    """The thread copied and verified records."""
    collate_s: float = 0.0
    idle_s: float = 0.0
    """The thread waited for engines."""
    full_s: float = 0.0
    """The thread waited for the trainer to take a batch."""
    late: int = 0
    """Calls to the store that did not return in time."""


@dataclass(frozen=True)
class LoaderConfig:
    """What stays the same over all passes of one stage of one rank."""

    stage: str
    rank: int
    world: int
    dataset: Samples
    spec: RecordSpec
    supervision: Supervision
    window_bytes: int
    prefetch_packs: int
    failed_path: Path
    pin: bool
    health: Callable[[], None]
    """Raises when the engine group is gone."""
    interrupted: Callable[[], bool]
    """True once this rank was told to end (SIGTERM)."""
    agree: Callable[[Vote], Vote] = alone
    """What all ranks do about the batch that each of them has, or has not."""
    chained: bool = False
    """Another pass follows when one is exhausted, until one is empty: the trainer's epochs need not be those of the plan."""
    prefetch_to: DevicePrefetch | None = None
    """Brings batches to the trainer's device, one ahead; None hands them out where they are."""
    tee: Callable[[Record, int], None] | None = None
    """Takes every verified record; what it is given is only valid inside the call."""
    read_limit: float = READ_LIMIT
    """Seconds for a read from the store (and more for a large one); one that takes longer is left behind and repeated with a new client."""
    on_policy: bool = False
    """Answers are given in the run and their lengths come with the packs; else the plan knows what is supervised."""


class Channel:
    """Batches from thread to trainer: bounded, ordered, and closable from both sides. A failure comes after the batches before it."""

    def __init__(self, size: int) -> None:
        self._items: queue.Queue[PackedBatch | BaseException] = queue.Queue()
        self._room = threading.Semaphore(size)
        self.stopped = threading.Event()

    def put(self, batch: PackedBatch) -> bool:
        """Waits for room; False when the other side has closed."""
        while not self._room.acquire(timeout=SLICE):
            if self.stopped.is_set():
                return False
        self._items.put(batch)
        return not self.stopped.is_set()

    def fail(self, error: BaseException) -> None:
        self._items.put(error)

    def take(self, timeout: float) -> PackedBatch | BaseException | None:
        try:
            item = self._items.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(item, PackedBatch):
            self._room.release()
        return item

    def stop(self) -> None:
        self.stopped.set()
        self._room.release()


class Link:
    """A rank's connection for one stage, kept over its passes: coordinator client and store reader. Used by one thread at a time."""

    def __init__(self, connect: Callable[[str], TrainerClient], name: str, *, read_limit: float = READ_LIMIT) -> None:
        self._connect = connect
        self._name = name
        self._read_limit = read_limit
        self._client: TrainerClient | None = None
        self._reader: StoreReader | None = None
        self.broken = False

    @property
    def client(self) -> TrainerClient:
        if self._client is None:
            self._client = self._connect(self._name)
        return self._client

    @property
    def reader(self) -> StoreReader:
        if self._reader is None:
            self._reader = StoreReader(self.client.welcome.store, limit=self._read_limit)
        return self._reader

    def close(self) -> None:
        """Idempotent."""
        self.broken = True
        for part in (self._client, self._reader):
            if part is not None:
                part.close()
        self._client = self._reader = None


class Fetcher:
    """The thread's work for one pass."""

    def __init__(self, config: LoaderConfig, link: Link, what: Pass, stats: LoaderStats, channel: Channel) -> None:
        self.config, self.link, self.plan, self.stats, self.channel = config, link, what.plan, stats, channel
        self.epoch, self.first, self.end = what.epoch, what.first, what.end
        self.mine = range(what.first + config.rank, what.end, config.world)
        self._submitted = 0
        self._sizes: dict[int, int] = {}
        self._ready: dict[int, PackReady] = {}

    def run(self) -> None:
        """Fetch every pack; a failure goes to the trainer."""
        try:
            client = self.link.client
            client.open_stage(
                self.config.stage,
                self.epoch,
                first_pack=self.first,
                num_packs=self.end,
                rank=self.config.rank,
                world=self.config.world,
                step_packs=self.plan.packs_per_step if self.config.on_policy else 0,
            )
            for index in self.mine:
                batch = self._fetch(index)
                if batch is None or not self._deliver(batch):
                    break
            client.close_stage(self.config.stage, self.epoch)
        except BaseException as error:  # the trainer's thread raises it
            self.link.close()
            if not self.channel.stopped.is_set():
                self.channel.fail(error)

    def _deliver(self, batch: PackedBatch) -> bool:
        started = time.monotonic()
        taken = self.channel.put(batch)
        self.stats.full_s += time.monotonic() - started
        return taken

    def _fetch(self, index: int) -> PackedBatch | None:
        """The batch of one pack; None when the pass was closed meanwhile."""
        while not self.channel.stopped.is_set():
            self._submit()
            ready = self._ready.pop(index, None)
            if ready is None:
                started = time.monotonic()
                news = self.link.client.poll(SLICE)
                self.stats.idle_s += time.monotonic() - started
                if news is not None and news.epoch == self.epoch and news.stage == self.config.stage:
                    self._ready[news.pack] = news
                continue
            records = self._read(ready)
            if records is None:
                continue  # something was damaged: the pack becomes ready again
            batch = self._collate(ready, records)
            self.link.client.acknowledge(self.config.stage, self.epoch, [index])
            del self._sizes[index]
            return batch
        return None

    def _submit(self) -> None:
        """Send coming packs while they fit the window."""
        packs = []
        least = max(_LEAST_PACKS, self.plan.packs_per_step // self.config.world if self.config.on_policy else 0)  # a step is announced as a whole
        while self._submitted < len(self.mine):
            index = self.mine[self._submitted]
            samples = self.plan.pack(index)
            size = sum(self.config.spec.nbytes(int(self.config.dataset.lengths[i])) for i in samples)
            held = len(self._sizes)
            if held >= least and (held >= _MOST_PACKS or sum(self._sizes.values()) + size > self.config.window_bytes):
                break
            self._sizes[index] = size
            self._submitted += 1
            packs.append(Pack(index, [self.config.dataset.request(int(i), epoch=self.epoch) for i in samples]))
        if packs:
            self.link.client.submit(self.config.stage, self.epoch, packs)

    # -- records

    def _read(self, ready: PackReady) -> dict[int, Record] | None:
        """Copy and verify the pack's records; None after asking again for those that are damaged."""
        if not ready.records:
            return {}
        started = time.monotonic()
        reader = self.link.reader
        late = reader.late
        sizes = [self.config.spec.nbytes(ref.tokens) for ref in ready.records]
        try:
            read, problems = reader.read([ref.key for ref in ready.records], sizes, stopped=self.channel.stopped.is_set)
        except Stopped:
            return None
        finally:
            self.stats.late += reader.late - late
        slots = {ref.index: slot for ref, slot in zip(ready.records, read, strict=True)}
        damaged = {ready.records[position].index: problem for position, problem in problems.items()}
        records: dict[int, Record] = {}
        for ref in ready.records:
            if ref.index not in damaged:
                try:
                    records[ref.index] = self._open(slots[ref.index], ref)
                except RecordError as error:
                    damaged[ref.index] = str(error)
        if self.config.tee is not None:  # what trains is watched on the device; what is kept is looked at here
            damaged |= {index: NOT_FINITE for index, record in records.items() if not is_finite(record)}
        self.stats.read_s += time.monotonic() - started
        if damaged:
            self.stats.reissued += len(damaged)
            again = [Damaged(ref.index, ref.key, damaged[ref.index]) for ref in ready.records if ref.index in damaged]
            self.link.client.reissue(self.config.stage, self.epoch, ready.pack, again)
            return None
        self.stats.bytes += sum(ref.nbytes for ref in ready.records)
        if self.config.tee is not None:
            for index, record in records.items():
                self.config.tee(record, self.config.dataset.key(index))
        return records

    def _open(self, slot: Tensor, ref: RecordRef) -> Record:
        record = open_record(slot, self.config.spec)
        if problem := self.config.dataset.mismatch(ref.index, record.input_ids):
            raise RecordError(problem)
        return record

    def _collate(self, ready: PackReady, records: dict[int, Record]) -> PackedBatch:
        started = time.monotonic()
        supervision, samples = self.config.supervision, self.plan.pack(ready.pack)
        step = ready.pack // self.plan.packs_per_step
        counts = self.plan.step_counts(step) if ready.answers is None else answer_counts(ready.answers, supervision)
        batch = collate(
            records,
            dataset=self.config.dataset,
            samples=samples.tolist(),
            keys=self.plan.keys(samples),
            spec=self.config.spec,
            supervision=supervision,
            counts=counts,
            pack_index=ready.pack,
            stage=self.config.stage,
            pin=self.config.pin,
        )
        if ready.failed:
            self.stats.failed += len(ready.failed)
            append_failures(self.config.failed_path, ready.failed, stage=self.config.stage, epoch=self.epoch, pack=ready.pack, dataset=self.config.dataset)
        self.stats.packs += 1
        self.stats.samples += len(records)
        self.stats.tokens += batch.num_tokens
        self.stats.collate_s += time.monotonic() - started
        return batch
