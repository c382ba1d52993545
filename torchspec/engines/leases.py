"""The half of the ledger that faces the workers and the store: samples that have credit, from the queue to a finished record or the end of their attempts.

A *lease* is the right to write one record under one key, with a deadline. A sample is in exactly one place: a queue, a worker's hands, or waiting for
the deletion of what its last attempt may have left (two attempts never share one sample's credit). The ledger hears of two things: a sample is resolved, and a
key is gone whose pack has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from torchspec.engines.ledger_state import KINDS, Out, PackState, SampleState, WorkerState, kind_of
from torchspec.engines.messages import Failure, Lease, RecordRef


class Leases:
    """See the module.

    Args:
        out: shared with the ledger.
        prefix: first parts of every key.
        nbytes: bytes of a record of so many tokens, at most.
        max_attempts: tries at one sample.
        timeout: seconds for a lease.
        separate_answers: prompts are answered by workers that write no records.
        on_resolved: called with a sample that has a record or a failure now.
        on_gone: called with a pack of which a key was deleted.
    """

    def __init__(
        self,
        out: Out,
        *,
        prefix: str,
        nbytes: Callable[[int], int],
        max_attempts: int,
        timeout: float,
        separate_answers: bool,
        on_resolved: Callable[[SampleState], None],
        on_gone: Callable[[PackState], None],
    ) -> None:
        self._out = out
        self._prefix = prefix
        self._nbytes = nbytes
        self._max_attempts = max_attempts
        self._timeout = timeout
        self._separate_answers = separate_answers
        self._on_resolved = on_resolved
        self._on_gone = on_gone
        self._last = 0
        self.queues: dict[str, deque[SampleState]] = {kind: deque() for kind in KINDS}
        self.prompts: deque[SampleState] = deque()
        """For workers that only answer."""
        self.workers: dict[str, WorkerState] = {}
        self.paying: dict[str, PackState] = {}
        """Pack of each key that may exist."""
        self.retrying: dict[str, SampleState] = {}
        """Samples to be tried again when this key, of their failed attempt, is deleted."""

    @property
    def all_queues(self) -> tuple[deque[SampleState], ...]:
        """Samples that wait for a worker, by what they wait for."""
        return (self.prompts, *self.queues.values())

    def enqueue(self, pack: PackState) -> None:
        """The pack has credit: its samples may be produced."""
        for sample in pack.samples:
            self._queue_of(sample).append(sample)

    def _queue_of(self, sample: SampleState) -> deque[SampleState]:
        return self.prompts if self._separate_answers and sample.generate_from is not None else self.queues[kind_of(sample.pack.owner.stage)]

    def join(self, worker: str, max_tokens: int, *, answers: bool) -> None:
        """See :meth:`Ledger.join`."""
        assert worker not in self.workers
        self.workers[worker] = WorkerState(max_tokens, answers)

    def pull(self, worker: str, samples: int, tokens: int, now: float) -> list[Lease]:
        """See :meth:`Ledger.pull`."""
        state = self.workers[worker]
        leases: list[Lease] = []
        for queue in [self.prompts] if state.answers else self.queues.values():
            while queue and len(leases) < samples and state.alone not in state.leases:
                sample = queue[0]
                if sample.tokens > state.max_tokens:
                    queue.popleft()
                    self.again(sample, f"{sample.tokens} tokens are more than the engine takes ({state.max_tokens})", retry=False)
                    continue
                last = 0 < sample.attempt == self._max_attempts - 1
                if (last or sample.tokens > tokens) and state.leases:
                    return leases
                queue.popleft()
                leases.append(self._lease(state, sample, now))
                tokens -= sample.tokens
                if last:
                    state.alone = leases[-1].id
        return leases

    def finish(self, worker: str, lease: int, nbytes: int, rows: int) -> None:
        """See :meth:`Ledger.finish`."""
        sample = self._settle(worker, lease)
        if sample is None:
            return
        tokens = sample.tokens if sample.generate_from is None else rows + 1
        if not 0 < nbytes <= self._nbytes(tokens) or rows not in (tokens, tokens - 1) or not sample.prompt < tokens <= sample.tokens:
            self.again(sample, f"the engine wrote {nbytes} bytes and {rows} rows for {sample.tokens} tokens", retry=False)
            return
        sample.record = RecordRef(sample.index, sample.key, nbytes, tokens, rows)
        self._on_resolved(sample)

    def answered(self, worker: str, lease: int, ids: bytes) -> None:
        """See :meth:`Ledger.answered`."""
        sample = self._settle(worker, lease)
        if sample is None:
            return
        tokens, most = len(ids) // 4, sample.tokens
        if len(ids) % 4 or sample.ids != ids[: len(sample.ids)] or not sample.prompt < tokens <= most:
            self.again(sample, f"the engine answered {tokens} tokens to a prompt of {sample.prompt}, at most {most} were asked for", retry=False)
            return
        sample.ids, sample.generate_from = ids, None
        self._queue_of(sample).append(sample)

    def fail(self, worker: str, lease: int, reason: str, *, retry: bool) -> None:
        """See :meth:`Ledger.fail`."""
        sample = self._settle(worker, lease)
        if sample is not None:
            self.again(sample, reason, retry=retry)

    def leave(self, worker: str, reason: str, *, in_order: bool) -> list[str]:
        """See :meth:`Ledger.leave`."""
        state = self.workers.pop(worker, None)
        if state is None:
            return []
        cancelled = [key for key in state.cancelled.values() if key]
        keys = [*cancelled, *(sample.key for sample in state.leases.values() if sample.key)]
        self._out.delete.extend(cancelled)
        for sample in state.leases.values():
            sample.lease = None
            sample.attempt -= in_order  # counted in a moment
            self.again(sample, reason, retry=True)
        return keys

    def overdue(self, now: float) -> dict[str, int]:
        """See :meth:`Ledger.overdue`."""
        late = {name: sum(deadline <= now for deadline in state.deadlines.values()) for name, state in self.workers.items()}
        return {name: count for name, count in late.items() if count}

    def again(self, sample: SampleState, reason: str, *, retry: bool) -> None:
        """Another attempt under a new key, or the end of the sample. Whatever the old key holds is deleted first."""
        key, sample.key = sample.key, ""
        if key:
            self._out.delete.append(key)
        sample.attempt += 1
        if retry and sample.attempt < self._max_attempts:
            if key:
                self.retrying[key] = sample
            else:
                self._queue_of(sample).appendleft(sample)  # a prompt that was not answered left nothing behind
            return
        sample.failure = Failure(sample.index, reason, sample.attempt)
        self._on_resolved(sample)

    def drop(self, pack: PackState) -> None:
        """Nothing of a pack is wanted any more: take its samples out of queues and hands. Keys in the hands of workers stay until these have settled."""
        if pack.waiting:
            for queue in (self.prompts, self.queues[kind_of(pack.owner.stage)]):
                kept = [sample for sample in queue if sample.pack is not pack]
                queue.clear()
                queue.extend(kept)
            for name, state in self.workers.items():
                for lease in [lease for lease, sample in state.leases.items() if sample.pack is pack]:
                    sample = state.leases.pop(lease)
                    state.cancelled[lease] = sample.key
                    sample.key, sample.lease = "", None
                    self._out.cancel.append((name, lease))
        self._out.delete.extend(sample.key for sample in pack.samples if sample.key)

    def deleted(self, keys: Iterable[str]) -> None:
        """These keys are gone from the store."""
        again: list[SampleState] = []
        for key in keys:
            pack = self.paying.pop(key, None)
            if pack is not None:
                pack.keys.discard(key)
                self._on_gone(pack)
            sample = self.retrying.pop(key, None)
            if sample is not None and not sample.pack.ended:
                again.append(sample)
        for sample in reversed(again):  # in front of the others, in their old order
            self._queue_of(sample).appendleft(sample)

    def _lease(self, state: WorkerState, sample: SampleState, now: float) -> Lease:
        self._last += 1
        passed = sample.pack.owner
        sample.lease = number = self._last
        if not state.answers:
            # the lease's number is the attempt: no two attempts of a run share a key, not even over a pass that is opened again
            sample.key = key = f"{self._prefix}/{passed.stage}/{passed.epoch}/{sample.index}/{number}"
            sample.pack.keys.add(key)
            self.paying[key] = sample.pack
        state.leases[number] = sample
        state.deadlines[number] = now + self._timeout
        return Lease(number, sample.key, passed.stage, sample.index, sample.ids, sample.generate_from, sample.images)

    def _settle(self, worker: str, lease: int) -> SampleState | None:
        """The worker is done with a lease; its sample, unless it was cancelled (then what it may have written goes)."""
        state = self.workers[worker]
        state.deadlines.pop(lease, None)
        key = state.cancelled.pop(lease, None)
        if key:
            self._out.delete.append(key)
        sample = state.leases.pop(lease, None)
        if sample is not None:
            sample.lease = None
        return sample
