"""The coordinator's rules under random orders of events: ranks, workers, failures, deaths, deadlines, deletions, several passes.

Messages take their time: each rank and each worker has a first-in-first-out channel to the ledger and one back, as sockets are, and hypothesis decides when
something is read. Whatever happens, every submitted sample reaches its rank exactly once (as a record or as a named failure), a record that a rank was told of
exists until the rank lets it go, bytes in the store never exceed the budget, the books agree after every event, and in the end nothing is left.

On-policy, training samples are prompts that workers answer, in one go with the record or apart from it, and all packs of an optimizer step are announced
with the same lengths of answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from torchspec.engines import audit
from torchspec.engines.ledger import Ledger
from torchspec.engines.messages import Damaged, Lease, Pack, PackReady, PartialAnswer, Sample

WORLD, PACKS, LARGEST, BUDGET, RESERVE, TIMEOUT = 2, 6, 12, 60, 24, 5.0
STAGES = ["train", "validate"]
Key = tuple[int, str]
KEYS: list[Key] = [(rank, stage) for stage in STAGES for rank in range(WORLD)]
OPENED = "opened"
NEW_TOKENS = 2
"""Of an answer, at most: two packs of prompts of one step fit into the training's share of the budget."""
RESULTS = ["good", "good", "good", "good twice", "bad", "final"]
ranks = st.sampled_from(KEYS)
picks = st.integers(0, 99)


@dataclass
class RankSide:
    """What one rank knows of one stage, and its two channels."""

    number: int = -1
    """Passes begun; two in a row have the same epoch."""
    submitted: int = 0
    opening: int = 0
    lengths: dict[int, list[int]] = field(default_factory=dict)
    ready: dict[int, PackReady] = field(default_factory=dict)
    delivered: list[int] = field(default_factory=list)
    up: deque[Callable[[], None]] = field(default_factory=deque)
    down: deque[PackReady | str] = field(default_factory=deque)

    @property
    def epoch(self) -> int:
        return self.number // 2

    @property
    def whole(self) -> bool:
        return len(self.delivered) == PACKS // WORLD


@dataclass
class WorkerSide:
    """What a worker holds, and its two channels."""

    answers: bool = False
    """It answers prompts and writes no records."""
    held: dict[int, Lease] = field(default_factory=dict)
    up: deque[Callable[[], None]] = field(default_factory=deque)
    down: deque[list[Lease] | int] = field(default_factory=deque)


