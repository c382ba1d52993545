"""Packing by what a draft computes, beside tokens; what is drawn is the same for every world and resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import toy
from tests.data.sparse import Sparse
from tests.data.test_datamodule import fit, packs_by_step
from tests.data.test_loader import World
from tests.tiny import save_conversations, save_target
from torchspec.blocks import Blocks
from torchspec.data.plan import Plan
from torchspec.errors import UserError
from torchspec.supervision import Supervision, Unroll, turns
from torchspec.transfer import StoreConfig, make_server

SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 90)), min_size=1, max_size=250)
"""Tokens and draft rows of conversations."""


def planned(lengths: Any, work: Any, **changes: Any) -> Plan:
    given = {"seed": 0, "epoch": 0, "max_tokens": 100, "packs_per_step": 4, "max_rows": 60, **changes}
    return Plan(lengths, work=None if work is None else np.array(work), **given)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 4), tokens=st.integers(64, 300), rows=st.integers(1, 300))
def test_no_pack_has_more_of_either_but_for_conversations_alone(sizes: list[tuple[int, int]], seed: int, epoch: int, tokens: int, rows: int) -> None:
    lengths, work = np.array(sizes).T
    plan = planned(lengths, work, seed=seed, epoch=epoch, max_tokens=tokens, max_rows=rows)
    packs = [plan.pack(i) for i in range(len(plan))]
    assert sorted(i for pack in packs for i in pack.tolist()) == list(range(len(sizes)))
    for pack in packs:
        assert lengths[pack].sum() <= tokens and (work[pack].sum() <= rows or len(pack) == 1)
        assert not ((work[pack] > rows).any() and len(pack) > 1)
    assert len(plan) == len(planned(lengths, work, seed=seed, max_tokens=tokens, max_rows=rows))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), max_size=200), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_without_work_the_plan_is_that_of_tokens_alone(lengths: list[int], seed: int, epoch: int) -> None:
    plain = planned(lengths, None, seed=seed, epoch=epoch, max_rows=None)
    for other in (planned(lengths, [0] * len(lengths), seed=seed, epoch=epoch), planned(lengths, None, seed=seed, epoch=epoch)):
        assert other.fingerprint == plain.fingerprint and other.max_rows is None
        assert [other.pack(i).tolist() for i in range(len(other))] == [plain.pack(i).tolist() for i in range(len(plain))]


def test_order_and_fingerprint_of_an_unroll_are_those_of_before_rows_were_bounded() -> None:
    """Values of the commit before: a run that began under it resumes. Of one that changes, plan.VERSION goes up."""
    lengths = np.random.default_rng(5).integers(1, 64, 20000)
    before = [
        ({"max_tokens": 200}, "4d2ee4e3f3df16024091d9606d3ce9b5", "9689902ae3de1da6"),
        ({"max_tokens": 64, "shuffle": False}, "a118be62f5e572f234333a08b57b7b63", "06eee3a4013be7ee"),
        ({"max_tokens": 1000, "epoch": 3, "seed": 9, "content": "c"}, "d94a6a966497e0e1af0061a0bcdf405e", "4158d6b6565707d3"),
    ]
    for changes, fingerprint, order in before:
        work = Unroll(7).work(np.ones(lengths.sum(), dtype=np.uint8), np.concatenate([[0], np.cumsum(lengths)]))
        plan = planned(lengths, work, **{"seed": 1, "packs_per_step": 8, "max_rows": 16384, **changes})
        packs = [plan.pack(i) for i in range(len(plan))]
        starts = np.cumsum([0, *map(len, packs)])
        assert plan.fingerprint == fingerprint
        assert hashlib.sha256(np.concatenate(packs).tobytes() + starts.tobytes()).hexdigest()[:16] == order


def test_the_fingerprint_knows_rows_and_their_bound() -> None:
    plans = [planned([5, 9], None), planned([5, 9], [7, 8]), planned([5, 9], [8, 7]), planned([5, 9], [7, 8], max_rows=61)]
    assert len({plan.fingerprint for plan in plans}) == 4


@pytest.mark.parametrize("most", [64, 512])
def test_packs_are_tight_in_what_binds_them(most: int) -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(250), 0.8, 50_000).astype(int), 10, 2048)
    work = 16 * np.minimum((lengths * generator.random(50_000)).astype(int), most)
    plan = planned(lengths, work, max_tokens=4096, max_rows=16384)
    packs = int((plan.tokens() > 0).sum())
    least = max(lengths.sum() / 4096, np.minimum(work, 16384).sum() / 16384)
    assert packs < 1.1 * least
    assert plan.sums(work).max() <= max(16384, work.max())


@pytest.fixture
def loaders(tmp_path: Path) -> Iterator[World]:
    server = make_server(StoreConfig(kind="shm", budget="8MiB"), run=f"test-work-{tmp_path.name}", budget=8 << 20)
    server.start()
    made = World(tmp_path, server.address)
    yield made
    for loader in made.loaders:
        loader.close()
    made.coordinator.store.close()
    server.close()


@pytest.mark.parametrize("rule", [Sparse(3), Blocks(4, 1, 2), Blocks(4, 0, 0.3)])
def test_every_world_and_resume_draws_the_same(loaders: World, rule: Supervision) -> None:
    """Through real loaders: positions by sample, normalisers by step, on 1, 2 and 4 ranks and from the middle on."""
    counts, work = loaders.dataset.measured(rule)
    plan = Plan(loaders.dataset.lengths, seed=4, epoch=2, max_tokens=80, packs_per_step=4, counts=counts, work=work, max_rows=30)
    loaders.plan = plan
    assert int(plan.sums(work).max()) <= max(30, int(work.max())) < int(work.sum())

    def drawn(world: int, first: int = 0) -> dict[int, tuple[int, list[int], float]]:
        """Of each sample: its step, the positions drawn inside it, the step's normaliser."""
        found = {}
        for rank in range(world):
            for batch in loaders.loader(rank=rank, world=world, first=first, supervision=rule):
                base = batch.rows.base
                for number, sample in enumerate(batch.sample_ids):
                    low, high = batch.cu_seqlens[number : number + 2].tolist()
                    inside = base[(base >= low) & (base < high)] - low
                    found[sample] = batch.pack_index // 4, inside.tolist(), float(batch.counts[0])
        return found

    one = drawn(1)
    assert len(one) == len(loaders.dataset) and drawn(2) == one == drawn(4)
    for sample, (step, inside, normaliser) in one.items():
        assert len(inside) == int(counts[sample, 0])
        assert normaliser == sum(len(other) for at, other, _ in one.values() if at == step)
    rest = drawn(2, first=8)
    assert rest == {sample: what for sample, what in one.items() if what[0] >= 2}
    again = Plan(loaders.dataset.lengths, seed=4, epoch=3, max_tokens=80, packs_per_step=4, counts=counts, work=work, max_rows=30)
    loaders.plan = again
    assert {sample: inside for sample, (_, inside, _) in drawn(1).items()} != {sample: inside for sample, (_, inside, _) in one.items()}


