"""Moving rows: spreading some over a longer, otherwise constant tensor, and adding some to an fp32 sum (rows are distinct, so no atomics are needed);
and scaling a whole tensor by a number that is on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _spread(x, where, result, width, fill, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    source = tl.load(where + row).to(tl.int64)
    values = tl.load(x + source * width + column, mask=seen & (column * 0 + source >= 0), other=fill)
    tl.store(result + row * width + column, values, mask=seen)


@triton.jit
def _add(total, place, x, width, x_stride, t_stride, PLACED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    target = tl.load(place + row).to(tl.int64) if PLACED else row
    at = total + target * t_stride + column
    tl.store(at, tl.load(at, mask=seen) + tl.load(x + row * x_stride + column, mask=seen).to(tl.float32), mask=seen)


@triton.jit
def _scale(x, factor, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        tl.store(x + at, (tl.load(x + at, mask=at < total).to(tl.float32) * by).to(x.dtype.element_ty), mask=at < total)


def spread(x: Tensor, where: Tensor, fill: float = 0.0) -> Tensor:
    """[R, ...] to [N, ...]: row n is ``x[where[n]]``, or ``fill`` where that is negative.

    Args:
        x: contiguous.
        where: [N] integers.
        fill: of rows that have no source.
    """
    x = x.contiguous()
    result = x.new_empty(where.shape[0], *x.shape[1:])
    width = result[0].numel() if where.shape[0] else 0
    if width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _spread[(where.shape[0], triton.cdiv(width, block))](x, where, result, width, fill, BLOCK=block, num_warps=4)
    return result


def add(total: Tensor, x: Tensor, place: Tensor | None) -> None:
    """``total[place] += x``.

    Args:
        total: [M, C] fp32, rows contiguous.
        x: [R, C], rows contiguous.
        place: [R] distinct rows; None for the first R.
    """
    rows, width = x.shape
    if rows and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _add[(rows, triton.cdiv(width, block))](total, place, x, width, x.stride(0), total.stride(0), PLACED=place is not None, BLOCK=block, num_warps=4)


def scale(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` in fp32, for contiguous ``x`` and a scalar on its device. A factor of 1 moves no memory."""
    if x.numel():
        _scale[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=8)
