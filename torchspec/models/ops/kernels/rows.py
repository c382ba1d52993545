"""Moving rows: spreading some over a longer, otherwise constant tensor, taking some of two tensors side by side, and adding to fp32 sums (rows are
distinct, so no atomics are needed); and scaling a whole tensor by a number that is on the device."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["positions", "total"], do_not_specialize_on_alignment=["where"])
def _spread(
    x, more, third, column, where, result, more_result, third_result, column_result, positions, total, width, heads,
    SECOND: tl.constexpr, THIRD: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = at < width
    source = tl.load(where + row, mask=row < positions, other=-1).to(tl.int64)
    found = seen & (at * 0 + source >= 0)
    tl.store(result + row * width + at, tl.load(x + source * width + at, mask=found, other=0.0), mask=seen)
    if SECOND:
        tl.store(more_result + row * width + at, tl.load(more + source * width + at, mask=found, other=0.0), mask=seen)
    if THIRD:
        tl.store(third_result + row * width + at, tl.load(third + source * width + at, mask=found, other=0.0), mask=seen)
    if COLUMN:  # there are more elements in a row than heads
        values = tl.load(column + source * heads + at, mask=found & (at < heads), other=float("inf"))
        tl.store(column_result + at.to(tl.int64) * total + row, values, mask=at < heads)


@triton.jit
def _gather(key, value, key_sum, value_sum, width, k_row, v_row, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    k = tl.load(key + row * k_row + column, mask=seen, other=0.0).to(tl.float32)
    v = tl.load(value + row * v_row + column, mask=seen, other=0.0).to(tl.float32)
    at = row * width + column
    if not FIRST:
        k += tl.load(key_sum + at, mask=seen, other=0.0)
        v += tl.load(value_sum + at, mask=seen, other=0.0)
    tl.store(key_sum + at, k, mask=seen)
    tl.store(value_sum + at, v, mask=seen)


@triton.jit
def _put(target, source, seen, ONTO: tl.constexpr):
    values = tl.load(source, mask=seen)
    if ONTO:
        values = (values.to(tl.float32) + tl.load(target, mask=seen).to(tl.float32)).to(values.dtype)
    tl.store(target, values, mask=seen)


@triton.jit(do_not_specialize=["shift", "more_shift"], do_not_specialize_on_alignment=["place", "more_place"])
def _beside(
    x, more, place, more_place, result, shift, more_shift, width, more_width, stride, more_stride, blocks,
    PLACED: tl.constexpr, MORE_PLACED: tl.constexpr, ONTO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    into = result + row * (width + more_width)
    source = row
    if block < blocks:
        if PLACED:
            source = tl.load(place + row).to(tl.int64) + shift
        column = block * BLOCK + lane
        _put(into + column, x + source * stride + column, column < width, ONTO)
    else:
        if MORE_PLACED:
            source = tl.load(more_place + row).to(tl.int64) + more_shift
        column = (block - blocks) * BLOCK + lane
        _put(into + width + column, more + source * more_stride + column, column < more_width, ONTO)


@triton.jit(do_not_specialize=["shift", "more_shift"], do_not_specialize_on_alignment=["place", "more_place"])
def _add(
    total, more, place, more_place, x, shift, more_shift, width, more_width, stride, more_stride, blocks, x_stride,
    PLACED: tl.constexpr, MORE_PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    source = x + row * x_stride
    target = row
    if block < blocks:
        if PLACED:
            target = tl.load(place + row).to(tl.int64) + shift
        column = block * BLOCK + lane
        at = total + target * stride + column
        seen = column < width
        tl.store(at, tl.load(at, mask=seen, other=0.0) + tl.load(source + column, mask=seen, other=0.0).to(tl.float32), mask=seen)
    else:
        if MORE_PLACED:
            target = tl.load(more_place + row).to(tl.int64) + more_shift
        column = (block - blocks) * BLOCK + lane
        at = more + target * more_stride + column
        seen = column < more_width
        tl.store(at, tl.load(at, mask=seen, other=0.0) + tl.load(source + width + column, mask=seen, other=0.0).to(tl.float32), mask=seen)


@triton.jit
def _scale(x, factor, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        tl.store(x + at, (tl.load(x + at, mask=at < total).to(tl.float32) * by).to(x.dtype.element_ty), mask=at < total)


def spread(tensors: Sequence[Tensor], where: Tensor, total: int, *, lse: Tensor | None = None) -> list[Tensor]:
    """Up to three tensors [R, h, d] of one shape to [P, h, d]: row n is ``x[where[n]]``, or zeros where that is negative and from N on.

    Args:
        tensors: of one shape and type.
        where: [N] integers.
        total: P, at least N.
        lse: [R, h], to come as [h, P], infinite where the others are zero.

    Returns:
        The spread ones in their order, ``lse`` after them.
    """
    given = [x.contiguous() for x in tensors]
    results = [x.new_empty(total, *x.shape[1:]) for x in given]
    width, heads = results[0].shape[1] * results[0].shape[2], results[0].shape[1]
    column = given[0] if lse is None else lse.contiguous()
    turned = results[0] if lse is None else lse.new_empty(heads, total)
    if total and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        full = [*given, *[given[0]] * (3 - len(given))], [*results, *[results[0]] * (3 - len(given))]
        _spread[(total, triton.cdiv(width, block))](
            *full[0], column, where, *full[1], turned, where.shape[0], total, width, heads,
            SECOND=len(given) > 1, THIRD=len(given) > 2, COLUMN=lse is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return results if lse is None else [*results, turned]


def gather(key: Tensor, value: Tensor, sums: tuple[Tensor, Tensor], *, first: bool) -> None:
    """Add two tensors to their sums in fp32, or put them there.

    Args:
        key, value: [N, g, d].
        sums: [N, g, d] fp32 each, contiguous.
        first: the sums hold nothing yet.
    """
    key, value = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (key, value))
    rows, width = key.shape[0], key.shape[1] * key.shape[2]
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _gather[(rows, triton.cdiv(width, block))](key, value, *sums, width, key.stride(0), value.stride(0), FIRST=first, BLOCK=block, num_warps=4)


Part = tuple[Tensor, Tensor | None, int]
"""A tensor [M, C], rows contiguous, and distinct rows of it: ``place + shift`` with place [R], or the first R where that is None."""


def beside(parts: Sequence[Part], number: int, *, onto: Tensor | None = None) -> Tensor:
    """Rows of one or two tensors next to each other, [R, sum of their widths].

    Args:
        parts: of one type.
        number: R.
        onto: to add them to, of that size and type, contiguous; it is what is returned.
    """
    (x, place, shift), (more, more_place, more_shift) = parts[0], parts[-1]
    width, more_width = x.shape[1], more.shape[1] if len(parts) > 1 else 0
    result = x.new_empty(number, width + more_width) if onto is None else onto
    if number and result.shape[1]:
        block = min(_BLOCK, triton.next_power_of_2(max(width, more_width)))
        blocks = triton.cdiv(width, block)
        _beside[(number, blocks + triton.cdiv(more_width, block))](
            x, more, place, more_place, result, shift, more_shift, width, more_width, x.stride(0), more.stride(0), blocks,
            PLACED=place is not None, MORE_PLACED=more_place is not None, ONTO=onto is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return result


def add(parts: Sequence[Part], x: Tensor) -> None:
    """The other way round: columns of ``x`` added to rows of one or two fp32 sums.

    Args:
        parts: the sums.
        x: [R, sum of their widths], rows contiguous.
    """
    (total, place, shift), (more, more_place, more_shift) = parts[0], parts[-1]
    width, more_width = total.shape[1], more.shape[1] if len(parts) > 1 else 0
    if x.numel():
        block = min(_BLOCK, triton.next_power_of_2(max(width, more_width)))
        blocks = triton.cdiv(width, block)
        _add[(x.shape[0], blocks + triton.cdiv(more_width, block))](
            total, more, place, more_place, x, shift, more_shift, width, more_width, total.stride(0), more.stride(0), blocks, x.stride(0),
            PLACED=place is not None, MORE_PLACED=more_place is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip


def scale(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` in fp32, for contiguous ``x`` and a scalar on its device. A factor of 1 moves no memory."""
    if x.numel():
        _scale[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=8)
