"""RMSNorm of rows, forward and backward; twin: ``models/ops/norm.py``.

    inverse = 1 / sqrt(mean(x^2) + eps)       y = round(x inverse) round(w)
    d_x = inverse (u - x^ mean(u x^)),  u = d_y round(w),  x^ = x inverse;        d_w = sum over rows of d_y round(x^)

The forward can also round y to 8 bits, row by row, as ``fp8.quantise`` does it (and leave y itself out).
Rows can be taken from and put back to places given by an index, so that a chunk of a longer list needs no copy of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.fp8 import Rounded
from torchspec.models.ops.kernels import power_of_two
from torchspec.models.ops.kernels.rounding import scale_of

_RESIDENT = 132 * 16
"""Warps of the backward in all: 16 on each of an H100's 132 multiprocessors, as many as it holds at a time with up to 128 registers a thread (which
``kernel_compile.py`` checks). Programs beyond them would begin when the others are done."""


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["place"])
def _forward(
    x, weight, y, inverse, y8, scale8, top, place, rows, width, x_stride, eps,
    PLACED: tl.constexpr, PLAIN: tl.constexpr, NARROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    within = row < rows
    seen = within[:, None] & (column[None, :] < width)
    source = tl.load(place + row, mask=within, other=0).to(tl.int64) if PLACED else row.to(tl.int64)
    wide = tl.load(x + source[:, None] * x_stride + column[None, :], mask=seen, other=0.0).to(tl.float32)
    inv = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    kind = x.dtype.element_ty
    unit = (wide * inv[:, None]).to(kind).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(kind).to(tl.float32)
    result = (unit * scale[None, :]).to(kind)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    if PLAIN:
        tl.store(y + at, result, mask=seen)
    if NARROW:
        values = result.to(tl.float32)
        largest = tl.max(tl.abs(values), axis=1)
        by = scale_of(largest)
        tl.store(y8 + at, (values * (1.0 / by)[:, None]).to(y8.dtype.element_ty), mask=seen)
        tl.store(scale8 + row, by, mask=within)
        tl.store(top + row, largest, mask=within)
    tl.store(inverse + row, inv, mask=within)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["place"])
def _backward(
    d_y, x, weight, inverse, more, d_x, partial, place, rows, width, x_stride,
    PLACED: tl.constexpr, MORE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    kind = x.dtype.element_ty
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(kind).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        within = row < rows
        seen = within[:, None] & (column[None, :] < width)
        source = tl.load(place + row, mask=within, other=0).to(tl.int64) if PLACED else row.to(tl.int64)
        inv = tl.load(inverse + row, mask=within, other=0.0)
        grad = tl.load(d_y + row.to(tl.int64)[:, None] * width + column[None, :], mask=seen, other=0.0).to(tl.float32)
        unit = tl.load(x + source[:, None] * x_stride + column[None, :], mask=seen, other=0.0).to(tl.float32) * inv[:, None]
        d_unit = grad * scale[None, :]
        result = (d_unit - unit * (tl.sum(d_unit * unit, axis=1) / width)[:, None]) * inv[:, None]
        if MORE:
            result += tl.load(more + source[:, None] * width + column[None, :], mask=seen, other=0.0).to(tl.float32)
        tl.store(d_x + source[:, None] * width + column[None, :], result.to(d_x.dtype.element_ty), mask=seen)
        total += tl.sum(grad * unit.to(kind).to(tl.float32), axis=0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)


def _blocks(width: int) -> tuple[int, int, int]:
    """Rows of a block, its padded width, warps."""
    block = power_of_two(width)
    return max(1, 2048 // block), block, 16 if block >= 8192 else 8 if block >= 4096 else 4


def programs(width: int) -> int:
    """How many programs of a backward sum the weight's gradient, each over its rows."""
    return _RESIDENT // _blocks(width)[2]


def forward(x: Tensor, weight: Tensor, eps: float, *, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm of rows.

    Args:
        x: [M, H], rows contiguous.
        weight: [H].
        eps: added to the mean square.
        place: [R] rows of ``x`` to take, in this order; None for all.

    Returns:
        y [R, H] in the type of ``x``; inverse [R, 1] fp32.
    """
    y, inverse, _ = _run(x, weight, eps, place, plain=True, narrow=False)
    assert y is not None
    return y, inverse


def forward_rounded(x: Tensor, weight: Tensor, eps: float, *, place: Tensor | None = None, plain: bool) -> tuple[Tensor | None, Tensor, Rounded]:
    """:func:`forward`, and y rounded to 8 bits as ``fp8.quantise`` does it; y itself where ``plain``."""
    y, inverse, rounded = _run(x, weight, eps, place, plain=plain, narrow=True)
    assert rounded is not None
    return y, inverse, rounded


def _run(x: Tensor, weight: Tensor, eps: float, place: Tensor | None, *, plain: bool, narrow: bool) -> tuple[Tensor | None, Tensor, Rounded | None]:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape[0] if place is None else place.shape[0], x.shape[1]
    y, inverse = x.new_empty(rows, width) if plain else None, torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    rounded = Rounded.empty(rows, width, x.device) if narrow else None
    if rows:
        high, block, warps = _blocks(width)
        data, scale, top = (None, None, None) if rounded is None else (rounded.data, rounded.scale, rounded.top)
        _forward[(triton.cdiv(rows, high),)](
            x, weight, y, inverse, data, scale, top, place, rows, width, x.stride(0), eps,
            PLACED=place is not None, PLAIN=plain, NARROW=narrow, BLOCK_ROWS=high, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, inverse, rounded


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, more: Tensor | None = None, place: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`.

    Args:
        d_y: [R, H].
        x, weight, inverse, place: given to and returned by the forward.
        more: [M, H] added to d_x (another path's gradient).
        out: [M, H] to write d_x to; needed where ``place`` is given, whose rows alone are written.

    Returns:
        d_x [M, H] in the type of ``x``; d_weight [H] fp32.
    """
    d_y = d_y.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = d_y.shape
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    high, block, warps = _blocks(width)
    number = max(1, min(programs(width), triton.cdiv(rows, high)))
    partial = torch.empty(number, width, dtype=torch.float32, device=x.device)
    _backward[(number,)](
        d_y, x, weight, inverse, None if more is None else more.contiguous(), d_x, partial, place, rows, width, x.stride(0),
        PLACED=place is not None, MORE=more is not None, BLOCK_ROWS=high, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return d_x, partial.sum(0)
