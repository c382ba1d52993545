"""The coordinator's rules under random orders of events: ranks, workers, failures, deaths, deletions, several passes.

Whatever happens, every submitted sample reaches its rank exactly once (as a record or as a named failure), a record that a rank was told of exists until
the rank lets it go, bytes in the store never exceed the budget, and in the end nothing is left.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from torchspec.engines.ledger import Ledger, Out
from torchspec.engines.messages import Lease, Pack, PackReady, Sample

WORLD, PACKS, LARGEST, BUDGET, RESERVE = 2, 6, 12, 60, 24


class Delivery(RuleBasedStateMachine):
    """The world around a ledger: two ranks, up to three workers, a store that deletes late. One byte a token."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(
            prefix="r/0", budget=BUDGET, reserve=RESERVE, nbytes=lambda tokens: tokens, max_attempts=3, max_failed_fraction=1.0, lease_timeout=5.0
        )
        self.now = 0.0
        self.store: dict[str, int] = {}
        self.used: set[str] = set()
        self.deleting: list[str] = []
        self.held: dict[str, dict[int, Lease]] = {}
        self.passes: dict[tuple[int, str], int] = {}
        """Passes begun; two in a row have the same epoch."""
        self.epoch: dict[tuple[int, str], int] = {}
        self.submitted: dict[tuple[int, str], int] = {}
        self.lengths: dict[tuple[str, int, int], list[int]] = {}
        self.ready: dict[tuple[int, str], dict[int, PackReady]] = {}
        self.delivered: dict[tuple[int, str], list[int]] = {}
        self.workers = 0

    # -- what the coordinator's process does with the ledger's decisions

    def settle(self) -> None:
        out, self.ledger.out = self.ledger.out, Out()
        assert out.stop is None
        for rank, message in out.ready:
            assert self.epoch[rank, message.stage] == message.epoch
            for record in message.records:
                assert record.key in self.store, "a record was announced that is not in the store"
            self.ready[rank, message.stage][message.pack] = message
        self.deleting += out.delete

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        for stage in ("train", "validate"):
            for rank in range(WORLD):
                self.open(rank, stage)

    def open(self, rank: int, stage: str) -> None:
        key = (rank, stage)
        self.passes[key] = self.passes.get(key, -1) + 1
        self.epoch[key] = self.passes[key] // 2
        self.submitted[key], self.ready[key], self.delivered[key] = 0, {}, []
        self.ledger.open_stage(rank, stage, self.epoch[key], first_pack=0, num_packs=PACKS, world=WORLD)
        self.settle()

    # -- ranks

    @rule(rank=st.integers(0, WORLD - 1), stage=st.sampled_from(["train", "validate"]), data=st.data())
    def submit(self, rank: int, stage: str, data: Any) -> None:
        key = (rank, stage)
        if self.submitted[key] >= PACKS // WORLD:
            return
        index = rank + WORLD * self.submitted[key]
        at = (stage, self.passes[key], index)
        if at not in self.lengths:
            self.lengths[at] = data.draw(st.lists(st.integers(1, LARGEST // 3), max_size=3))
        samples = [Sample(10 * index + i, b"\0" * 4 * n) for i, n in enumerate(self.lengths[at])]
        self.submitted[key] += 1
        self.ledger.submit(rank, stage, self.epoch[key], [Pack(index, samples)])
        self.settle()

    @rule(rank=st.integers(0, WORLD - 1), stage=st.sampled_from(["train", "validate"]), pick=st.integers(0, 99))
    def take(self, rank: int, stage: str, pick: int) -> None:
        key = (rank, stage)
        if self.ready[key]:
            index = sorted(self.ready[key])[pick % len(self.ready[key])]
            message = self.ready[key].pop(index)
            expected = [10 * index + i for i in range(len(self.lengths[stage, self.passes[key], index]))]
            assert sorted([r.index for r in message.records] + [f.index for f in message.failed]) == expected
            assert all(record.key in self.store for record in message.records), "a record that is owed was deleted"
            assert index not in self.delivered[key]
            self.delivered[key].append(index)
            self.ledger.acknowledge(rank, stage, self.epoch[key], [index])
            self.settle()

    @rule(rank=st.integers(0, WORLD - 1), stage=st.sampled_from(["train", "validate"]), pick=st.integers(0, 99))
    def reissue(self, rank: int, stage: str, pick: int) -> None:
        key = (rank, stage)
        if self.ready[key]:
            index = sorted(self.ready[key])[pick % len(self.ready[key])]
            if self.ready[key][index].records:
                record = self.ready[key].pop(index).records[pick % 2 - 1]
                self.ledger.reissue(rank, stage, self.epoch[key], index, record.index, record.key, "damaged")
                self.settle()

    @rule(rank=st.integers(0, WORLD - 1), stage=st.sampled_from(["train", "validate"]))
    def next_pass(self, rank: int, stage: str) -> None:
        """A rank goes on, with or without having taken everything; never two passes ahead of the other."""
        if self.passes[rank, stage] <= self.passes[1 - rank, stage]:
            self.ledger.close_stage(rank, stage, self.epoch[rank, stage])
            self.settle()
            self.open(rank, stage)

    # -- workers

    @precondition(lambda self: len(self.held) < 3)
    @rule(max_tokens=st.sampled_from([2, LARGEST]))
    def join(self, max_tokens: int) -> None:
        self.workers += 1
        self.held[f"w{self.workers}"] = {}
        self.ledger.join(f"w{self.workers}", max_tokens)

    @rule(pick=st.integers(0, 99), samples=st.integers(1, 4), tokens=st.integers(1, 20))
    def pull(self, pick: int, samples: int, tokens: int) -> None:
        if self.held:
            name = sorted(self.held)[pick % len(self.held)]
            leases = self.ledger.pull(name, samples, tokens, self.now)
            assert len(leases) <= samples
            for lease in leases:
                assert lease.key not in self.used, "a key was used twice"
                self.used.add(lease.key)
                self.held[name][lease.id] = lease
            self.settle()

    @rule(pick=st.integers(0, 99), good=st.booleans(), retry=st.booleans())
    def report(self, pick: int, good: bool, retry: bool) -> None:
        holding = sorted(name for name, leases in self.held.items() if leases)
        if holding:
            name = holding[pick % len(holding)]
            lease = self.held[name].pop(sorted(self.held[name])[pick % len(self.held[name])])
            tokens = len(lease.ids) // 4
            if good:
                self.store[lease.key] = tokens
                self.ledger.finish(name, lease.id, tokens, tokens)
            else:
                self.ledger.fail(name, lease.id, "no luck", retry=retry)
            self.settle()

    @rule(pick=st.integers(0, 99), wrote=st.booleans())
    def die(self, pick: int, wrote: bool) -> None:
        if self.held:
            name = sorted(self.held)[pick % len(self.held)]
            for lease in self.held.pop(name).values():
                if wrote:
                    self.store[lease.key] = len(lease.ids) // 4
            self.ledger.leave(name, "killed")
            self.settle()

    # -- the store

    @rule(count=st.integers(1, 8))
    def delete(self, count: int) -> None:
        keys, self.deleting = self.deleting[:count], self.deleting[count:]
        for key in keys:
            self.store.pop(key, None)
        self.ledger.deleted(keys)
        self.settle()

    @invariant()
    def books_agree(self) -> None:
        self.ledger.audit()
        assert sum(self.store.values()) <= self.ledger.credit.alive <= BUDGET
        training = self.ledger.credit._alive["train"]
        assert training <= BUDGET - RESERVE

    def teardown(self) -> None:
        """From wherever it stopped, a willing world brings everything to its end: nothing hangs, nothing is left."""
        if not self.epoch:
            return
        for _ in range(2000):
            self.delete(100)
            if not self.held:
                self.join(LARGEST)
            for pick in range(3):
                self.pull(pick, 4, 20)
                self.report(pick, True, True)
            busy = False
            for key in self.epoch:
                while self.submitted[key] < PACKS // WORLD:
                    self.submit(*key, _Fixed())
                self.take(*key, 0)
                if self.passes[key] < self.passes[1 - key[0], key[1]] and len(self.delivered[key]) == PACKS // WORLD:
                    self.next_pass(*key)
                busy = busy or len(self.delivered[key]) < PACKS // WORLD
            self.books_agree()
            if not busy:
                break
        assert not busy, (self.ledger.state(), self.epoch, self.delivered)
        for rank, stage in self.epoch:
            self.ledger.leave_stage(rank, stage)
        self.settle()
        for name in list(self.held):
            self.ledger.leave(name, "end")
        self.settle()
        self.delete(10**6)
        assert self.ledger.credit.alive == 0 and not self.store and not self.ledger._passes and not self.ledger._paying and not self.ledger._retrying


class _Fixed:
    """Draws the smallest pack."""

    def draw(self, _: Any) -> list[int]:
        return [1]


class TestDelivery(Delivery.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=200, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.slow
class TestDeliveryAtLength(Delivery.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=600, stateful_step_count=150, deadline=None, suppress_health_check=list(HealthCheck))
