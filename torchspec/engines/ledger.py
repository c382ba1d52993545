"""The coordinator's rules as a state machine: no socket, no process, no clock of its own (time is an argument).

Life of a sample::

    submitted ─ credit for its whole pack ─► ready ─ pull ─► leased ─ finish ─► finished ─ all of its pack ─► PackReady ─ acknowledge ─► deleted
                                               ▲                │
                                               └── new attempt ─┘  fail, worker lost          after max_attempts: given up, named in PackReady

On-policy, samples are prompts: the worker that captures one answers it first, or (``separate_answers``) a worker that only answers holds the sample before one
that captures. Packs of a step are then announced together, with the lengths of the step's answers.

Credit is granted a pack at a time, in pack order over all ranks of a pass, and returns when the pack is acknowledged (or its pass
closed) *and* every key that it may have in the store is deleted. So bytes alive never exceed the budget, whatever workers do. What the
outside must do is left in ``out``: packs that are ready, keys to delete, leases to cancel, and the reason to stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torchspec.engines.messages import Failure, Lease, Pack, PackReady, RecordRef
from torchspec.engines.passes import KINDS, Credit, PackState, PassState, SampleState, WorkerState, kind_of


class ProtocolError(Exception):
    """A client broke the protocol; its connection is closed with this message."""


@dataclass
class Out:
    """What to do outside; the caller empties it."""

    ready: list[tuple[int, PackReady]] = field(default_factory=list)
    """(rank, message)."""
    delete: list[str] = field(default_factory=list)
    """Keys; each is confirmed by :meth:`Ledger.deleted`."""
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
        separate_answers: prompts are answered by workers that write no records.
    """

    def __init__(
        self,
        *,
        prefix: str,
        budget: int,
        reserve: int,
        nbytes: Callable[[int], int],
        max_attempts: int,
        max_failed_fraction: float,
        lease_timeout: float,
        separate_answers: bool = False,
    ) -> None:
        self.prefix = prefix
        self.separate_answers = separate_answers
        self.nbytes = nbytes
        self.max_attempts = max_attempts
        self.max_failed_fraction = max_failed_fraction
        self.lease_timeout = lease_timeout
        self.credit = Credit(budget=budget, reserve=reserve)
        self.out = Out()
        self.failed = 0
        self._queues: dict[str, deque[SampleState]] = {kind: deque() for kind in KINDS}
        self._prompts: deque[SampleState] = deque()
        """For workers that only answer."""
        self._passes: list[PassState] = []
        """In the order of opening."""
        self._open: dict[tuple[int, str], PassState] = {}
        """The pass that a rank has open of a stage."""
        self._workers: dict[str, WorkerState] = {}
        self._paying: dict[str, PackState] = {}
        """Pack of each key that may exist."""
        self._retrying: dict[str, SampleState] = {}
        """Samples to be tried again when this key, of their failed attempt, is deleted: two attempts never share one sample's credit."""
        self._next_lease = 0

    # -- trainers

    def open_stage(self, rank: int, stage: str, epoch: int, *, first_pack: int, num_packs: int, world: int, step_packs: int = 0) -> None:
        """A rank takes part in a pass; its earlier pass of the stage ends. A rank may be a pass ahead of the others, also with the same epoch.

        Raises:
            ProtocolError: when the ranks disagree on the pass.
        """
        if not 0 <= rank < world or not 0 <= first_pack <= num_packs or step_packs < 0 or (step_packs and first_pack % step_packs):
            raise ProtocolError(f"rank {rank} opens packs {first_pack}..{num_packs} of {stage} in a world of {world}")
        self._close(rank, stage)
        unjoined = (p for p in self._passes if (p.stage, p.epoch) == (stage, epoch) and rank not in p.closed)
        found = next(unjoined, None)
        if found is None:
            found = PassState(stage, epoch, world, first_pack, num_packs, first_pack, step_packs=step_packs)
            self._passes.append(found)
        if (found.world, found.first, found.end, found.step_packs) != (world, first_pack, num_packs, step_packs):
            theirs = f"{found.first}..{found.end} of {found.world} ranks"
            raise ProtocolError(f"rank {rank} opens {stage} epoch {epoch} as packs {first_pack}..{num_packs} of {world} ranks, another rank as {theirs}")
        found.open.add(rank)
        self._open[rank, stage] = found
        self._grant()

    def submit(self, rank: int, stage: str, epoch: int, packs: Iterable[Pack]) -> None:
        """Packs of this rank, in plan order, each once.

        Raises:
            ProtocolError: a pass that is not open, or a pack that is not this rank's, or comes twice.
        """
        passed = self._of(rank, stage, epoch)
        if passed is None:
            raise ProtocolError(f"rank {rank} has not opened {stage} epoch {epoch}")
        kind = kind_of(stage)
        for given in packs:
            if not passed.next <= given.index < passed.end or passed.rank_of(given.index) != rank or given.index in passed.packs:
                raise ProtocolError(f"rank {rank} submits pack {given.index} of {stage} epoch {epoch}, which is not its own or was submitted before")
            pack = PackState(given.index, rank, passed)
            pack.samples = [SampleState(s.index, s.ids, pack, s.go_on, len(s.ids) // 4 if s.go_on is not None else 0) for s in given.samples]
            pack.nbytes = sum(self.nbytes(sample.tokens) for sample in pack.samples)
            pack.waiting = len(pack.samples)
            if pack.nbytes > self.credit.most(kind):
                self.out.stop = (
                    f"pack {given.index} of {stage} needs {pack.nbytes} bytes, the store's budget leaves {self.credit.most(kind)}; "
                    "raise data.store.budget or lower data.max_tokens"
                )
                return
            passed.packs[given.index] = pack
            passed.submitted_packs += 1
            passed.submitted_samples += len(pack.samples)
        self._grant()

    def acknowledge(self, rank: int, stage: str, epoch: int, indices: Iterable[int]) -> None:
        """The rank has copied these packs out. Those of a pass that it has closed are over already.

        Raises:
            ProtocolError: a pack that was not announced to this rank.
        """
        passed = self._of(rank, stage, epoch)
        if passed is None:
            return
        for index in indices:
            pack = passed.packs.get(index)
            if pack is None or pack.rank != rank or not pack.announced:
                raise ProtocolError(f"rank {rank} acknowledges pack {index} of {stage} epoch {epoch}, which it does not hold")
            self._end(pack)
        self._grant()

    def reissue(self, rank: int, stage: str, epoch: int, index: int, sample: int, key: str, reason: str) -> None:
        """A finished record was unreadable: another attempt, or give it up. A key that is not the current one is old news."""
        passed = self._of(rank, stage, epoch)
        pack = passed.packs.get(index) if passed is not None else None
        if pack is None or pack.rank != rank:
            return
        for found in pack.samples:
            if found.index == sample and found.record is not None and found.key == key:
                found.record = None
                pack.waiting += 1
                pack.announced = False
                self._again(found, f"record could not be read: {reason}", retry=True)

    def close_stage(self, rank: int, stage: str, epoch: int) -> None:
        """The rank takes no more packs of a pass. Idempotent."""
        if self._of(rank, stage, epoch) is not None:
            self._close(rank, stage)
            self._grant()

    def leave_stage(self, rank: int, stage: str) -> None:
        """The rank's connection for a stage is gone: whatever pass it had open is closed."""
        self._close(rank, stage)
        self._grant()

    # -- workers

    def join(self, worker: str, max_tokens: int, *, answers: bool = False) -> None:
        """A worker is ready; one that ``answers`` gets prompts and writes no records."""
        assert worker not in self._workers
        self._workers[worker] = WorkerState(max_tokens, answers)

    def pull(self, worker: str, samples: int, tokens: int, now: float) -> list[Lease]:
        """Leases for a worker with room, in plan order, validation first.

        A sample larger than the room is given to a worker that holds nothing. So is one on its last attempt, and then nothing beside
        it: one that kills engines would take its neighbours along in every attempt of theirs.
        """
        state = self._workers[worker]
        leases: list[Lease] = []
        for queue in [self._prompts] if state.answers else self._queues.values():
            while queue and len(leases) < samples and state.alone not in state.leases:
                sample = queue[0]
                if sample.tokens > state.max_tokens:
                    queue.popleft()
                    self._again(sample, f"{sample.tokens} tokens are more than the engine takes ({state.max_tokens})", retry=False)
                    continue
                last = 0 < sample.attempt == self.max_attempts - 1
                if (last or sample.tokens > tokens) and state.leases:
                    return leases
                queue.popleft()
                leases.append(self._lease(worker, sample, now))
                tokens -= sample.tokens
                if last:
                    state.alone = leases[-1].id
        return leases

    def finish(self, worker: str, lease: int, nbytes: int, rows: int) -> None:
        """A record is whole in the store. Results of leases that are no longer held are dropped and their key deleted."""
        sample = self._settle(worker, lease)
        if sample is None:
            return
        tokens = sample.tokens if sample.go_on is None else rows + 1
        if nbytes > self.nbytes(tokens) or rows not in (tokens, tokens - 1) or not sample.prompt < tokens <= sample.tokens:
            self._again(sample, f"the engine wrote {nbytes} bytes and {rows} rows for {sample.tokens} tokens", retry=False)
            return
        sample.record = RecordRef(sample.index, sample.key, nbytes, tokens, rows)
        self._resolved(sample.pack)

    def answered(self, worker: str, lease: int, ids: bytes) -> None:
        """A prompt has its answer: another worker may capture the conversation."""
        sample = self._settle(worker, lease)
        if sample is None:
            return
        if not sample.ids == ids[: len(sample.ids)] or not sample.prompt < len(ids) // 4 <= sample.tokens:
            self._again(
                sample, f"the engine answered {len(ids) // 4} tokens to a prompt of {sample.prompt}, at most {sample.tokens} were asked for", retry=False
            )
            return
        sample.ids, sample.go_on = ids, None
        self._queue(sample)

    def fail(self, worker: str, lease: int, reason: str, *, retry: bool) -> None:
        """A lease produced nothing."""
        sample = self._settle(worker, lease)
        if sample is not None:
            self._again(sample, reason, retry=retry)

    def leave(self, worker: str, reason: str) -> list[str]:
        """A worker is gone: what it held goes to others.

        Returns:
            keys that it may have been writing. They are to be deleted already; where the worker may still live, once more later.
        """
        state = self._workers.pop(worker, None)
        if state is None:
            return []
        cancelled = [key for key in state.cancelled.values() if key]
        keys = [*cancelled, *(sample.key for sample in state.leases.values() if sample.key)]
        self.out.delete.extend(cancelled)
        for sample in state.leases.values():
            sample.lease = None
            self._again(sample, reason, retry=True)
        return keys

    def overdue(self, now: float) -> dict[str, int]:
        """Workers with leases past their deadline, and how many."""
        late = {name: sum(deadline <= now for deadline in state.deadlines.values()) for name, state in self._workers.items()}
        return {name: count for name, count in late.items() if count}

    # -- the store

    def deleted(self, keys: Iterable[str]) -> None:
        """These keys are gone from the store: their credit may return."""
        again: list[SampleState] = []
        for key in keys:
            pack = self._paying.pop(key, None)
            if pack is not None:
                pack.keys.discard(key)
                self._refund(pack)
            sample = self._retrying.pop(key, None)
            if sample is not None and not sample.pack.ended:
                again.append(sample)
        for sample in reversed(again):  # in front of the others, in their old order
            self._queue(sample, first=True)
        self._grant()

    # -- what is known

    @property
    def has_work(self) -> bool:
        """Whether a pull may be given something."""
        return bool(self._prompts) or any(self._queues.values())

    @property
    def waits_for_credit(self) -> bool:
        """Whether packs are submitted that the budget holds back."""
        return any(passed.next in passed.packs for passed in self._passes)

    def state(self) -> dict[str, Any]:
        """Counters of docs/design.md, "Group metrics"."""
        packs = [pack for passed in self._passes for pack in passed.packs.values()]
        return {
            "budget": self.credit.budget,
            "bytes_alive": self.credit.alive,
            "queued": sum(len(pack.samples) for pack in packs if not pack.granted),
            "ready_for_work": len(self._prompts) + sum(len(queue) for queue in self._queues.values()) + len(self._retrying),
            "leased": sum(len(worker.leases) for worker in self._workers.values()),
            "finished": sum(sample.record is not None for pack in packs for sample in pack.samples),
            "failed": self.failed,
        }

    def audit(self) -> None:
        """Assert that credit equals what living packs hold, and that no key, lease or sample is lost between the books. For tests."""
        living = {id(p): p for passed in self._passes for p in passed.packs.values() if p.granted}
        living |= {id(p): p for p in self._paying.values()}
        assert self.credit.alive == sum(p.nbytes for p in living.values()) <= self.credit.budget
        assert all(key in pack.keys for key, pack in self._paying.items())
        assert all(self._paying[key] is pack for pack in living.values() for key in pack.keys)
        queued = [id(sample) for queue in (self._prompts, *self._queues.values()) for sample in queue]
        leased = [id(sample) for worker in self._workers.values() for sample in worker.leases.values()]
        retrying = [id(sample) for sample in self._retrying.values() if not sample.pack.ended]
        expected = [id(s) for p in living.values() if not p.ended for s in p.samples if s.record is None and s.failure is None]
        assert sorted(queued + leased + retrying) == sorted(expected)
        assert all(state.deadlines.keys() == state.leases.keys() | state.cancelled.keys() for state in self._workers.values())

    # -- inside

    def _of(self, rank: int, stage: str, epoch: int) -> PassState | None:
        passed = self._open.get((rank, stage))
        return passed if passed is not None and passed.epoch == epoch else None

    def _close(self, rank: int, stage: str) -> None:
        passed = self._open.pop((rank, stage), None)
        if passed is None:
            return
        passed.open.discard(rank)
        passed.closed.add(rank)
        mine = [p for p in passed.packs.values() if p.rank == rank]
        for pack in mine:
            self._end(pack)
        for step in {passed.step_of(pack.index) for pack in mine} if passed.step_packs else ():
            self._announce_step(passed, step)
        if len(passed.closed) == passed.world:
            self._passes.remove(passed)

    def _grant(self) -> None:
        """Credit to packs, in order, while there is room. Of two passes of a kind the one opened later waits for the other's last pack."""
        for kind in KINDS:
            for passed in self._passes:
                if kind_of(passed.stage) == kind:
                    self._grant_in(passed, kind)
                    if passed.next < passed.end:
                        break

    def _grant_in(self, passed: PassState, kind: str) -> None:
        while passed.next < passed.end:
            pack = passed.packs.get(passed.next)
            if pack is None:
                if passed.rank_of(passed.next) not in passed.closed:
                    return
                passed.next += 1
                continue
            if not self.credit.fits(kind, pack.nbytes):
                return
            passed.next += 1
            pack.granted = True
            self.credit.take(kind, pack.nbytes)
            for sample in pack.samples:
                self._queue(sample)
            if not pack.waiting:
                self._whole(pack)

    def _queue(self, sample: SampleState, *, first: bool = False) -> None:
        """Let workers have it."""
        queue = self._prompts if self.separate_answers and sample.go_on is not None else self._queues[kind_of(sample.pack.owner.stage)]
        if first:
            queue.appendleft(sample)
        else:
            queue.append(sample)

    def _lease(self, worker: str, sample: SampleState, now: float) -> Lease:
        state = self._workers[worker]
        self._next_lease += 1
        passed = sample.pack.owner
        sample.lease = self._next_lease
        if not state.answers:
            # the lease's number is the attempt: no two attempts of a run share a key, not even over a pass that is opened again
            sample.key = f"{self.prefix}/{passed.stage}/{passed.epoch}/{sample.index}/{sample.lease}"
            sample.pack.keys.add(sample.key)
            self._paying[sample.key] = sample.pack
        state.leases[sample.lease] = sample
        state.deadlines[sample.lease] = now + self.lease_timeout
        return Lease(sample.lease, sample.key, passed.stage, sample.index, sample.ids, sample.go_on)

    def _settle(self, worker: str, lease: int) -> SampleState | None:
        """The worker is done with a lease; its sample, unless it was cancelled (then what it may have written goes)."""
        state = self._workers[worker]
        state.deadlines.pop(lease, None)
        key = state.cancelled.pop(lease, None)
        if key:
            self.out.delete.append(key)
        sample = state.leases.pop(lease, None)
        if sample is not None:
            sample.lease = None
        return sample

    def _again(self, sample: SampleState, reason: str, *, retry: bool) -> None:
        """Another attempt under a new key, or the end of the sample. Whatever the old key holds is deleted first."""
        key, sample.key = sample.key, ""
        if key:
            self.out.delete.append(key)
        sample.attempt += 1
        pack, passed = sample.pack, sample.pack.owner
        if retry and sample.attempt < self.max_attempts:
            if key:
                self._retrying[key] = sample
            else:
                self._queue(sample, first=True)
            return
        sample.failure = Failure(sample.index, reason, sample.attempt)
        self.failed += 1
        passed.failed += 1
        if passed.failed > self.max_failed_fraction * passed.expected_samples and self.out.stop is None:
            self.out.stop = (
                f"{passed.failed} of about {passed.expected_samples:.0f} samples of {passed.stage} failed, "
                f"more than data.engines.max_failed_fraction={self.max_failed_fraction}; the last one, sample {sample.index}: {reason}"
            )
        self._resolved(pack)

    def _resolved(self, pack: PackState) -> None:
        pack.waiting -= 1
        if not pack.waiting:
            self._whole(pack)

    def _whole(self, pack: PackState) -> None:
        """Nothing of a pack is waited for."""
        if pack.owner.step_packs:
            self._announce_step(pack.owner, pack.owner.step_of(pack.index))
        else:
            self._announce(pack)

    def _announce_step(self, passed: PassState, step: int) -> None:
        """Announce the packs of an optimizer step when all of them are whole. A pack that was produced again later is announced with the lengths of the first
        time, which the step's other packs were trained with."""
        first = step * passed.step_packs
        indices = [i for i in range(first, min(first + passed.step_packs, passed.end)) if passed.rank_of(i) not in passed.closed]
        packs = [pack for i in indices if (pack := passed.packs.get(i)) is not None]
        if not packs:
            return
        if step not in passed.answers:
            if len(packs) < len(indices) or not all(pack.granted and not pack.waiting for pack in packs):
                return
            passed.answers[step] = [s.record.tokens - s.prompt for pack in packs for s in pack.samples if s.record is not None]
        for pack in packs:
            if pack.granted and not pack.waiting and not pack.announced:
                self._announce(pack, passed.answers[step])

    def _announce(self, pack: PackState, answers: list[int] | None = None) -> None:
        pack.announced = True
        records = [sample.record for sample in pack.samples if sample.record is not None]
        failed = [sample.failure for sample in pack.samples if sample.failure is not None]
        stage, epoch = pack.owner.stage, pack.owner.epoch
        self.out.ready.append((pack.rank, PackReady(stage=stage, epoch=epoch, pack=pack.index, records=records, failed=failed, answers=answers)))

    def _end(self, pack: PackState) -> None:
        """Nothing of the pack is wanted any more."""
        passed = pack.owner
        del passed.packs[pack.index]
        pack.ended = True
        if passed.step_packs and not any(passed.step_of(i) == passed.step_of(pack.index) for i in passed.packs):
            passed.answers.pop(passed.step_of(pack.index), None)
        if not pack.granted:
            return
        if pack.waiting:
            for queue in (self._prompts, self._queues[kind_of(passed.stage)]):
                kept = [sample for sample in queue if sample.pack is not pack]
                queue.clear()
                queue.extend(kept)
            for name, state in self._workers.items():
                for lease in [lease for lease, sample in state.leases.items() if sample.pack is pack]:
                    sample = state.leases.pop(lease)
                    state.cancelled[lease] = sample.key
                    sample.key, sample.lease = "", None
                    self.out.cancel.append((name, lease))
        self.out.delete.extend(sample.key for sample in pack.samples if sample.key)
        self._refund(pack)

    def _refund(self, pack: PackState) -> None:
        if pack.ended and pack.granted and not pack.keys:
            pack.granted = False
            self.credit.give_back(kind_of(pack.owner.stage), pack.nbytes)
