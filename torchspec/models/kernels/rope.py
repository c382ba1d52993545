"""Rotation of heads by their positions; twin: ``models/rope.py:rotate``.

    (low, high) -> (low cos - high sin, high cos + low sin)       low, high: the halves of a head

The backward is the rotation by the opposite angle.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.kernels import power_of_two


@triton.jit
def _rotate(
    source, result, cos, sin, rows, heads, turned, half, s_row, s_head, r_row, r_head,
    BACK: tl.constexpr, BLOCK_ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK_ROWS rows of all heads; heads from ``turned`` on are copied."""
    at = tl.arange(0, BLOCK_ROWS * HEADS)
    row = tl.program_id(0) * BLOCK_ROWS + at // HEADS
    head = at % HEADS
    column = tl.arange(0, HALF)
    inside = column[None, :] < half
    seen = ((row < rows) & (head < heads))[:, None] & inside
    moves = ((row < rows) & (head < turned))[:, None] & inside
    c = tl.load(cos + row.to(tl.int64)[:, None] * half + column[None, :], mask=moves, other=1.0)
    s = tl.load(sin + row.to(tl.int64)[:, None] * half + column[None, :], mask=moves, other=0.0)
    if BACK:
        s = -s
    base = source + row.to(tl.int64)[:, None] * s_row + head[:, None] * s_head + column[None, :]
    low = tl.load(base, mask=seen, other=0.0).to(tl.float32)
    high = tl.load(base + half, mask=seen, other=0.0).to(tl.float32)
    out = result + row.to(tl.int64)[:, None] * r_row + head[:, None] * r_head + column[None, :]
    tl.store(out, (low * c - high * s).to(result.dtype.element_ty), mask=seen)
    tl.store(out + half, (high * c + low * s).to(result.dtype.element_ty), mask=seen)


def rotate(source: Tensor, result: Tensor, cos: Tensor, sin: Tensor, *, turned: int, back: bool) -> None:
    """Write the rotation of ``source`` to ``result``.

    Args:
        source, result: [R, heads, d], heads contiguous.
        cos, sin: fp32, R * d / 2 contiguous numbers each.
        turned: heads that are rotated; the rest are copied.
        back: by the opposite angle.
    """
    rows, heads, size = source.shape
    if not rows:
        return
    assert source.stride(2) == 1 and result.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    padded, half = power_of_two(heads), power_of_two(size // 2)
    high = max(1, 4096 // (padded * half))
    _rotate[(triton.cdiv(rows, high),)](
        source, result, cos, sin, rows, heads, turned, size // 2, source.stride(0), source.stride(1), result.stride(0), result.stride(1),
        BACK=back, BLOCK_ROWS=high, HEADS=padded, HALF=half, num_warps=4,
    )  # fmt: skip
