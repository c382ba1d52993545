"""The tables of the attention kernels against the mask written out, row by row and key by key."""

from __future__ import annotations

import numpy as np
import pytest

from torchspec.models.blocks import attention_tables as tables

SLOTS = 4


def _spans(generator: np.random.Generator) -> np.ndarray:
    """Three conversations of 30, 1 and 25 positions; the second has no anchor."""
    chosen = [start + np.sort(generator.choice(length, number, replace=False)) for start, length, number in ((0, 30, 7), (31, 25, 11))]
    return np.concatenate([np.stack([np.full_like(at, start), at], axis=1) for start, at in zip((0, 31), chosen, strict=True)])


def _seen(spans: np.ndarray, window: int | None) -> np.ndarray:
    """[A, S, N] bool."""
    key, slot = np.arange(56), np.arange(SLOTS)[:, None]
    start, anchor = (spans[:, column, None, None] for column in (0, 1))
    seen = (key >= start) & (key < anchor) & (slot >= 0)
    return seen if window is None else seen & (key >= anchor + slot - (window - 1))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 17])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_rows(size: int, window: int | None) -> None:
    for seed in range(5):
        spans = _spans(np.random.default_rng(seed))
        seen = _seen(spans, window)
        table = tables.row_tiles(spans, slots=SLOTS, blocks=size, window=window)
        assert sorted(block for low, count, *_ in table.tolist() for block in range(low, low + count)) == list(range(len(spans)))
        for low, count, begin, whole, lowest, highest in table.tolist():
            assert 1 <= count <= size
            mine = seen[low : low + count].reshape(-1, seen.shape[-1])
            assert not mine[:, :begin].any() and not mine[:, highest:].any()
            assert mine[:, whole : max(whole, lowest)].all()
            assert lowest == spans[low, 1] and begin <= whole


@pytest.mark.parametrize("window", [None, 1, 2, 5, 17])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_keys(size: int, window: int | None) -> None:
    for seed in range(5):
        spans = _spans(np.random.default_rng(seed))
        seen = _seen(spans, window)
        left = seen.copy()
        for low, high, begin, whole, whole_end, end in tables.key_tiles(spans, slots=SLOTS, keys=size, window=window).tolist():
            assert low < high <= low + size and begin <= whole <= whole_end <= end
            left[begin:end, :, low:high] = False
            assert seen[whole:whole_end, :, low:high].all()
            assert not seen[:begin, :, low:high].any() and not seen[end:, :, low:high].any()
        assert not left.any()


def test_no_blocks() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    assert tables.row_tiles(none, slots=4, blocks=2, window=None).shape == (0, 6)
    assert tables.key_tiles(none, slots=4, keys=8, window=3).shape == (0, 6)


def test_the_example_of_the_module() -> None:
    spans = np.array([[10, 12], [10, 17], [10, 23]])
    assert tables.row_tiles(spans, slots=4, blocks=2, window=None).tolist() == [[2, 1, 10, 10, 23, 23], [0, 2, 10, 10, 12, 17]]
    assert tables.key_tiles(spans, slots=4, keys=8, window=None).tolist() == [[10, 18, 0, 2, 3, 3], [18, 23, 2, 2, 3, 3]]
