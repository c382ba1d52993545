"""One rank's loader over a real store, with a coordinator that misbehaves on demand."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from torchspec.agreement import Vote
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.loader import LoaderConfig, PackLoader, Pass
from torchspec.data.plan import Plan
from torchspec.data.prepare import DataOptions, prepare
from torchspec.engines.messages import Damaged, Failure, Pack, PackReady, RecordRef
from torchspec.errors import GroupStopped
from torchspec.supervision import Unroll
from torchspec.transfer import StoreConfig, StoreError, make_server, open_store
from torchspec.transfer.record import RecordSpec, seal, views
from torchspec.transfer.shm import ShmStore

SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(1, 3), hidden_size=8, dtype="float32")
STEPS = 2


class Lost(Exception):
    """The connection ended."""


class Coordinator:
    """Answers every submission at once with records of known content; ``fault`` may change an answer."""

    def __init__(self, address: dict[str, Any]) -> None:
        self.welcome = types.SimpleNamespace(store=address)
        self.store = open_store(address)
        self.opened: list[tuple[Any, ...]] = []
        self.submitted: list[int] = []
        self.acknowledged: list[int] = []
        self.closed: list[tuple[str, int]] = []
        self.reissued: list[tuple[int, str]] = []
        self.ready: list[PackReady] = []
        self.alive: dict[str, int] = {}
        self.most_alive = 0
        self.fault: Callable[[PackReady], PackReady | None] = lambda ready: ready
        self.hold = threading.Event()
        self.lost = False
        self.connections = 0

    def connect(self, name: str) -> Any:
        self.connections += 1
        self.lost = False
        return self

    def open_stage(self, stage: str, epoch: int, *, first_pack: int, num_packs: int, rank: int, world: int, step_packs: int = 0) -> None:
        self.opened.append((stage, epoch, first_pack, num_packs, rank, world, step_packs))
        self.ready.clear()

    def submit(self, stage: str, epoch: int, packs: list[Pack]) -> None:
        for pack in packs:
            self.submitted.append(pack.index)
            refs = [self.write(f"{stage}/{epoch}/{s.index}/0", s.index, np.frombuffer(s.ids, dtype="<i4")) for s in pack.samples]
            answer = self.fault(PackReady(stage=stage, epoch=epoch, pack=pack.index, records=refs, failed=[]))
            if answer is not None:
                self.ready.append(answer)
            self.most_alive = max(self.most_alive, sum(self.alive.values()))

    def write(self, key: str, index: int, ids: np.ndarray, spec: RecordSpec = SPEC) -> RecordRef:
        tokens = ids.shape[0]
        buffer = self.store.buffer(spec.nbytes(tokens))
        view_ids, aux, last = views(buffer, spec, tokens, tokens)
        view_ids.copy_(torch.from_numpy(ids.copy()))
        aux.fill_(index + 0.5)
        last.fill_(-index)
        whole = seal(buffer, spec, tokens, tokens, producer="test")
        self.store.put([key], [whole])
        self.alive[key] = whole.numel()
        return RecordRef(index, key, whole.numel(), tokens, tokens)

    def poll(self, timeout: float) -> PackReady | None:
        if self.lost:
            raise Lost("the coordinator is gone")
        if self.hold.is_set() or not self.ready:
            time.sleep(0.01)
            return None
        return self.ready.pop()  # the newest first: out of order

    def acknowledge(self, stage: str, epoch: int, packs: list[int]) -> None:
        self.acknowledged += packs
        for key in [k for k in self.alive if int(k.split("/")[2]) in self.samples_of(packs)]:
            self.store.delete([key])
            del self.alive[key]

    samples_of: Callable[[list[int]], set[int]]

    def reissue(self, stage: str, epoch: int, pack: int, damaged: list[Damaged]) -> None:
        for bad in damaged:
            self.reissued.append((bad.index, bad.reason))
            self.on_reissue(stage, epoch, pack, bad.index, bad.key)

    on_reissue: Callable[..., None]

    def close_stage(self, stage: str, epoch: int) -> None:
        self.closed.append((stage, epoch))

    def close(self) -> None:
        self.lost = True


class World:
    """A data set, its plan, a store and a coordinator."""

    def __init__(self, folder: Path, address: dict[str, Any]) -> None:
        generator = np.random.default_rng(0)
        rows = [{"input_ids": generator.integers(0, 99, n).tolist(), "loss_mask": [0, 0] + [1] * (n - 2)} for n in generator.integers(5, 40, 60)]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.dataset: TokenizedDataset = prepare(
            str(folder / "a.jsonl"), options=DataOptions(max_length=64), tokenizer=None, vocab_size=100, cache_dir=folder / "cache", target_name="t"
        )
        self.plan = Plan(self.dataset.lengths, seed=0, epoch=0, max_tokens=80, packs_per_step=4, counts=self.dataset.measured(Unroll(STEPS))[0])
        self.coordinator = Coordinator(address)
        self.coordinator.samples_of = lambda packs: {int(i) for p in packs for i in self.plan.pack(p)}
        self.failed = folder / "run" / "failed_samples.jsonl"
        self.healthy = True
        self.sigterm = False
        self.loaders: list[PackLoader] = []

    def health(self) -> None:
        if not self.healthy:
            raise RuntimeError("the group's last words")

    def loader(self, *, rank: int = 0, world: int = 1, first: int = 0, end: int | None = None, **changes: Any) -> PackLoader:
        config = {
            "stage": "train",
            "rank": rank,
            "world": world,
            "dataset": self.dataset,
            "spec": SPEC,
            "supervision": Unroll(STEPS),
            "window_bytes": 1 << 20,
            "prefetch_packs": 3,
            "failed_path": self.failed,
            "pin": False,
            "health": self.health,
            "interrupted": lambda: self.sigterm,
            **changes,
        }
        what = Pass(self.plan, 7, first, len(self.plan) if end is None else end)
        loader = PackLoader(LoaderConfig(**config), connect=self.coordinator.connect, begin=lambda: what, length=lambda: len(self.plan) // world)
        self.loaders.append(loader)
        return loader


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    server = make_server(StoreConfig(kind="shm", budget="8MiB"), run=f"test-loader-{time.monotonic_ns()}", budget=8 << 20)
    server.start()
    made = World(tmp_path, server.address)
    yield made
    for loader in made.loaders:
        loader.close()
    made.coordinator.store.close()
    server.close()


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.endswith("-loader")]


def test_a_rank_gets_its_packs_in_plan_order_with_the_right_states(world: World) -> None:
    for rank in (0, 1):
        loader = world.loader(rank=rank, world=2, first=4)
        batches = list(loader)
        assert len(loader) == len(world.plan) // 2  # the whole epoch, though the pass began in its middle
        assert [b.pack_index for b in batches] == list(range(4 + rank, len(world.plan), 2))
        for batch in batches:
            samples = world.plan.pack(batch.pack_index).tolist()
            assert list(batch.sample_ids) == samples and batch.stage == "train"
            expected = np.concatenate([world.dataset.ids(i) for i in samples]) if samples else np.zeros(0)
            assert batch.input_ids.tolist() == expected.tolist()
            lengths = [len(world.dataset.ids(i)) for i in samples]
            assert (
                batch.aux[:, 0].tolist() == np.repeat(np.array(samples) + 0.5, lengths).tolist()
                and batch.last[:, 0].tolist() == np.repeat(-np.array(samples), lengths).tolist()
            )
            assert batch.counts.tolist() == world.plan.step_counts(batch.pack_index // 4).tolist()
        loader.close()
    assert world.coordinator.opened == [("train", 7, 4, len(world.plan), 0, 2, 0), ("train", 7, 4, len(world.plan), 1, 2, 0)]
    assert sorted(world.coordinator.acknowledged) == list(range(4, len(world.plan))) and not world.coordinator.alive
    assert world.coordinator.closed == [("train", 7)] * 2 and not threads()


def test_a_busy_thread_of_the_trainer_gives_the_interpreter_up_quickly(world: World) -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        next(iter(world.loader()))
        assert sys.getswitchinterval() <= 2.1e-4
    finally:
        sys.setswitchinterval(before)


def test_what_is_submitted_stays_inside_the_window(world: World) -> None:
    largest = max(int(world.plan.sums(np.array([SPEC.nbytes(int(n)) for n in world.dataset.lengths]))[i]) for i in range(len(world.plan)))
    stream = iter(world.loader(window_bytes=3 * largest, prefetch_packs=1))
    for _ in range(5):
        next(stream)
    assert world.coordinator.most_alive <= 3 * largest
    assert len(world.coordinator.submitted) < len(world.plan)


def test_finished_batches_in_memory_are_bounded(world: World) -> None:
    loader = world.loader(prefetch_packs=2)
    stream = iter(loader)
    next(stream)
    deadline = time.monotonic() + 5
    while loader.stats.packs < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert loader.stats.packs == 4  # one taken, two waiting, one in hand
    assert len(world.coordinator.acknowledged) == 4


def test_damaged_missing_and_foreign_records_are_made_again(world: World) -> None:
    pack = next(p for p in range(len(world.plan)) if len(world.plan.pack(p)) >= 4)
    coordinator = world.coordinator
    first, second, third, fourth = (int(i) for i in world.plan.pack(pack)[:4])
    damage: dict[int, Callable[[RecordRef], None]] = {
        first: lambda ref: coordinator.store.delete([ref.key]),
        second: lambda ref: rewrite(ref, lambda data: data[3000:3001].add_(1)),
        third: lambda ref: rewrite(ref, lambda data: data[:8].zero_()),
    }

    def rewrite(ref: RecordRef, change: Callable[[torch.Tensor], Any]) -> None:
        data = torch.empty(ref.nbytes, dtype=torch.uint8)
        coordinator.store.get([ref.key], [data])
        change(data)
        coordinator.store.delete([ref.key])
        coordinator.store.put([ref.key], [data])

    good: dict[int, PackReady] = {}

    def fault(ready: PackReady) -> PackReady:
        if ready.pack == pack:
            good[pack] = ready
            refs = {ref.index: ref for ref in ready.records}
            for index, harm in damage.items():
                harm(refs[index])
            # the record of another sample under this one's key
            other = next(i for i in range(60) if len(world.dataset.ids(i)) <= len(world.dataset.ids(fourth)) and i != fourth)
            coordinator.store.delete([refs[fourth].key])
            coordinator.write(refs[fourth].key, other, np.asarray(world.dataset.ids(other)))
        return ready

    waiting: set[int] = set()

    def on_reissue(stage: str, epoch: int, number: int, index: int, key: str) -> None:
        waiting.add(index)
        if waiting == {first, second, third, fourth}:
            refs = [
                coordinator.write(f"{stage}/{epoch}/{i}/1", i, np.asarray(world.dataset.ids(i))) if i in waiting else ref
                for ref in good[number].records
                for i in [ref.index]
            ]
            coordinator.ready.append(PackReady(stage=stage, epoch=epoch, pack=number, records=refs, failed=[]))

    coordinator.fault, coordinator.on_reissue = fault, on_reissue
    loader = world.loader()
    batches = list(loader)
    assert [b.pack_index for b in batches] == list(range(len(world.plan)))
    assert sorted(i for b in batches for i in b.sample_ids) == list(range(60))
    reasons = dict(coordinator.reissued)
    assert reasons.keys() == {first, second, third, fourth} and loader.stats.reissued == 4
    assert "missing" in reasons[first] and "checksum" in reasons[second] and "magic" in reasons[third] and "another sample" in reasons[fourth]


def test_a_record_with_nan_is_not_kept_on_disk_and_is_named(world: World) -> None:
    """What is kept would be trained from again and again."""
    coordinator = world.coordinator
    bad = int(world.plan.pack(0)[0])
    first: list[PackReady] = []

    def fault(ready: PackReady) -> PackReady:
        if ready.pack == 0 and not first:
            first.append(ready)
            ref = next(ref for ref in ready.records if ref.index == bad)
            data = torch.zeros(ref.nbytes, dtype=torch.uint8)
            coordinator.store.get([ref.key], [data])
            aux = views(data, SPEC, ref.tokens, ref.rows)[1]
            aux[0, 0] = float("nan")
            coordinator.store.delete([ref.key])
            coordinator.store.put([ref.key], [seal(data, SPEC, ref.tokens, ref.rows, producer="test")])
        return ready

    def on_reissue(stage: str, epoch: int, number: int, index: int, key: str) -> None:
        lost = Failure(index=index, reason=coordinator.reissued[-1][1], attempts=1)
        coordinator.ready.append(PackReady(stage=stage, epoch=epoch, pack=number, records=[r for r in first[0].records if r.index != index], failed=[lost]))

    coordinator.fault, coordinator.on_reissue = fault, on_reissue
    kept: list[int] = []
    loader = world.loader(tee=lambda record, key: kept.append(key))
    assert bad not in [i for b in loader for i in b.sample_ids]
    assert world.dataset.key(bad) not in kept and len(kept) == 59
    (line,) = world.failed.read_text().splitlines()
    assert "NaN or infinity" in json.loads(line)["reason"]


def test_a_given_up_sample_is_absent_listed_and_counted(world: World) -> None:
    pack = next(p for p in range(len(world.plan)) if len(world.plan.pack(p)) >= 2)
    lost = int(world.plan.pack(pack)[0])

    def fault(ready: PackReady) -> PackReady:
        if ready.pack != pack:
            return ready
        return PackReady(
            stage=ready.stage, epoch=ready.epoch, pack=pack, records=[r for r in ready.records if r.index != lost], failed=[Failure(lost, "too long", 3)]
        )

    world.coordinator.fault = fault
    loader = world.loader()
    batch = next(b for b in loader if b.pack_index == pack)
    assert lost not in batch.sample_ids and len(batch.sample_ids) == len(world.plan.pack(pack)) - 1
    assert batch.counts.tolist() == world.plan.step_counts(pack // 4).tolist()
    entry = json.loads(world.failed.read_text())
    assert entry == {"stage": "train", "epoch": 7, "pack": pack, "sample": lost, "place": world.dataset.place(lost), "reason": "too long", "attempts": 3}
    assert loader.stats.failed == 1


def test_a_lost_coordinator_is_raised_in_the_trainer_and_a_new_pass_connects_anew(world: World) -> None:
    loader = world.loader(prefetch_packs=1, window_bytes=1)
    stream = iter(loader)
    next(stream)
    world.coordinator.ready.clear()
    world.coordinator.fault = lambda ready: None
    world.coordinator.lost = True
    with pytest.raises(Lost):
        list(stream)
    assert not threads()
    world.coordinator.fault = lambda ready: ready
    assert len(list(loader)) == len(world.plan) and world.coordinator.connections == 2


def test_the_groups_last_words_go_before_a_lost_connection(world: World) -> None:
    world.coordinator.lost, world.healthy = True, False
    world.coordinator.connect = lambda name: world.coordinator  # type: ignore[method-assign]  # stays lost
    stream = iter(world.loader())
    with pytest.raises(RuntimeError, match="last words"):
        next(stream)


def test_a_wait_for_data_ends_with_sigterm_and_with_bad_health(world: World) -> None:
    world.coordinator.hold.set()
    for attribute, value, error in (("sigterm", True, SIGTERMException), ("healthy", False, RuntimeError)):
        stream = iter(world.loader())
        timer = threading.Timer(0.2, lambda attribute=attribute, value=value: setattr(world, attribute, value))
        timer.start()
        started = time.monotonic()
        with pytest.raises(error):
            next(stream)
        assert time.monotonic() - started < 2
        setattr(world, attribute, not value)
        world.coordinator.closed.clear()
    for loader in world.loaders:
        loader.close()
    assert not threads()


@pytest.mark.parametrize(("agreed", "error"), [(Vote.STOP, SIGTERMException), (Vote.FAILED, GroupStopped)])
def test_a_batch_that_is_there_is_left_when_another_rank_stops_or_fails(world: World, agreed: Vote, error: type[BaseException]) -> None:
    votes: list[Vote] = []

    def agree(vote: Vote) -> Vote:
        votes.append(vote)
        return vote if len(votes) < 3 else agreed

    stream = iter(world.loader(agree=agree))
    next(stream), next(stream)
    with pytest.raises(error):
        next(stream)
    assert votes == [Vote.GO] * 3 and not threads()


def test_a_rank_tells_the_others_of_its_signal_and_of_its_failure(world: World) -> None:
    votes: list[Vote] = []
    stream = iter(world.loader(agree=lambda vote: votes.append(vote) or vote))  # type: ignore[func-returns-value]
    next(stream)
    world.sigterm = True
    with pytest.raises(SIGTERMException):
        next(stream)  # although there is a batch
    world.sigterm, world.healthy = False, False
    world.coordinator.hold.set()
    with pytest.raises(RuntimeError, match="last words"):
        next(iter(world.loader(agree=lambda vote: votes.append(vote) or vote)))  # type: ignore[func-returns-value]
    assert votes == [Vote.GO, Vote.STOP, Vote.FAILED]


def test_leaving_early_ends_the_thread_and_closes_the_stage(world: World) -> None:
    def consume(loader: PackLoader) -> None:
        for batch in loader:
            if batch.pack_index == 2:
                return

    loader = world.loader(prefetch_packs=1)
    consume(loader)
    list_again = iter(loader)  # a new pass ends the one before it
    assert not threads() and world.coordinator.closed == [("train", 7)]
    del list_again
    consume(loader)
    loader.close()
    loader.close()
    assert not threads() and world.coordinator.lost
    stream = iter(world.loader(prefetch_packs=1))
    next(stream)
    stream = None  # type: ignore[assignment]
    world.loaders[-1]._stream = None
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_an_unused_iterator_starts_nothing(world: World) -> None:
    iter(world.loader())
    assert not threads() and world.coordinator.connections == 0


def test_a_pass_without_packs_is_empty(world: World) -> None:
    assert list(world.loader(first=len(world.plan))) == []


def hang_reads(monkeypatch: pytest.MonkeyPatch, which: Callable[[list[str]], bool]) -> threading.Event:
    """Reads of these keys wait for the event."""
    released, get = threading.Event(), ShmStore.get

    def slow_get(this: ShmStore, keys: list[str], outs: list[torch.Tensor]) -> list[int]:
        if which(list(keys)):
            released.wait(60)
        return get(this, keys, outs)

    monkeypatch.setattr(ShmStore, "get", slow_get)
    return released


def test_a_record_whose_read_hangs_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = next(p for p in range(len(world.plan)) if len(world.plan.pack(p)) >= 2)
    bad = int(world.plan.pack(pack)[1])
    good: dict[int, PackReady] = {}

    def fault(ready: PackReady) -> PackReady:
        good[ready.pack] = ready
        return ready

    def on_reissue(stage: str, epoch: int, number: int, index: int, key: str) -> None:
        again = world.coordinator.write(f"{stage}/{epoch}/{index}/again", index, np.asarray(world.dataset.ids(index)))
        refs = [again if ref.index == index else ref for ref in good[number].records]
        world.coordinator.ready.append(PackReady(stage=stage, epoch=epoch, pack=number, records=refs, failed=[]))

    world.coordinator.fault, world.coordinator.on_reissue = fault, on_reissue
    released = hang_reads(monkeypatch, lambda keys: any(f"/{bad}/" in key and not key.endswith("again") for key in keys))
    loader = world.loader(read_limit=0.5)
    assert [b.pack_index for b in loader] == list(range(len(world.plan)))
    assert [index for index, _ in world.coordinator.reissued] == [bad] and "did not return" in world.coordinator.reissued[0][1]
    assert loader.stats.late == 2 and loader.stats.reissued == 1
    released.set()


def test_a_store_that_answers_no_read_ends_the_run_with_a_clear_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    released = hang_reads(monkeypatch, lambda keys: True)
    with pytest.raises(StoreError, match=r"store unreachable: a call did not return within 0\.3 s, 3 times in a row"):
        list(world.loader(read_limit=0.3))
    released.set()


def test_sigterm_ends_a_read_that_hangs_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    released = hang_reads(monkeypatch, lambda keys: True)
    loader = world.loader()
    threading.Timer(0.3, lambda: setattr(world, "sigterm", True)).start()
    started = time.monotonic()
    with pytest.raises(SIGTERMException):
        list(loader)
    loader.close()
    assert time.monotonic() - started < 3 and not threads()
    released.set()