def test_a_pack_is_the_sum_of_its_conversations() -> None:
    """Rows of conversations together are those of each alone, moved."""
    rule, masks, keys = Sparse(2), [[0, 1, 1, 1, 1, 1], [1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1]], np.array([5, 6, 7], dtype=np.uint64)
    bounds = np.cumsum([0, *map(len, masks)])
    flat = np.concatenate([np.array(mask) for mask in masks])
    together = rule.rows(turns(flat, bounds), bounds, keys).base
    alone = []
    for number, mask in enumerate(masks):
        own = np.array([0, len(mask)])
        alone.append(rule.rows(turns(np.array(mask), own), own, keys[number : number + 1]).base + int(bounds[number]))
    assert torch.equal(together, torch.cat(alone))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "target": str(save_target(folder / "target")),
        "train": str(save_conversations(folder / "train.jsonl", 40)),
        "validate": str(save_conversations(folder / "validate.jsonl", 6, seed=1)),
    }


def test_a_run_is_packed_by_rows_and_says_so(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("torchspec.data.datamodule.rank_zero_info", said.append)

    def learn_at(self: Any, stage: str) -> Supervision:
        return Sparse(4 if stage == "train" else 100)

    monkeypatch.setattr(toy.Toy, "supervision", learn_at)
    data = {"max_rows": 40}
    fit(tmp_path / "run", world, data=data, trainer={"max_epochs": 2})
    trained = toy.notes(tmp_path / "run", "train")
    assert max(len(entry["samples"]) for entry in trained) == 2  # of 16 rows each; tokens alone would take more
    (line,) = [line for line in said if "draft rows" in line]
    assert "packs of at most 160 tokens and 40 draft rows (data.max_rows)" in line and "supervised positions a streamed token" in line
    assert any(len(entry["samples"]) > 2 for entry in toy.notes(tmp_path / "run", "validate"))  # not bounded
    fit(tmp_path / "first", world, data=data, trainer={"max_epochs": 2, "max_steps": 3})
    checkpoint = str(tmp_path / "first" / "last.ckpt")
    fit(tmp_path / "rest", world, data=data, trainer={"max_epochs": 2}, resume=checkpoint)
    halves = [toy.notes(tmp_path / name, "train") for name in ("first", "rest")]
    assert packs_by_step(*halves) == packs_by_step(trained)
    with pytest.raises(UserError, match=r"ckpt_path \(max_rows\)=40 differs from this run's 50"):
        fit(tmp_path / "other", world, data={"max_rows": 50}, trainer={"max_epochs": 2}, resume=checkpoint)
    monkeypatch.setattr(toy.Toy, "supervision", lambda self, stage: Sparse(3))
    with pytest.raises(UserError, match=r"ckpt_path \(plan_fingerprint\).*resume with the data, order and anchors of the draft"):
        fit(tmp_path / "fewer", world, data=data, trainer={"max_epochs": 2}, resume=checkpoint)


def test_a_bound_of_rows_means_nothing_for_an_unroll(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_rows=64 bounds draft rows, and what this draft computes follows from its tokens"):
        fit(tmp_path / "run", world, data={"max_rows": 64})
    with pytest.raises(UserError, match=r"data\.max_rows=0 is below 1"):
        fit(tmp_path / "zero", world, data={"max_rows": 0})
