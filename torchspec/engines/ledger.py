"""The coordinator's rules as a state machine: no socket, no process, no clock of its own (time is an argument).

Life of a sample::

    submitted ─ credit for its whole pack ─► ready ─ pull ─► leased ─ finish ─► finished ─ all of its pack ─► PackReady ─ acknowledge ─► deleted
                                               ▲                │
                                               └── new attempt ─┘  fail, worker lost          after max_attempts: given up, named in PackReady

Credit is granted a pack at a time, in pack order over all ranks of a pass, and returns when the pack is acknowledged (or its pass
closed) *and* every key that it may have in the store is deleted. So bytes alive never exceed the budget, whatever workers do. What the
outside must do is left in ``out``: packs that are ready, keys to delete, leases to cancel, and the reason to stop. This half faces the ranks; ``leases.py``
faces workers and store; ``announcements.py`` says which packs are ready; ``audit.py`` counts and audits.

On-policy, samples are prompts: the worker that captures one answers it first, or (``separate_answers``) a worker that only answers holds the sample before one
that captures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torchspec.engines.announcements import announce_step, forget_step, whole
from torchspec.engines.leases import Leases
from torchspec.engines.ledger_state import KINDS, Credit, Out, PackState, PassState, SampleState, kind_of
from torchspec.engines.messages import Damaged, Lease, Pack


class ProtocolError(Exception):
    """A client broke the protocol; its connection is closed with this message."""


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
        self.nbytes = nbytes
        self.max_failed_fraction = max_failed_fraction
        self.credit = Credit(budget=budget, reserve=reserve)
        self.out = Out()
        self.failed = 0
        self.passes: list[PassState] = []
        """In the order of opening."""
        self._open: dict[tuple[int, str], PassState] = {}
        """The pass that a rank has open of a stage."""
        self.leases = Leases(
            self.out,
            prefix=prefix,
            nbytes=nbytes,
            max_attempts=max_attempts,
            timeout=lease_timeout,
            separate_answers=separate_answers,
            on_resolved=self._resolved,
            on_gone=self._refund,
        )

    # -- trainers

    def open_stage(self, rank: int, stage: str, epoch: int, *, first_pack: int, num_packs: int, world: int, step_packs: int = 0) -> None:
        """A rank takes part in a pass; its earlier pass of the stage ends. A rank may be a pass ahead of the others, also with the same epoch.

        Raises:
            ProtocolError: when the ranks disagree on the pass.
        """
        if not 0 <= rank < world or not 0 <= first_pack <= num_packs or step_packs < 0 or (step_packs and first_pack % step_packs):
            raise ProtocolError(f"rank {rank} opens packs {first_pack}..{num_packs} of {stage} in a world of {world}")
        self._close(rank, stage)
        known = [passed for passed in self.passes if passed.stage == stage and rank not in passed.closed]
        same = [passed for passed in known if passed.epoch == epoch]
        # one whose only ranks were lost gives way to the same pass begun anew
        found = next((passed for passed in same if passed.open or not passed.lost), same[0] if same else None)
        for passed in known[: None if found is None else known.index(found)]:
            self._left(passed, rank)  # another rank took part in it, this one went past it and will submit nothing
        for passed in self.passes if found is None else ():
            if rank in passed.lost and passed.open and (passed.stage, passed.epoch, passed.first, passed.end) == (stage, epoch, first_pack, num_packs):
                # a pass of its own would wait for the others, and they for it
                raise ProtocolError(f"rank {rank} was lost in {stage} epoch {epoch}, where other ranks go on without it: start all ranks anew")
        if found is None:
            found = PassState(stage, epoch, world, first_pack, num_packs, first_pack, step_packs=step_packs)
            self.passes.append(found)
        if (found.world, found.first, found.end, found.step_packs) != (world, first_pack, num_packs, step_packs):
            theirs = f"{found.first}..{found.end} of {found.world} ranks"
            raise ProtocolError(f"rank {rank} opens {stage} epoch {epoch} as packs {first_pack}..{num_packs} of {world} ranks, another rank as {theirs}")
        found.open.add(rank)
        self._open[rank, stage] = found
        self._grant()

    def submit(self, rank: int, stage: str, epoch: int, packs: Iterable[Pack]) -> None:
        """Packs of this rank, in plan order, each once.

        Raises:
            ProtocolError: a pass that is not open, a pack that is not this rank's or comes twice, or token ids that are none.
        """
        passed = self._of(rank, stage, epoch)
        if passed is None:
            raise ProtocolError(f"rank {rank} has not opened {stage} epoch {epoch}")
        kind = kind_of(stage)
        nbytes = self.nbytes
        for given in packs:
            if not passed.next <= given.index < passed.end or passed.rank_of(given.index) != rank or given.index in passed.packs:
                raise ProtocolError(f"rank {rank} submits pack {given.index} of {stage} epoch {epoch}, which is not its own or was submitted before")
            if any(not sample.ids or len(sample.ids) % 4 for sample in given.samples):
                raise ProtocolError(f"rank {rank} submits pack {given.index} of {stage} epoch {epoch} with a sample whose ids are no int32 numbers")
            pack = PackState(given.index, rank, passed)
            pack.samples = [
                SampleState(s.index, s.ids, pack, s.generate_from, len(s.ids) // 4 if s.generate_from is not None else 0, images=s.images)
                for s in given.samples
            ]
            pack.nbytes = sum([nbytes(sample.tokens) for sample in pack.samples])
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

    def reissue(self, rank: int, stage: str, epoch: int, index: int, damaged: Iterable[Damaged]) -> None:
        """Finished records of a pack were unreadable: another attempt at each, or give it up. A key that is not the current one is old news.

        All of them are taken back before any is tried again, so that the pack is not announced with one that is about to go.
        """
        passed = self._of(rank, stage, epoch)
        pack = passed.packs.get(index) if passed is not None else None
        if pack is None or pack.rank != rank:
            return
        wrong = {(bad.index, bad.key): bad.reason for bad in damaged}
        lost = [sample for sample in pack.samples if sample.record is not None and (sample.index, sample.key) in wrong]
        for sample in lost:
            sample.record = None
            pack.waiting += 1
            pack.announced = False
        for sample in lost:
            self.leases.again(sample, f"record could not be read: {wrong[sample.index, sample.key]}", retry=True)

    def close_stage(self, rank: int, stage: str, epoch: int) -> None:
        """The rank takes no more packs of a pass. Idempotent."""
        if self._of(rank, stage, epoch) is not None:
            self._close(rank, stage)
            self._grant()

    def leave_stage(self, rank: int, stage: str) -> None:
        """The rank's connection for a stage is gone, or another process has it: whatever pass it had open is closed."""
        passed = self._open.get((rank, stage))
        if passed is not None:
            passed.lost.add(rank)
        self._close(rank, stage)
        self._grant()

    # -- workers

    def join(self, worker: str, max_tokens: int, *, answers: bool = False) -> None:
        """A worker is ready; one that ``answers`` gets prompts and writes no records."""
        self.leases.join(worker, max_tokens, answers=answers)

    def pull(self, worker: str, samples: int, tokens: int, now: float) -> list[Lease]:
        """Leases for a worker with room, in plan order, validation first.

        A sample larger than the room is given to a worker that holds nothing. So is one on its last attempt, and then nothing beside
        it: one that kills engines would take its neighbours along in every attempt of theirs.
        """
        return self.leases.pull(worker, samples, tokens, now)

    def finish(self, worker: str, lease: int, nbytes: int, rows: int) -> None:
        """A record is whole in the store. Results of leases that are no longer held are dropped and their key deleted."""
        self.leases.finish(worker, lease, nbytes, rows)

    def answered(self, worker: str, lease: int, ids: bytes) -> None:
        """A prompt has its answer: another worker may capture the conversation."""
        self.leases.answered(worker, lease, ids)

    def fail(self, worker: str, lease: int, reason: str, *, retry: bool) -> None:
        """A lease produced nothing."""
        self.leases.fail(worker, lease, reason, retry=retry)

    def leave(self, worker: str, reason: str, *, in_order: bool = False) -> list[str]:
        """A worker is gone: what it held goes to others.

        Args:
            worker, reason: which, and why.
            in_order: it was told to end: that is no attempt at the samples that it held, which may have killed it otherwise.

        Returns:
            keys that it may have been writing. They are to be deleted already; where the worker may still live, once more later.
        """
        return self.leases.leave(worker, reason, in_order=in_order)

    def overdue(self, now: float) -> dict[str, int]:
        """Workers with leases past their deadline, and how many."""
        return self.leases.overdue(now)

    def deleted(self, keys: Iterable[str]) -> None:
        """These keys are gone from the store: their credit may return."""
        self.leases.deleted(keys)
        self._grant()

    @property
    def has_work(self) -> bool:
        """Whether a pull may be given something."""
        return any(self.leases.all_queues)

    @property
    def waits_for_credit(self) -> bool:
        """Whether packs are submitted that the budget holds back."""
        return any(passed.next in passed.packs for passed in self.passes)

    # -- inside

    def _of(self, rank: int, stage: str, epoch: int) -> PassState | None:
        passed = self._open.get((rank, stage))
        return passed if passed is not None and passed.epoch == epoch else None

    def _close(self, rank: int, stage: str) -> None:
        passed = self._open.pop((rank, stage), None)
        if passed is not None:
            passed.open.discard(rank)
            for pack in [p for p in passed.packs.values() if p.rank == rank]:
                self._end(pack)
            self._left(passed, rank)

    def _left(self, passed: PassState, rank: int) -> None:
        passed.closed.add(rank)
        for step in {passed.step_of(index) for index in passed.packs} if passed.step_packs else ():
            announce_step(self.out, passed, step)  # it waits for this rank no more
        if len(passed.closed) == passed.world:
            self.passes.remove(passed)

    def _grant(self) -> None:
        """Credit to packs, in order, while there is room. Of two passes of a kind the one opened later waits for the other's last pack."""
        for kind in KINDS:
            for passed in self.passes:
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
            self.leases.enqueue(pack)
            if not pack.waiting:
                whole(self.out, pack)

    def _resolved(self, sample: SampleState) -> None:
        """A sample has a record, or was given up."""
        pack = sample.pack
        if sample.failure is not None:
            passed = pack.owner
            self.failed += 1
            passed.failed += 1
            if passed.failed > self.max_failed_fraction * passed.expected_samples and self.out.stop is None:
                self.out.stop = (
                    f"{passed.failed} of about {passed.expected_samples:.0f} samples of {passed.stage} failed, "
                    f"more than data.engines.max_failed_fraction={self.max_failed_fraction}; the last one, sample {sample.index}: {sample.failure.reason}"
                )
        pack.waiting -= 1
        if not pack.waiting:
            whole(self.out, pack)

    def _end(self, pack: PackState) -> None:
        """Nothing of the pack is wanted any more."""
        del pack.owner.packs[pack.index]
        pack.ended = True
        forget_step(pack.owner, pack)
        if pack.granted:
            self.leases.drop(pack)
            self._refund(pack)

    def _refund(self, pack: PackState) -> None:
        if pack.ended and pack.granted and not pack.keys:
            pack.granted = False
            self.credit.give_back(kind_of(pack.owner.stage), pack.nbytes)
