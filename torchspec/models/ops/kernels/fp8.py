"""Rows of a matrix to 8-bit floats, each with a scale of its own, and matrices turned on the way to them; twins: ``models/ops/fp8.py``.

    quantise   s_r = max_c |x_rc f_c| / 448      y_rc = round(x_rc f_c / s_r)       (f: optional factors by column)
    round_transposed  y_cr = round(x_rc by_r)           by_r = limit / top_r, or top_r / (limit common)
    transpose  y_cr = x_rc

Rows that fit into a block are read once; of longer ones the second pass reads them from a cache. Values beyond the type's largest are made that one here,
since a cast may make them NaN; NaN stays. Rows with nothing above ``models.fp8.SMALLEST`` count as rows of zeros: s_r = 1, by_r = 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.fp8 import SMALLEST, Rounded
from torchspec.models.ops.kernels.rounding import factor_of, scale_of

_SMALLEST = tl.constexpr(SMALLEST)
_BLOCK = 8192
_ROWS, _COLUMNS = 128, 64
"""A tile of ``round_transposed``: what it reads of a row and what it writes of a column are 128 bytes each, for two-byte numbers."""


@triton.jit
def _quantise(x, factor, y, scale, top, width, stride, FACTOR: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if HELD:
        values = tl.load(x + row * stride + lane, mask=lane < width, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(values), axis=0)
        tl.store(top + row, largest)
        if FACTOR:
            values *= tl.load(factor + lane, mask=lane < width, other=0.0)
            largest = tl.max(tl.abs(values), axis=0)
        by = scale_of(largest)
        tl.store(scale + row, by)
        tl.store(y + row * width + lane, (values * (1.0 / by)).to(y.dtype.element_ty), mask=lane < width)
        return
    plain, highest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        values = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        plain = tl.maximum(plain, tl.abs(values))
        if FACTOR:
            values *= tl.load(factor + column, mask=column < width, other=0.0)
            highest = tl.maximum(highest, tl.abs(values))
    largest = tl.max(plain, axis=0)
    tl.store(top + row, largest)
    if FACTOR:
        largest = tl.max(highest, axis=0)
    by = scale_of(largest)
    inverse = 1.0 / by
    tl.store(scale + row, by)
    for first in range(0, width, BLOCK):
        column = first + lane
        values = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        if FACTOR:
            values *= tl.load(factor + column, mask=column < width, other=0.0)
        tl.store(y + row * width + column, (values * inverse).to(y.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def _turn(x, top, common, y, rows, padded, width, y_stride, limit, most, COMMON: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=seen, other=0.0).to(tl.float32)
    largest = tl.load(top + row, mask=row < rows, other=0.0)
    if COMMON:
        by = tl.where(largest > _SMALLEST, largest / limit / tl.load(common), 0.0)
    else:
        by = factor_of(largest, limit)
    values = values * by[:, None]
    values = tl.where(values > most, most, tl.where(values < -most, -most, values))
    turned = tl.trans(values.to(y.dtype.element_ty))
    tl.store(y + column.to(tl.int64)[:, None] * y_stride + row[None, :], turned, mask=(column < width)[:, None] & (row < padded)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _round_both(x, factor, scale, top, y, turned, rows, padded, width, stride, most, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = row < rows
    seen = within[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    values = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(scale + row, mask=within, other=1.0)
    factors = tl.load(factor + column, mask=column < width, other=0.0)
    tl.store(y + at, (values * factors[None, :] * inverse[:, None]).to(y.dtype.element_ty), mask=seen)
    largest = tl.load(top + row, mask=within, other=0.0)
    values = values * factor_of(largest, most)[:, None]
    values = tl.where(values > most, most, tl.where(values < -most, -most, values))
    other = tl.trans(values.to(turned.dtype.element_ty))
    tl.store(turned + column.to(tl.int64)[:, None] * stride + row[None, :], other, mask=(column < width)[:, None] & (row < padded)[None, :])


@triton.jit
def _transpose(x, y, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=(row < rows)[:, None] & (column < width)[None, :], other=0)
    tl.store(y + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(values), mask=(column < width)[:, None] & (row < rows)[None, :])


def quantise(x: Tensor, factor: Tensor | None, *, into: Rounded | None = None) -> Rounded:
    """Round rows.

    Args:
        x: [R, C], rows contiguous.
        factor: [C] fp32 or None.
        into: where to write; None for a new place.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    y = Rounded.empty(rows, width, x.device) if into is None else into
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _quantise[(rows,)](
            x, factor, y.data, y.scale, y.top, width, x.stride(0),
            FACTOR=factor is not None, HELD=block >= width, BLOCK=block, num_warps=16 if block >= 8192 else 8 if block >= 2048 else 4,
        )  # fmt: skip
    return y


def round_transposed(x: Tensor, top: Tensor, out: Tensor, *, limit: float, common: Tensor | None) -> None:
    """Write the columns of ``x`` as rows of ``out``.

    Args:
        x: [R, C].
        top: [R] fp32.
        out: [C, R or more] of an 8-bit type, rows contiguous; what is past R becomes 0.
        limit: see the head of this file; without ``common`` it is also where a row's largest magnitude goes.
        common: a scalar on the device, or None.
    """
    x = x.contiguous()
    rows, width = x.shape
    padded = out.shape[1]
    if padded and width:
        grid = (triton.cdiv(padded, _ROWS), triton.cdiv(width, _COLUMNS))
        _turn[grid](
            x, top, common, out, rows, padded, width, out.stride(0), limit, torch.finfo(out.dtype).max,
            COMMON=common is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip


def round_both(x: Tensor, factor: Tensor, scale: Tensor, top: Tensor, out: Tensor) -> Rounded:
    """:func:`quantise` and :func:`round_transposed` (without ``common``, to the type's largest number) where the rows' sizes are known.

    Args:
        x: [R, C], contiguous.
        factor: [C] fp32.
        scale, top: [R, 1] and [R], what :func:`quantise` would find.
        out: [C, R or more], as :func:`round_transposed` takes it.
    """
    rows, width = x.shape
    y = Rounded(torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device), scale, top)
    padded = out.shape[1]
    if padded and width:
        _round_both[(triton.cdiv(padded, _ROWS), triton.cdiv(width, _COLUMNS))](
            x, factor, scale, top, y.data, out, rows, padded, width, out.stride(0), torch.finfo(out.dtype).max, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
    return y


def transpose(x: Tensor) -> Tensor:
    """[R, C] of an 8-bit type, contiguous, to [C, R], contiguous."""
    rows, width = x.shape
    y = torch.empty(width, rows, dtype=x.dtype, device=x.device)
    if rows and width:
        _transpose[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _ROWS))](
            x.view(torch.uint8), y.view(torch.uint8), rows, width, ROWS=_ROWS, COLUMNS=_ROWS, num_warps=8
        )
    return y
