"""Rows of block drafts: which anchors, which slots, and that a draw depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.blocks import BlockRows, Blocks
from torchspec.supervision import Unroll, turns

masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=0, max_size=4)


def rows_of(texts: list[list[int]], supervision: Blocks, keys: list[int] | None = None) -> BlockRows:
    bounds = np.cumsum([0] + [len(mask) for mask in texts])
    flat = np.array([m for mask in texts for m in mask], dtype=np.uint8)
    return supervision.rows(turns(flat, bounds), bounds, np.array(range(len(texts)) if keys is None else keys, dtype=np.uint64))


def by_hand(texts: list[list[int]], supervision: Blocks) -> list[tuple[int, int, int]]:
    """(first position of the conversation, anchor, depth) of every candidate."""
    found, start = [], 0
    for mask in texts:
        for a in range(1, len(mask)):
            depth = 0
            while depth < supervision.horizon and a + depth + 1 < len(mask) and all(mask[a : a + depth + 2]):
                depth += 1
            if depth:
                found.append((start, start + a, depth))
        start += len(mask)
    return found


@given(masks, st.integers(2, 5), st.integers(0, 1))
@settings(deadline=None, max_examples=150)
def test_every_candidate_once_with_its_slots(texts: list[list[int]], slots: int, shift: int) -> None:
    supervision = Blocks(slots, shift, None)
    rows = rows_of(texts, supervision)
    expected = by_hand(texts, supervision)
    assert [(*span, depth) for span, depth in zip(rows.spans.tolist(), rows.depth.tolist(), strict=True)] == expected
    assert (rows.base + 1).tolist() == [a for _, a, _ in expected]
    slot_of = [(block * slots + shift + i, a + i) for block, (_, a, depth) in enumerate(expected) for i in range(depth)]
    assert list(zip(rows.slot.tolist(), rows.target.tolist(), strict=True)) == slot_of
    assert torch.equal(rows.unique[rows.index], rows.target)
    assert rows.unique.tolist() == sorted(set(rows.target.tolist()))


@given(masks, st.integers(2, 5), st.one_of(st.none(), st.integers(1, 6), st.floats(0.05, 1.0)))
@settings(deadline=None, max_examples=150)
def test_counts_and_work_are_those_of_the_rows(texts: list[list[int]], slots: int, anchors: int | float | None) -> None:
    supervision = Blocks(slots, 1, anchors)
    bounds = np.cumsum([0] + [len(mask) for mask in texts])
    flat = np.array([m for mask in texts for m in mask], dtype=np.uint8)
    rows = rows_of(texts, supervision)
    number = np.bincount(np.searchsorted(bounds, rows.base.numpy(), side="right") - 1, minlength=len(texts))[: len(texts)]
    assert supervision.counts(flat, bounds).tolist() == [[n] for n in number.tolist()]
    assert supervision.work(flat, bounds).tolist() == [n * slots for n in number.tolist()]


def test_a_block_is_the_unrolls_row_before_its_anchor() -> None:
    texts = [[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1]]
    bounds = np.cumsum([0] + [len(mask) for mask in texts])
    turn = turns(np.array([m for mask in texts for m in mask], dtype=np.uint8), bounds)
    unroll, blocks = Unroll(3).rows(turn, bounds), rows_of(texts, Blocks(4, 1, None))
    assert torch.equal(unroll.base, blocks.base)
    assert torch.equal(unroll.depth, blocks.depth)
    of_unroll = sorted((int(t), int(t) + 1 + k) for k in range(3) for t in unroll.base[unroll.index[k]])
    base = blocks.base[torch.div(blocks.slot, 4, rounding_mode="floor")]
    assert sorted(zip(base.tolist(), blocks.target.tolist(), strict=True)) == of_unroll


def test_a_draw_follows_from_its_key_alone() -> None:
    texts = [[0] + [1] * n for n in (40, 25, 60, 33)]
    supervision, keys = Blocks(4, 1, 7), [11, 12, 13, 14]
    together = rows_of(texts, supervision, keys)
    anchors = [
        (together.base[(together.base >= low) & (together.base < low + len(mask))] - low).tolist()
        for low, mask in zip(np.cumsum([0, 41, 26, 61]), texts, strict=True)
    ]
    for ranks in (1, 2, 4):  # any split of the same conversations into packs
        for rank in range(ranks):
            own = list(range(rank, 4, ranks))
            rows = rows_of([texts[i] for i in own], supervision, [keys[i] for i in own])
            starts = np.cumsum([0] + [len(texts[i]) for i in own])
            for i, low, high in zip(own, starts[:-1], starts[1:], strict=True):
                assert (rows.base[(rows.base >= low) & (rows.base < high)] - low).tolist() == anchors[i]
    assert anchors[0] != (rows_of(texts, supervision, [21, 12, 13, 14]).base[:7]).tolist()
    assert all(len(found) == 7 and found == sorted(set(found)) for found in anchors)


def test_anchors_are_drawn_evenly() -> None:
    counted = np.zeros(20, dtype=np.int64)
    for key in range(2000):
        base = rows_of([[0] + [1] * 21], Blocks(3, 1, 5), [key]).base
        counted += np.bincount(base.numpy(), minlength=20)[:20]
    assert counted.sum() == 10000
    assert counted.min() > 420 and counted.max() < 580


@pytest.mark.parametrize(("low", "high"), [(0, 2), (2, 5), (4, 5)])
def test_a_part_is_the_rows_of_its_blocks(low: int, high: int) -> None:
    rows = rows_of([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1]], Blocks(4, 1, None))
    part = rows.part(low, high)
    chosen = (rows.slot >= low * 4) & (rows.slot < high * 4)
    assert torch.equal(part.base, rows.base[low:high])
    assert torch.equal(part.target, rows.target[chosen])
    assert torch.equal(part.slot, rows.slot[chosen] - low * 4)
    assert torch.equal(part.unique[part.index], part.target)
