"""The result of the input projection to turned heads where attention reads them, and their gradients back, each in one pass.

Twin: ``models/ops/rope.py:rotate``.

    flat row r = [h query heads; g key heads; g value heads] of d          query and key heads are turned by the row's angles, value heads are not

Queries go to the pack's rows, with zeros where a pack row asks nothing; keys and values to the pack's rows or, in a later step, to a slot of their entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels import power_of_two

_ELEMENTS = 2048
"""Of a half that a program turns."""


@triton.jit(do_not_specialize=["positions", "rows"], do_not_specialize_on_alignment=["where"])
def _split(
    flat, cos, sin, where, entries, query, key, value, positions, rows, queries, keys, half, f_row, k_row,
    WHERE: tl.constexpr, SLOTTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program does HEADS heads of one kind at BLOCK_ROWS positions; from ``rows`` on there is nothing."""
    position = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * HEADS
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    if WHERE:
        row = tl.load(where + position, mask=position < rows, other=-1).to(tl.int64)
    else:
        row = tl.where(position < rows, position, -1).to(tl.int64)
    asked = row >= 0
    inside = (column < half)[None, None, :]
    read = asked[:, None, None] & inside
    base = flat + row[:, None, None] * f_row + (first + head)[None, :, None] * 2 * half + column[None, None, :]
    low = tl.load(base, mask=read, other=0.0).to(tl.float32)
    high = tl.load(base + half, mask=read, other=0.0).to(tl.float32)
    if first < queries + keys:
        angle = row[:, None] * half + column[None, :]
        moves = asked[:, None] & (column < half)[None, :]
        c = tl.load(cos + angle, mask=moves, other=1.0)[:, None, :]
        s = tl.load(sin + angle, mask=moves, other=0.0)[:, None, :]
        low, high = low * c - high * s, high * c + low * s
    kind = flat.dtype.element_ty
    place = position.to(tl.int64)
    written = position < positions
    if first < queries:
        into = query + place[:, None, None] * queries * 2 * half + (first + head)[None, :, None] * 2 * half + column[None, None, :]
        tl.store(into, low.to(kind), mask=written[:, None, None] & inside)
        tl.store(into + half, high.to(kind), mask=written[:, None, None] & inside)
    else:
        if SLOTTED:
            place = tl.load(entries + row, mask=asked, other=0).to(tl.int64)
            written = asked
        if first < queries + keys:
            into = key + place[:, None, None] * k_row + (first - queries + head)[None, :, None] * 2 * half + column[None, None, :]
            tl.store(into, low.to(kind), mask=written[:, None, None] & inside)
            tl.store(into + half, high.to(kind), mask=written[:, None, None] & inside)
        else:
            into = value + place[:, None, None] * k_row + (first - queries - keys + head)[None, :, None] * 2 * half + column[None, None, :]
            tl.store(into, low.to(kind), mask=written[:, None, None] & inside)
            tl.store(into + half, high.to(kind), mask=written[:, None, None] & inside)


