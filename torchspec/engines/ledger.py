"""The coordinator's rules as a state machine: no socket, no process, no clock of its own (time is an argument).

Life of a sample::

    submitted ─ credit for its whole pack ─► ready ─ pull ─► leased ─ finish ─► finished ─ all of its pack ─► PackReady ─ acknowledge ─► deleted, credit back
                                               ▲                │
                                               └── new attempt ─┘  fail, worker lost          after max_attempts: given up, named in PackReady

Credit is granted a pack at a time, in pack order over all ranks of a pass, and returns when the pack is acknowledged (or its pass closed) *and* every key of it is
deleted. Bytes alive therefore never exceed the budget, whatever workers do. Validation has a reserve that training cannot take, and its samples go to workers first.

What the outside must do is left in the ``out`` lists: packs that are ready, keys to delete, leases to cancel, and the reason to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torchspec.engines.messages import Failure, Lease, Pack, PackReady, RecordRef

ORDER = ("validate", "train")
"""Stages whose name starts with the first go to workers before the others."""


class ProtocolError(Exception):
    """A client broke the protocol; its connection is closed with this message."""


@dataclass(slots=True, eq=False)
class _Sample:
    index: int
    ids: bytes
    pack: _Pack
    attempt: int = 0
    key: str = ""
    lease: int | None = None
    record: RecordRef | None = None
    failure: Failure | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) // 4


@dataclass(slots=True, eq=False)
class _Pack:
    index: int
    rank: int
    passed: _Pass
    samples: list[_Sample] = field(default_factory=list)
    nbytes: int = 0
    granted: bool = False
    waiting: int = 0
    """Samples neither finished nor given up."""
    announced: bool = False
    ended: bool = False
    """Acknowledged, or its pass closed: its credit goes when ``keys`` is empty."""
    keys: set[str] = field(default_factory=set)
    """Keys that may exist in the store."""


@dataclass(slots=True, eq=False)
class _Pass:
    stage: str
    epoch: int
    world: int
    first: int
    next: int
    """Lowest pack that has no credit yet."""
    end: int
    ranks: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    packs: dict[int, _Pack] = field(default_factory=dict)
    submitted_packs: int = 0
    submitted_samples: int = 0
    failed: int = 0

    def owner(self, index: int) -> int:
        return (index - self.first) % self.world


@dataclass(slots=True, eq=False)
class _Worker:
    max_tokens: int
    leases: dict[int, _Sample] = field(default_factory=dict)
    deadlines: dict[int, float] = field(default_factory=dict)
    dropped: dict[int, tuple[str, _Pack]] = field(default_factory=dict)
    """Cancelled leases that may still write: key and pack that pays for it."""


@dataclass
class Out:
    """What to do outside; the caller empties it."""

    ready: list[tuple[int, PackReady]] = field(default_factory=list)
    """(rank, message)."""
    delete: list[str] = field(default_factory=list)
    cancel: list[tuple[str, int]] = field(default_factory=list)
    """(worker, lease)."""
    stop: str | None = None


class Ledger:
    """See the module.

    Args:
        prefix: first parts of every key, ``run/incarnation``.
        budget: bytes alive at once.
        reserve: bytes of it that only validation may use.
        nbytes: bytes of a record of so many tokens, at most.
        max_attempts: tries at one sample.
        max_failed_fraction: share of a pass's samples that may be given up.
        lease_timeout: seconds for a lease.
    """

    def __init__(
        self, *, prefix: str, budget: int, reserve: int, nbytes: Callable[[int], int], max_attempts: int, max_failed_fraction: float, lease_timeout: float
    ) -> None:
        self.prefix = prefix
        self.budget = budget
        self.reserve = reserve
        self.nbytes = nbytes
        self.max_attempts = max_attempts
        self.max_failed_fraction = max_failed_fraction
        self.lease_timeout = lease_timeout
        self.out = Out()
        self.bytes_alive = 0
        self.failed = 0
        self._alive = {kind: 0 for kind in ORDER}
        self._queues: dict[str, deque[_Sample]] = {kind: deque() for kind in ORDER}
        self._passes: dict[tuple[str, int], _Pass] = {}
        self._workers: dict[str, _Worker] = {}
        self._paying: dict[str, _Pack] = {}
        """Pack of each key that may exist."""
        self._next_lease = 0

    # -- trainers

    def open_stage(self, rank: int, stage: str, epoch: int, *, first_pack: int, num_packs: int, world: int) -> None:
        """A rank takes part in a pass; other passes of the stage end for it.

        Raises:
            ProtocolError: when the ranks disagree on the pass.
        """
        if not 0 <= rank < world:
            raise ProtocolError(f"rank {rank} is not in a world of {world}")
        for other in [p for (name, number), p in self._passes.items() if name == stage and number != epoch]:
            self.close_stage(rank, stage, other.epoch)
        found = self._passes.get((stage, epoch))
        if found is not None and rank in found.ranks:  # the same pass again: from its beginning
            self.close_stage(rank, stage, epoch)
            found = self._passes.get((stage, epoch))
        if found is None:
            found = self._passes[stage, epoch] = _Pass(stage, epoch, world, first_pack, first_pack, num_packs)
        if (found.world, found.first, found.end) != (world, first_pack, num_packs):
            raise ProtocolError(f"rank {rank} opens {stage} epoch {epoch} as packs {first_pack}..{num_packs} of {world} ranks, another as {found.first}..{found.end} of {found.world}")
        found.ranks.add(rank)

    def submit(self, rank: int, stage: str, epoch: int, packs: Iterable[Pack]) -> None:
        """Packs of this rank, in plan order, each once.

        Raises:
            ProtocolError: a pass that is not open, or a pack that is not this rank's, or comes twice.
        """
        passed = self._pass(rank, stage, epoch)
        for given in packs:
            if not passed.first <= given.index < passed.end or passed.owner(given.index) != rank or given.index in passed.packs or given.index < passed.next:
                raise ProtocolError(f"rank {rank} submits pack {given.index} of {stage} epoch {epoch}, which is not its own or was submitted before")
            pack = _Pack(given.index, rank, passed)
            pack.samples = [_Sample(sample.index, sample.ids, pack) for sample in given.samples]
            pack.nbytes = sum(self.nbytes(sample.tokens) for sample in pack.samples)
            pack.waiting = len(pack.samples)
            if pack.nbytes > self._limit(stage):
                self.out.stop = f"pack {given.index} of {stage} needs {pack.nbytes} bytes, more than the store's budget leaves for it; raise data.store.budget or lower data.max_tokens"
                return
            passed.packs[given.index] = pack
            passed.submitted_packs += 1
            passed.submitted_samples += len(pack.samples)
        self._grant()

    def acknowledge(self, rank: int, stage: str, epoch: int, indices: Iterable[int]) -> None:
        """The rank has copied these packs out.

        Raises:
            ProtocolError: a pack that was not announced to this rank.
        """
        passed = self._passes.get((stage, epoch))
        for index in indices:
            pack = passed.packs.get(index) if passed is not None else None
            if pack is None or pack.rank != rank or not pack.announced:
                raise ProtocolError(f"rank {rank} acknowledges pack {index} of {stage} epoch {epoch}, which it does not hold")
            self._end(pack)
        self._grant()

    def reissue(self, rank: int, stage: str, epoch: int, index: int, sample: int, key: str, reason: str) -> None:
        """A finished record was unreadable: another attempt, or give it up. A key that is not the current one is old news."""
        passed = self._passes.get((stage, epoch))
        pack = passed.packs.get(index) if passed is not None else None
        if pack is None or pack.rank != rank or pack.ended:
            return
        for found in pack.samples:
            if found.index == sample and found.record is not None and found.key == key:
                found.record = None
                pack.waiting += 1
                pack.announced = False
                self._again(found, f"record could not be read: {reason}", retry=True)

    def close_stage(self, rank: int, stage: str, epoch: int) -> None:
        """The rank takes no more packs of a pass. Idempotent."""
        passed = self._passes.get((stage, epoch))
        if passed is None or rank not in passed.ranks:
            return
        passed.ranks.discard(rank)
        passed.closed.add(rank)
        for pack in [p for p in passed.packs.values() if p.rank == rank]:
            self._end(pack)
        if not passed.ranks and len(passed.closed) == passed.world:
            del self._passes[stage, epoch]
        self._grant()

    # -- workers

    def join(self, worker: str, max_tokens: int) -> None:
        """A worker is ready."""
        self._workers[worker] = _Worker(max_tokens)

    def pull(self, worker: str, samples: int, tokens: int, now: float) -> list[Lease]:
        """Leases for a worker with room, in plan order, validation first. A sample larger than the room is given to a worker that holds nothing."""
        state = self._workers[worker]
        leases: list[Lease] = []
        for kind in ORDER:
            queue = self._queues[kind]
            while queue and len(leases) < samples:
                sample = queue[0]
                if sample.tokens > state.max_tokens:
                    queue.popleft()
                    self._again(sample, f"{sample.tokens} tokens are more than the engine takes ({state.max_tokens})", retry=False)
                    continue
                if sample.tokens > tokens and (leases or state.leases):
                    return leases
                if sample.attempt and leases:
                    return leases  # a sample that failed before travels alone
                queue.popleft()
                leases.append(self._lease(worker, state, sample, now))
                tokens -= sample.tokens
                if sample.attempt:
                    return leases
        return leases

    def finish(self, worker: str, lease: int, nbytes: int, rows: int) -> None:
        """A record is whole in the store. Results of leases that are no longer held are dropped and their key deleted."""
        state = self._workers[worker]
        sample = state.leases.pop(lease, None)
        state.deadlines.pop(lease, None)
        if sample is None:
            self._settle(state, lease)
            return
        sample.lease = None
        sample.record = RecordRef(sample.index, sample.key, nbytes, sample.tokens, rows)
        self._resolved(sample.pack)

    def fail(self, worker: str, lease: int, reason: str, *, retry: bool) -> None:
        """A lease produced nothing."""
        state = self._workers[worker]
        sample = state.leases.pop(lease, None)
        state.deadlines.pop(lease, None)
        if sample is None:
            self._settle(state, lease)
            return
        sample.lease = None
        self._again(sample, reason, retry=retry)

    def leave(self, worker: str, reason: str) -> None:
        """A worker is gone: what it held goes to others."""
        state = self._workers.pop(worker, None)
        if state is None:
            return
        for lease in list(state.dropped):
            self._settle(state, lease)
        for sample in sorted(state.leases.values(), key=lambda s: (s.pack.index, s.index), reverse=True):
            sample.lease = None
            self._again(sample, reason, retry=True)

    def overdue(self, now: float) -> dict[str, int]:
        """Workers with leases past their deadline, and how many."""
        late = {name: sum(deadline <= now for deadline in state.deadlines.values()) for name, state in self._workers.items()}
        return {name: count for name, count in late.items() if count}

    # -- the store

    def deleted(self, keys: Iterable[str]) -> None:
        """These keys are gone from the store: their credit may return."""
        for key in keys:
            pack = self._paying.pop(key, None)
            if pack is not None:
                pack.keys.discard(key)
                self._refund(pack)
        self._grant()

    # -- metrics

    def passes(self) -> list[tuple[str, int]]:
        """(stage, epoch) of the passes that are open for some rank."""
        return list(self._passes)

    def state(self) -> dict[str, Any]:
        """Counters of docs/design.md, "Group metrics"."""
        packs = [pack for passed in self._passes.values() for pack in passed.packs.values()]
        return {
            "budget": self.budget,
            "bytes_alive": self.bytes_alive,
            "queued": sum(len(pack.samples) for pack in packs if not pack.granted),
            "ready_for_work": sum(len(queue) for queue in self._queues.values()),
            "leased": sum(len(worker.leases) for worker in self._workers.values()),
            "finished": sum(sample.record is not None for pack in packs for sample in pack.samples if not pack.ended),
            "failed": self.failed,
        }

    @property
    def has_work(self) -> bool:
        """Whether a pull would be given something."""
        return any(self._queues.values())

    @property
    def waits_for_credit(self) -> bool:
        """Whether packs are submitted that the budget holds back."""
        return any(passed.next in passed.packs for passed in self._passes.values())

    def audit(self) -> None:
        """Check that credit equals what packs pay for. For tests."""
        packs = {id(p): p for passed in self._passes.values() for p in passed.packs.values() if p.granted}
        packs |= {id(p): p for p in self._paying.values()}
        assert self.bytes_alive == sum(p.nbytes for p in packs.values()), (self.bytes_alive, [(p.index, p.nbytes) for p in packs.values()])
        assert self.bytes_alive == sum(self._alive.values()) <= self.budget
        assert all(key in pack.keys for key, pack in self._paying.items())

    # -- inside

    def _pass(self, rank: int, stage: str, epoch: int) -> _Pass:
        passed = self._passes.get((stage, epoch))
        if passed is None or rank not in passed.ranks:
            raise ProtocolError(f"rank {rank} has not opened {stage} epoch {epoch}")
        return passed

    @staticmethod
    def _kind(stage: str) -> str:
        return ORDER[0] if stage.startswith(ORDER[0]) else ORDER[1]

    def _limit(self, stage: str) -> int:
        return self.budget if self._kind(stage) == ORDER[0] else self.budget - self.reserve

    def _grant(self) -> None:
        """Credit to packs, in order, while there is room."""
        for passed in sorted(self._passes.values(), key=lambda p: ORDER.index(self._kind(p.stage))):
            kind = self._kind(passed.stage)
            while passed.next < passed.end:
                pack = passed.packs.get(passed.next)
                if pack is None:
                    if passed.owner(passed.next) not in passed.closed:
                        break
                    passed.next += 1
                    continue
                if not self._fits(kind, pack.nbytes):
                    break
                passed.next += 1
                pack.granted = True
                self.bytes_alive += pack.nbytes
                self._alive[kind] += pack.nbytes
                self._queues[kind].extend(pack.samples)
                if not pack.waiting:
                    self._announce(pack)

    def _fits(self, kind: str, nbytes: int) -> bool:
        if kind == ORDER[0]:
            return self._alive[kind] + nbytes <= self.reserve or self.bytes_alive + nbytes <= self.budget
        beyond = max(self._alive[ORDER[0]] - self.reserve, 0)  # validation may borrow what training does not use
        return self._alive[kind] + nbytes + beyond <= self.budget - self.reserve

    def _lease(self, worker: str, state: _Worker, sample: _Sample, now: float) -> Lease:
        self._next_lease += 1
        passed = sample.pack.passed
        sample.lease = self._next_lease
        sample.key = f"{self.prefix}/{passed.stage}/{passed.epoch}/{sample.index}/{self._next_lease}"
        sample.pack.keys.add(sample.key)
        self._paying[sample.key] = sample.pack
        state.leases[sample.lease] = sample
        state.deadlines[sample.lease] = now + self.lease_timeout
        return Lease(sample.lease, sample.key, passed.stage, sample.index, sample.ids)

    def _again(self, sample: _Sample, reason: str, *, retry: bool) -> None:
        """Another attempt under a new key, or the end of the sample. Whatever the old key holds is deleted."""
        if sample.key:
            self.out.delete.append(sample.key)
            sample.key = ""
        sample.attempt += 1
        pack = sample.pack
        if retry and sample.attempt < self.max_attempts:
            self._queues[self._kind(pack.passed.stage)].appendleft(sample)
            return
        sample.failure = Failure(sample.index, reason, sample.attempt)
        self.failed += 1
        passed = pack.passed
        passed.failed += 1
        expected = passed.submitted_samples / max(passed.submitted_packs, 1) * (passed.end - passed.first)
        if passed.failed > max(self.max_failed_fraction * expected, 0.0) and passed.failed / max(expected, 1.0) > self.max_failed_fraction:
            self.out.stop = (
                f"{passed.failed} of about {expected:.0f} samples of {passed.stage} failed, more than data.engines.max_failed_fraction={self.max_failed_fraction}; "
                f"the last one, {sample.index}: {reason}"
            )
        self._resolved(pack)

    def _resolved(self, pack: _Pack) -> None:
        pack.waiting -= 1
        if not pack.waiting:
            self._announce(pack)

    def _announce(self, pack: _Pack) -> None:
        pack.announced = True
        records = [sample.record for sample in pack.samples if sample.record is not None]
        failed = [sample.failure for sample in pack.samples if sample.failure is not None]
        self.out.ready.append((pack.rank, PackReady(stage=pack.passed.stage, epoch=pack.passed.epoch, pack=pack.index, records=records, failed=failed)))

    def _end(self, pack: _Pack) -> None:
        """Nothing of the pack is wanted any more."""
        pack.passed.packs.pop(pack.index, None)
        pack.ended = True
        if not pack.granted:
            return
        leased = {sample.lease for sample in pack.samples if sample.lease is not None}
        if not pack.announced:
            queue = self._queues[self._kind(pack.passed.stage)]
            waiting = [sample for sample in queue if sample.pack is not pack]
            if len(waiting) != len(queue):
                queue.clear()
                queue.extend(waiting)
        if leased:
            for name, state in self._workers.items():
                for lease in leased & state.leases.keys():
                    sample = state.leases.pop(lease)
                    state.deadlines.pop(lease, None)
                    sample.lease = None
                    state.dropped[lease] = (sample.key, pack)
                    self.out.cancel.append((name, lease))
        kept = {key for state in self._workers.values() for key, owner in state.dropped.values() if owner is pack} if leased else set()
        self.out.delete.extend(sample.key for sample in pack.samples if sample.key and sample.key not in kept)
        self._refund(pack)

    def _settle(self, state: _Worker, lease: int) -> None:
        """A cancelled lease is over: delete what it may have written."""
        dropped = state.dropped.pop(lease, None)
        if dropped is not None:
            self.out.delete.append(dropped[0])

    def _refund(self, pack: _Pack) -> None:
        if pack.ended and pack.granted and not pack.keys:
            pack.granted = False
            self.bytes_alive -= pack.nbytes
            self._alive[self._kind(pack.passed.stage)] -= pack.nbytes