class Delivery(RuleBasedStateMachine):
    """The world around a ledger: two ranks, up to three workers, a store that deletes late. One byte a token."""

    on_policy = False
    separate_answers = False

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(
            prefix="r/0",
            budget=BUDGET,
            reserve=RESERVE,
            nbytes=lambda tokens: tokens,
            max_attempts=3,
            max_failed_fraction=1.0,
            lease_timeout=TIMEOUT,
            separate_answers=self.separate_answers,
        )
        self.answers: dict[tuple[int, int], list[int]] = {}
        """Lengths that a step of a training pass was announced with, by number of the pass and of the step."""
        self.now = 0.0
        self.store: dict[str, int] = {}
        self.used: set[str] = set()
        self.deleting: list[str] = []
        self.ranks = {key: RankSide() for key in KEYS}
        self.workers: dict[str, WorkerSide] = {}
        self.joined = 0

    def settle(self) -> None:
        """What the coordinator's process does with the ledger's decisions."""
        out = self.ledger.out.take()
        assert out.stop is None
        for rank, message in out.ready:
            assert all(record.key in self.store for record in message.records), "a record was announced that is not in the store"
            self.ranks[rank, message.stage].down.append(message)
        for name, lease in out.cancel:
            self.workers[name].down.append(lease)
        self.deleting += out.delete

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        self.hire()
        for key in KEYS:
            self.open(key)
            self.submit_all(key, data)
        self.pump()

    # -- what happens: few rules that each do much, or random orders would seldom come far

    @rule(act=st.sampled_from(["take", "take", "reissue", "go on", "go on without a word", "lose the connection"]), key=ranks, pick=picks, data=st.data())
    def a_rank_acts(self, act: str, key: Key, pick: int, data: Any) -> None:
        match act:
            case "take":
                self.take(key, pick)
            case "reissue":
                self.reissue(key, pick, 1 + pick % 3)
            case "lose the connection":
                self.lose_the_connection(key)
            case _:
                self.next_pass(key, said=act == "go on")
        if pick % 4:
            self.submit_all(key, data)
        else:
            self.submit(key, data)

    @rule(pick=picks, samples=st.integers(1, 8), tokens=st.sampled_from([3, 20, 100]), results=st.lists(st.sampled_from(RESULTS), min_size=1, max_size=8))
    def a_worker_acts(self, pick: int, samples: int, tokens: int, results: list[str]) -> None:
        """It asks for work, and is done with some of what it has. (Sometimes it has not read yet what it was given.)"""
        for key in KEYS:
            self.ledger_reads_a_rank(key, pick % 3)
        self.pull(pick, samples, tokens)
        if samples != 1:
            self.worker_reads(pick, 100)
        for result in results:
            self.report(pick, good=result.startswith("good"), retry=result != "final", twice=result == "good twice")

    @rule(what=st.sampled_from(["everything", "everything", "from ranks", "to ranks", "from workers", "to workers"]), count=st.integers(1, 8))
    def messages_arrive(self, what: str, count: int) -> None:
        if what == "everything":
            self.pump()
        for key in KEYS:
            if what == "from ranks":
                self.ledger_reads_a_rank(key, count)
            elif what == "to ranks":
                self.rank_reads(key, count)
        for pick in range(len(self.workers)):
            if what == "from workers":
                self.ledger_reads_a_worker(pick, count)
            elif what == "to workers":
                self.worker_reads(pick, count)

    @rule(what=st.sampled_from(["a worker joins", "a small worker joins", "a worker dies", "time passes", "much time passes"]), pick=picks)
    def fate(self, what: str, pick: int) -> None:
        match what:
            case "a worker dies" if pick % 4 < 2 or len(self.workers) > 1:
                self.die(pick, wrote=bool(pick & 1), heard=bool(pick & 2), in_order=pick % 3 == 0)
            case "time passes" | "much time passes":
                self.time_passes(2.0 if what == "time passes" else TIMEOUT + 1, wrote=bool(pick & 1))
            case _ if len(self.workers) < 3:
                self.join(LARGEST + NEW_TOKENS if what == "a worker joins" else 2, answers=self.separate_answers and bool(pick % 2))

    @rule(count=st.sampled_from([1, 3, 100]))
    def the_store_deletes(self, count: int) -> None:
        self.delete(count)

    def open(self, key: Key) -> None:
        side = self.ranks[key]
        side.number += 1
        side.submitted, side.lengths, side.ready, side.delivered = 0, {}, {}, []
        side.opening += 1
        epoch = side.epoch

        def opened() -> None:
            step_packs = WORLD if self.on_policy and key[1] == "train" else 0
            self.ledger.open_stage(key[0], key[1], epoch, first_pack=0, num_packs=PACKS, world=WORLD, step_packs=step_packs)
            side.down.append(OPENED)

        side.up.append(opened)

    # -- the channels

    def ledger_reads_a_rank(self, key: Key, count: int) -> None:
        for _ in range(min(count, len(self.ranks[key].up))):
            self.ranks[key].up.popleft()()
            self.settle()

    def rank_reads(self, key: Key, count: int) -> None:
        side = self.ranks[key]
        for _ in range(min(count, len(side.down))):
            message = side.down.popleft()
            if isinstance(message, str):
                side.opening -= 1
            elif not side.opening:
                assert message.epoch == side.epoch
                assert message.pack not in side.ready and message.pack not in side.delivered, "a pack was announced twice"
                side.ready[message.pack] = message
                if self.on_policy and key[1] == "train":
                    assert message.answers is not None and len(message.answers) >= len(message.records)
                    assert message.answers == self.answers.setdefault((side.number, message.pack // WORLD), message.answers)

    def ledger_reads_a_worker(self, pick: int, count: int) -> None:
        if side := self.worker(pick):
            for _ in range(min(count, len(side.up))):
                side.up.popleft()()
                self.settle()

    def worker_reads(self, pick: int, count: int) -> None:
        if side := self.worker(pick):
            for _ in range(min(count, len(side.down))):
                message = side.down.popleft()
                if isinstance(message, list):
                    side.held |= {lease.id: lease for lease in message}
                elif message in side.held:  # cancelled before it began
                    del side.held[message]
                    self.tell_failure(side, message, retry=True)

    def worker(self, pick: int) -> WorkerSide | None:
        return self.workers[sorted(self.workers)[pick % len(self.workers)]] if self.workers else None

    # -- ranks

    def submit_all(self, key: Key, data: Any) -> None:
        for _ in range(PACKS):
            self.submit(key, data)

    def submit(self, key: Key, data: Any) -> None:
        side = self.ranks[key]
        if side.submitted < PACKS // WORLD:
            index, epoch = key[0] + WORLD * side.submitted, side.epoch
            side.lengths[index] = lengths = data.draw(st.just([4, 4, 4]) | st.lists(st.integers(1, LARGEST // 3), max_size=3))
            side.submitted += 1
            generate_from = PartialAnswer(NEW_TOKENS, seed=0) if self.on_policy and key[1] == "train" else None
            pack = Pack(index, [Sample(10 * index + i, b"\0" * 4 * n, generate_from) for i, n in enumerate(lengths)])
            side.up.append(lambda: self.ledger.submit(*key, epoch, [pack]))

    def take(self, key: Key, pick: int) -> None:
        side = self.ranks[key]
        if side.ready:
            index = sorted(side.ready)[pick % len(side.ready)]
            message, epoch = side.ready.pop(index), side.epoch
            expected = [10 * index + i for i in range(len(side.lengths[index]))]
            assert sorted([r.index for r in message.records] + [f.index for f in message.failed]) == expected
            assert all(record.key in self.store for record in message.records), "a record that is owed was deleted"
            side.delivered.append(index)
            side.up.append(lambda: self.ledger.acknowledge(*key, epoch, [index]))

    def reissue(self, key: Key, pick: int, how_many: int) -> None:
        side = self.ranks[key]
        if side.ready:
            index, epoch = sorted(side.ready)[pick % len(side.ready)], side.epoch
            if records := side.ready[index].records:
                del side.ready[index]
                damaged = [Damaged(record.index, record.key, "damaged") for record in records[:how_many]]
                side.up.append(lambda: self.ledger.reissue(*key, epoch, index, damaged))

    def next_pass(self, key: Key, said: bool) -> None:
        """A rank goes on, with or without having taken everything, and with or without closing first; never two passes ahead of the other."""
        side, epoch = self.ranks[key], self.ranks[key].epoch
        if side.number <= self.ranks[1 - key[0], key[1]].number:
            if said:
                side.up.append(lambda: self.ledger.close_stage(*key, epoch))
            self.open(key)

    def lose_the_connection(self, key: Key) -> None:
        """What is on its way is lost, and the rank begins its next pass on a new connection. (The same pass again is refused: see test_ledger.py.)"""
        side = self.ranks[key]
        if side.number <= self.ranks[1 - key[0], key[1]].number and not side.opening and (side.number + 1) // 2 != side.epoch:
            side.up.clear()
            side.down.clear()
            self.ledger.leave_stage(*key)
            self.settle()
            self.open(key)

    # -- workers

    def join(self, max_tokens: int, *, answers: bool = False) -> None:
        self.joined += 1
        self.workers[f"w{self.joined}"] = WorkerSide(answers)
        self.ledger.join(f"w{self.joined}", max_tokens, answers=answers)

    def hire(self) -> None:
        """A worker for each kind of work that nobody does."""
        for answers in (False, True)[: 1 + self.separate_answers]:
            if not any(side.answers == answers for side in self.workers.values()):
                self.join(LARGEST + NEW_TOKENS, answers=answers)

    def pull(self, pick: int, samples: int, tokens: int) -> None:
        if self.workers:
            name = sorted(self.workers)[pick % len(self.workers)]
            leases = self.ledger.pull(name, samples, tokens, self.now)
            assert len(leases) <= samples
            for lease in leases:
                if self.workers[name].answers:
                    assert not lease.key and lease.generate_from is not None
                    continue
                assert lease.key not in self.used, "a key was used twice"
                self.used.add(lease.key)
            self.workers[name].down.append(leases)
            self.settle()

    def report(self, pick: int, good: bool, retry: bool, twice: bool) -> None:
        side = self.worker(pick)
        if side is None or not side.held:
            return
        lease = side.held.pop(sorted(side.held)[pick % len(side.held)])
        if good:
            name = next(n for n, s in self.workers.items() if s is side)
            said = 0 if lease.generate_from is None else 1 + pick % NEW_TOKENS
            tokens = len(lease.ids) // 4 + said
            if not side.answers:
                self.store[lease.key] = tokens
            for _ in range(1 + twice):  # a late duplicate is harmless
                if side.answers:
                    side.up.append(lambda: self.ledger.answered(name, lease.id, lease.ids + b"\0" * 4 * said))
                else:
                    side.up.append(lambda: self.ledger.finish(name, lease.id, tokens, tokens - (said > 0)))
        else:
            self.tell_failure(side, lease.id, retry=retry)

    def tell_failure(self, side: WorkerSide, lease: int, *, retry: bool) -> None:
        name = next(n for n, s in self.workers.items() if s is side)
        side.up.append(lambda: self.ledger.fail(name, lease, "no luck", retry=retry))

    def die(self, pick: int, wrote: bool, heard: bool, in_order: bool = False) -> None:
        """With or without a last record written, with or without its last words arriving."""
        if self.workers:
            self.end(sorted(self.workers)[pick % len(self.workers)], wrote=wrote, heard=heard, in_order=in_order)

    def end(self, name: str, *, wrote: bool, heard: bool, in_order: bool = False) -> None:
        side = self.workers[name]
        while heard and side.up:
            side.up.popleft()()
            self.settle()
        del self.workers[name]
        on_their_way = [lease for message in side.down if isinstance(message, list) for lease in message]
        for lease in [*side.held.values(), *on_their_way]:
            if wrote and lease.key in self.ledger.leases.paying:
                self.store[lease.key] = len(lease.ids) // 4
        self.ledger.leave(name, "killed", in_order=in_order)
        self.settle()

    def time_passes(self, seconds: float, wrote: bool) -> None:
        """A worker that is silent past a deadline is killed."""
        self.now += seconds
        for name in self.ledger.overdue(self.now):
            self.end(name, wrote=wrote, heard=False)

    # -- the store

    def delete(self, count: int) -> None:
        keys, self.deleting = self.deleting[:count], self.deleting[count:]
        for key in keys:
            self.store.pop(key, None)
        self.ledger.deleted(keys)
        self.settle()

    @invariant()
    def books_agree(self) -> None:
        audit.audit(self.ledger)
        assert sum(self.store.values()) <= self.ledger.credit.alive <= BUDGET
        assert self.ledger.credit.of("train") <= BUDGET - RESERVE
        for pack in self.ledger.leases.paying.values():
            assert sum(self.store.get(key, 0) for key in pack.keys) <= pack.nbytes, "two attempts share one sample's credit"

    def teardown(self) -> None:
        """From wherever it stopped, a willing world brings everything to its end: nothing hangs, nothing is left."""
        if self.ranks[KEYS[0]].number < 0:
            return
        busy = True
        for _ in range(2000):
            self.pump()
            self.hire()
            for pick in range(len(self.workers)):
                self.pull(pick, 4, 20)
                self.worker_reads(pick, 100)
                self.report(pick, True, True, False)
            for key, side in self.ranks.items():
                while side.submitted < PACKS // WORLD:
                    self.submit(key, _Fixed())
                self.take(key, 0)
                if side.whole and side.number < self.ranks[1 - key[0], key[1]].number:
                    self.next_pass(key, True)
            self.books_agree()
            busy = not all(side.whole for side in self.ranks.values())
            if not busy:
                break
        assert not busy, (audit.state(self.ledger), self.ranks)
        self.pump()
        for rank, stage in KEYS:
            self.ledger.leave_stage(rank, stage)
        self.settle()
        for name in list(self.workers):
            self.end(name, wrote=False, heard=True)
        self.delete(10**6)
        leases = self.ledger.leases
        assert self.ledger.credit.alive == 0 and not self.store and not self.ledger.passes and not leases.paying and not leases.retrying

    def pump(self) -> None:
        """Everything that is on its way arrives."""
        self.delete(100)
        for key in KEYS:
            self.ledger_reads_a_rank(key, 100)
            self.rank_reads(key, 100)
        for pick in range(len(self.workers)):
            self.worker_reads(pick, 100)
            self.ledger_reads_a_worker(pick, 100)


class _Fixed:
    """Draws the smallest pack."""

    def draw(self, _: Any) -> list[int]:
        return [1]


class OnPolicy(Delivery):
    """A worker answers a prompt and writes its record in one go."""

    on_policy = True


class AnsweredApart(OnPolicy):
    """Some workers answer prompts, others capture the conversations."""

    separate_answers = True


SHORT = settings(max_examples=250, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=500, stateful_step_count=120, deadline=None, suppress_health_check=list(HealthCheck))


class TestDelivery(Delivery.TestCase):  # type: ignore[name-defined, misc]
    settings = SHORT


class TestOnPolicy(OnPolicy.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(SHORT, max_examples=120)


class TestAnsweredApart(AnsweredApart.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(SHORT, max_examples=120)


@pytest.mark.nightly
@pytest.mark.slow
class TestDeliveryAtLength(Delivery.TestCase):  # type: ignore[name-defined, misc]
    settings = LONG


@pytest.mark.nightly
@pytest.mark.slow
class TestAnsweredApartAtLength(AnsweredApart.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(LONG, max_examples=250)
