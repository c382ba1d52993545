"""How the fused loss cuts the step-0 rows: nothing lost, nothing too large, no more pieces than needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec.models.eagle3.task import target_uses
from torchspec.models.ops.head_loss_fused import _CHUNK_ELEMENTS, _CHUNK_ROWS, _TILE, chunks
from torchspec.supervision import Unroll, turns


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=4), st.sampled_from([64, 32000, 151936, 262144, 10**6]), st.integers(1, 8))
def test_cut(answers: list[int], width: int, steps: int) -> None:
    mask = np.concatenate([np.zeros(1, dtype=np.uint8), *[np.array([0] + [1] * length, dtype=np.uint8) for length in answers]])
    cu = np.array([0, len(mask)])
    rows = Unroll(steps).rows(turns(mask, cu), cu)
    depth, cut = rows.depth.numpy(), chunks(target_uses(rows.depth), steps, width)
    total, most = len(depth), max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // width) // steps)
    lows, ends = [low for low, *_ in cut], [high for _, high, *_ in cut]
    assert lows == [0, *ends[:-1]] and ends[-1] == total
    assert all(low < high <= low + most for low, high in zip(lows, ends, strict=True)) or (total == 0 and len(cut) == 1)
    target_of = np.concatenate([np.arange(i, i + d) for i, d in enumerate(depth)]) if total else np.zeros(0)
    for low, high, first, end in cut:
        assert first == (target_of < low).sum() and end == (target_of < high).sum()
    assert len(cut) <= max(1, -(-total // (most // _TILE * _TILE or most)))
    assert all(size % _TILE == 0 or size == most for size in (high - low for low, high in zip(lows[:-1], ends[:-1], strict=True)))
    if len(cut) > 1:
        assert total - lows[-2] > most  # the last two would not go together


@pytest.mark.parametrize(
    ("steps", "total", "width", "sizes"),
    [
        (7, 4097, 151936, [512] * 7 + [513]), (7, 560, 151936, [560]), (7, 4096, 32000, [512] * 8), (7, 4170, 32000, [384, 512, 512] * 2 + [384, 512, 458]),
        (8, 4097, 32000, [384, 512, 512] * 2 + [384, 512, 385]), (4, 8193, 32000, [896] * 4 + [1024] + [896] * 3 + [897]),
    ],
)  # fmt: skip
def test_the_last_chunk_is_no_single_row(steps: int, total: int, width: int, sizes: list[int]) -> None:
    mask = np.array([0] + [1] * (total + 1), dtype=np.uint8)
    cu = np.array([0, len(mask)])
    cut = chunks(target_uses(Unroll(steps).rows(turns(mask, cu), cu).depth), steps, width)
    assert [high - low for low, high, *_ in cut] == sizes
