"""The supervision rule against a direct reading of it, position by position."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchspec.supervision import Unroll, turns


def rule(masks: list[list[int]], steps: int) -> list[set[int]]:
    """Pack positions supervised at each step, straight from the definition."""
    found: list[set[int]] = [set() for _ in range(steps)]
    start = 0
    for mask in masks:
        for k in range(steps):
            for t in range(len(mask)):
                if t + 2 + k < len(mask) and all(mask[t + 1 : t + 3 + k]):
                    found[k].add(start + t)
        start += len(mask)
    return found


def test_worked_example() -> None:
    assert Unroll(4).counts(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 6])).tolist() == [[3, 2, 1, 0]]
    assert rule([[0, 0, 1, 1, 1, 1]], 4) == [{1, 2, 3}, {1, 2}, {1}, set()]


@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=6), st.integers(1, 5))
def test_rows_follow_the_rule(masks: list[list[int]], steps: int) -> None:
    flat = np.array([m for mask in masks for m in mask], dtype=np.uint8)
    cu = np.cumsum([0, *map(len, masks)])
    turn = turns(flat, cu)
    rows = Unroll(steps).rows(turn, cu)
    assert rows.consecutive()
    expected = rule(masks, steps)
    for k in range(steps):
        assert set(rows.base[rows.index[k]].tolist()) == expected[k]
        if k:
            assert rows.index[k - 1][rows.keep[k]].tolist() == rows.index[k].tolist()
        at = rows.at[rows.step == k]
        assert at.tolist() == rows.base[rows.index[k]].tolist()
        assert [rows.where[k, t] for t in at.tolist()] == list(range(len(at))) and int((rows.where[k] >= 0).sum()) == len(at)
        before = rows.at[rows.step == k - 1] if k else torch.arange(len(flat))
        assert rows.onto[k].tolist() == [int(rows.where[k, t]) for t in before.tolist()]
        for j in rows.index[k].tolist():  # the target of row j at step k is the target row j + k
            assert rows.base[j + k] == rows.base[j] + k
            assert turn[rows.base[j] + 1] == turn[rows.base[j + k] + 1]
    counts = Unroll(steps).counts(flat, cu)
    assert counts.tolist() == [[len(e) for e in rule([mask], steps)] for mask in masks]
    assert counts.sum(0).tolist() == [len(e) for e in expected]


def test_turns_do_not_cross_conversations() -> None:
    turn = turns(np.array([0, 1, 1, 1, 0, 1]), np.array([0, 3, 6]))
    assert turn.tolist() == [-1, 0, 0, 1, -1, 2]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_conversations_supervise_nothing(length: int) -> None:
    assert Unroll(3).counts(np.ones(length, dtype=np.uint8), np.array([0, length])).tolist() == [[0, 0, 0]]


def test_no_conversation_has_no_counts() -> None:
    assert Unroll(3).counts(np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)).shape == (0, 3)


def test_a_supervision_is_a_value() -> None:
    """It is compared, travels to other processes, and costs an unroll no rows beside its tokens."""
    assert pickle.loads(pickle.dumps(Unroll(5))) == Unroll(5) != Unroll(4) and Unroll(5).horizon == 5
    assert Unroll(5).work(np.ones(9, dtype=np.uint8), np.array([0, 4, 9])).tolist() == [0, 0]