@triton.jit(do_not_specialize=["rows"])
def _join(
    d_query, d_key, d_value, cos, sin, entries, d_flat, rows, queries, keys, half, k_row,
    SLOTTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program does HEADS heads of one kind of BLOCK_ROWS rows."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    within = row < rows
    seen = within[:, None, None] & (column < half)[None, None, :]
    own = (first + head)[None, :, None] * 2 * half + column[None, None, :]
    if first < queries:
        from_query = d_query + row[:, None, None] * queries * 2 * half + own
        low = tl.load(from_query, mask=seen, other=0.0).to(tl.float32)
        high = tl.load(from_query + half, mask=seen, other=0.0).to(tl.float32)
    else:
        place = row
        if SLOTTED:
            place = tl.load(entries + row, mask=within, other=0).to(tl.int64)
        if first < queries + keys:
            from_key = d_key + place[:, None, None] * k_row + own - queries * 2 * half
            low = tl.load(from_key, mask=seen, other=0.0).to(tl.float32)
            high = tl.load(from_key + half, mask=seen, other=0.0).to(tl.float32)
        else:
            from_value = d_value + place[:, None, None] * k_row + own - (queries + keys) * 2 * half
            low = tl.load(from_value, mask=seen, other=0.0).to(tl.float32)
            high = tl.load(from_value + half, mask=seen, other=0.0).to(tl.float32)
    if first < queries + keys:
        angle = row[:, None] * half + column[None, :]
        moves = within[:, None] & (column < half)[None, :]
        c = tl.load(cos + angle, mask=moves, other=1.0)[:, None, :]
        s = tl.load(sin + angle, mask=moves, other=0.0)[:, None, :]
        low, high = low * c + high * s, high * c - low * s
    kind = d_flat.dtype.element_ty
    into = d_flat + row[:, None, None] * (queries + 2 * keys) * 2 * half + own
    tl.store(into, low.to(kind), mask=seen)
    tl.store(into + half, high.to(kind), mask=seen)


def _blocks(queries: int, keys: int, size: int) -> tuple[int, int, int]:
    """Rows and heads of a block (heads that divide both numbers), and the padded half."""
    heads, half = queries | keys, power_of_two(size // 2)
    heads = min(heads & -heads, max(1, _ELEMENTS // half))
    return max(1, _ELEMENTS // (heads * half)), heads, half


def split(
    flat: Tensor, cos: Tensor, sin: Tensor, *, query: Tensor | None, key: Tensor | None, value: Tensor | None, where: Tensor | None, entries: Tensor | None
) -> None:
    """Fill ``query``, or ``key`` and ``value``, or all three.

    Args:
        flat: [R, (h + 2g) d], rows contiguous; without queries h is 0, without keys g is.
        cos, sin: [R, .., d / 2] fp32, contiguous.
        query: [P, h, d], contiguous.
        key, value: [P, g, d], or with ``entries`` [M, g, d]; heads contiguous, equal strides.
        where: [N] row of each position, or -1; None: rows stand in order. From N (or R) on, and where it is negative, zeros are written.
        entries: [R] rows of ``key`` and ``value`` that each row goes to; nothing is written to others.
    """
    queries, keys = 0 if query is None else query.shape[1], 0 if key is None else key.shape[1]
    query, key, value = _filled(query, key, value)
    assert flat.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    size, rows = query.shape[-1], flat.shape[0] if where is None else where.shape[0]
    positions = query.shape[0] if queries or entries is None else rows
    high, heads, half = _blocks(queries, keys, size)
    if positions and flat.shape[1]:
        _split[(triton.cdiv(positions, high), (queries + 2 * keys) // heads)](
            flat, cos, sin, where, entries, query, key, value, positions, rows, queries, keys, size // 2, flat.stride(0), key.stride(0),
            WHERE=where is not None, SLOTTED=entries is not None, BLOCK_ROWS=high, HEADS=heads, HALF=half, num_warps=4,
        )  # fmt: skip


def _filled(query: Tensor | None, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with one that is there for each that is not: a kernel wants a pointer also where it does not follow it."""
    if key is None or value is None:
        assert query is not None and key is None and value is None and query.is_contiguous()
        return query, query, query
    assert key.stride() == value.stride() and key.stride()[1:] == (key.shape[2], 1) and (query is None or query.is_contiguous())
    return key if query is None else query, key, value


def join(
    number: int, cos: Tensor, sin: Tensor, *, d_query: Tensor | None, d_key: Tensor | None, d_value: Tensor | None, entries: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient of ``flat`` [R, (h + 2g) d] in ``dtype``.

    Args:
        number: R.
        cos, sin: of the forward.
        d_query: [R, h, d], contiguous, or None.
        d_key, d_value: [R or more, g, d], or with ``entries`` [M, g, d]; any type, heads contiguous, equal strides; or None.
        entries: rows of ``d_key`` and ``d_value`` that are each row's.
    """
    queries, keys = 0 if d_query is None else d_query.shape[1], 0 if d_key is None else d_key.shape[1]
    d_query, d_key, d_value = _filled(d_query, d_key, d_value)
    size = d_query.shape[-1]
    high, heads, half = _blocks(queries, keys, size)
    d_flat = torch.empty(number, (queries + 2 * keys) * size, dtype=dtype, device=d_query.device)
    if number:
        _join[(triton.cdiv(number, high), (queries + 2 * keys) // heads)](
            d_query, d_key, d_value, cos, sin, entries, d_flat, number, queries, keys, size // 2, d_key.stride(0),
            SLOTTED=entries is not None, BLOCK_ROWS=high, HEADS=heads, HALF=half, num_warps=4,
        )  # fmt: skip
    return d_flat
