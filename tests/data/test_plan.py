"""The order of the data, as properties: exactly once, any world, any resume point, many seeds."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.data.plan import Plan
from torchspec.errors import UserError

LENGTHS = st.lists(st.integers(1, 64), min_size=0, max_size=300)


def made(lengths: list[int] | np.ndarray, **changes: object) -> Plan:
    return Plan(lengths, **{"seed": 0, "epoch": 0, "max_tokens": 64, "packs_per_step": 4, **changes})  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**40), epoch=st.integers(0, 5), per_step=st.integers(1, 9), tokens=st.integers(64, 300), shuffle=st.booleans())
def test_every_conversation_exactly_once_and_no_pack_too_large(lengths: list[int], seed: int, epoch: int, per_step: int, tokens: int, shuffle: bool) -> None:
    plan = made(lengths, seed=seed, epoch=epoch, packs_per_step=per_step, max_tokens=tokens, shuffle=shuffle)
    packs = [plan.pack(i) for i in range(len(plan))]
    assert sorted(i for pack in packs for i in pack.tolist()) == list(range(len(lengths)))
    sizes = np.array(lengths, dtype=np.int64)
    assert [int(sizes[pack].sum()) for pack in packs] == plan.tokens().tolist()
    assert max([0, *plan.tokens().tolist()]) <= tokens
    assert len(plan) == plan.steps * per_step


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), epochs=st.integers(2, 6), per_step=st.integers(1, 9))
def test_all_epochs_have_the_same_length(lengths: list[int], seed: int, epochs: int, per_step: int) -> None:
    plans = [made(lengths, seed=seed, epoch=epoch, packs_per_step=per_step) for epoch in range(epochs)]
    assert len({len(plan) for plan in plans}) == 1
    again = made(lengths, seed=seed, epoch=epochs - 1, packs_per_step=per_step, num_packs=len(plans[0]))
    assert [again.pack(i).tolist() for i in range(len(again))] == [plans[-1].pack(i).tolist() for i in range(len(again))]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), steps_done=st.integers(0, 40))
def test_steps_are_the_same_sets_for_every_world_and_resume_point(lengths: list[int], seed: int, steps_done: int) -> None:
    plan = made(lengths, seed=seed, packs_per_step=12)
    steps_done = min(steps_done, plan.steps)
    whole = [set(range(step * 12, step * 12 + 12)) for step in range(plan.steps)]
    for world in (1, 2, 3, 4, 6, 12):
        accumulation = 12 // world
        for step in range(steps_done, plan.steps):
            trained = {batch * world + rank for rank in range(world) for batch in range(step * accumulation, (step + 1) * accumulation)}
            assert trained == whole[step]
            # what the loader of a rank goes through from a resume point on
            first = steps_done * 12
            of_ranks = [list(range(first + rank, len(plan), world)) for rank in range(world)]
            low = (step - steps_done) * accumulation
            assert {pack for mine in of_ranks for pack in mine[low : low + accumulation]} == whole[step]


def test_a_plan_is_a_pure_function_of_its_arguments() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 500)

    def packs(**changes: object) -> list[list[int]]:
        plan = made(lengths, **changes)
        return [plan.pack(i).tolist() for i in range(len(plan))]

    assert packs() == packs()
    assert packs(seed=1) != packs() and packs(epoch=1) != packs()
    assert {tuple(sorted(pack)) for pack in packs(epoch=1)} != {tuple(sorted(pack)) for pack in packs()}  # other company, too


def test_the_order_has_not_changed_since_it_was_written() -> None:
    """Resuming relies on it: when this fails, raise plan.VERSION."""
    plan = made([5, 9, 3, 12, 7, 30, 2, 64, 11, 40], packs_per_step=2, seed=3, epoch=1)
    assert [plan.pack(i).tolist() for i in range(len(plan))] == [[5, 1, 4, 0, 2, 6], [9, 3, 8], [7], []]


def test_the_fingerprint_knows_what_the_order_depends_on() -> None:
    lengths = [5, 9, 3]
    first = made(lengths).fingerprint
    assert made(lengths, epoch=3).fingerprint == first  # one plan, many epochs
    others = [
        made([5, 9, 4]),
        made(lengths, seed=1),
        made(lengths, max_tokens=65),
        made(lengths, packs_per_step=2),
        made(lengths, content="x"),
        made(lengths, shuffle=False),
    ]
    assert len({first, *(plan.fingerprint for plan in others)}) == 7


def test_counts_are_those_of_the_step() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 64, 100)
    counts = generator.integers(0, 50, (100, 3))
    plan = made(lengths, counts=counts, packs_per_step=4)
    for step in range(plan.steps):
        members = [i for pack in range(step * 4, step * 4 + 4) for i in plan.pack(pack)]
        assert plan.step_counts(step).tolist() == counts[members].sum(axis=0).tolist()


def test_draw_keys_are_of_seed_epoch_and_sample_alone() -> None:
    """Whichever pack a sample is in, and however long the plan was used before: also after a resume."""
    plan = made([5, 9, 60, 30, 31, 7], seed=3, epoch=2)
    alone = {i: int(plan.keys(np.array([i]))[0]) for i in range(6)}
    assert [plan.keys(plan.pack(i)).tolist() for i in range(len(plan))] == [[alone[j] for j in plan.pack(i).tolist()] for i in range(len(plan))]
    assert made([1] * 6, seed=3, epoch=2, packs_per_step=1, max_tokens=200).keys(np.arange(6)).tolist() == list(alone.values())
    others = [made([1] * 6, seed=seed, epoch=epoch).keys(np.arange(6)) for seed, epoch in ((3, 2), (3, 1), (4, 2), (2**40, 2))]
    assert len({key for keys in others for key in keys.tolist()}) == 24 and plan.keys(np.zeros(0, dtype=np.int64)).shape == (0,)
    assert alone[0] == 11475712343069784169  # it stays what a run of before drew with


def test_a_conversation_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.max_tokens=64 is below the longest conversation of 65 tokens"):
        made([3, 65])


def test_unshuffled_keeps_the_order_of_the_data() -> None:
    plan = made([60] * 10, shuffle=False, packs_per_step=1)
    assert [plan.pack(i).tolist() for i in range(len(plan))] == [[i] for i in range(10)]


def test_one_million_conversations_pack_tightly_and_quickly() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(250), 0.8, 1_000_000).astype(int), 10, 2048)
    started = time.process_time()
    plan = made(lengths, max_tokens=8192, packs_per_step=16)
    assert time.process_time() - started < 15
    assert plan.padding < 0.02
    # randomness: neighbours in a pack come from all over the data
    spread = [float(np.ptp(plan.pack(i))) for i in range(0, len(plan), 97) if len(plan.pack(i)) > 4]
    assert np.median(spread) > 300_000
