"""Rows of one unroll step to the normed rows and the residual of the next, and their gradients back, each in one pass; twin: ``models/ops/layer_input.py``.

    n = to[p] >= 0:   y_n = norm(x_p)        r_n = x_p, or y_n where the residual is the normed row       (and norm(x_p) of every row where asked for)
    d_x_p = norm'(d_y_n + d_every_p [+ d_r_n]) [+ d_r_n] + d_state_p,  the terms of n only where there is one;      d_w: kernels/norm.py has the formulas

Sums of the weight's gradient stay apart by program and go on over all uses, so that one sum at the end serves them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels.norm import _blocks, programs


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weight, to, normed, residual, every, inverse, rows, width, eps,
    NORMED: tl.constexpr, EVERY: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    within = row < rows
    target = tl.load(to + row, mask=within, other=-1).to(tl.int64)
    kept = within & (target >= 0)
    used = within if EVERY else kept
    lane = column[None, :] < width
    own = row.to(tl.int64)[:, None] * width + column[None, :]
    put = target[:, None] * width + column[None, :]
    raw = tl.load(x + own, mask=used[:, None] & lane, other=0.0)
    wide = raw.to(tl.float32)
    inv = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    kind = normed.dtype.element_ty
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(kind).to(tl.float32)
    y = ((wide * inv[:, None]).to(kind).to(tl.float32) * scale[None, :]).to(kind)
    tl.store(normed + put, y, mask=kept[:, None] & lane)
    tl.store(residual + put, y if NORMED else raw, mask=kept[:, None] & lane)
    if EVERY:
        tl.store(every + own, y, mask=used[:, None] & lane)
    tl.store(inverse + row, inv, mask=used)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    d_normed, d_residual, d_every, d_state, x, weight, to, inverse, d_x, partial, rows, width, state_stride,
    NORMED: tl.constexpr, EVERY: tl.constexpr, STATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    lane = column[None, :] < width
    kind = x.dtype.element_ty
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(kind).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0) * BLOCK_ROWS
    start = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    following = tl.load(to + start, mask=start < rows, other=-1)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, step):
        row = first + tl.arange(0, BLOCK_ROWS)
        within = row < rows
        target = following.to(tl.int64)
        following = tl.load(to + row + step, mask=row + step < rows, other=-1)  # one round ahead: what is read next depends on it
        kept = within & (target >= 0)
        used = within if EVERY else kept
        own = row.to(tl.int64)[:, None] * width + column[None, :]
        got = target[:, None] * width + column[None, :]
        inv = tl.load(inverse + row, mask=used, other=0.0)
        unit = tl.load(x + own, mask=used[:, None] & lane, other=0.0).to(tl.float32) * inv[:, None]
        grad = tl.load(d_normed + got, mask=kept[:, None] & lane, other=0.0).to(tl.float32)
        more = tl.load(d_residual + got, mask=kept[:, None] & lane, other=0.0).to(tl.float32)
        if NORMED:
            grad += more
        if EVERY:
            grad += tl.load(d_every + own, mask=used[:, None] & lane, other=0.0).to(tl.float32)
        d_unit = grad * scale[None, :]
        result = (d_unit - unit * (tl.sum(d_unit * unit, axis=1) / width)[:, None]) * inv[:, None]
        if not NORMED:
            result += more
        if STATE:
            state = row.to(tl.int64)[:, None] * state_stride + column[None, :]
            result += tl.load(d_state + state, mask=within[:, None] & lane, other=0.0).to(tl.float32)
        tl.store(d_x + own, result.to(d_x.dtype.element_ty), mask=within[:, None] & lane)
        total += tl.sum(grad * unit.to(kind).to(tl.float32), axis=0)
    place = partial + tl.program_id(0).to(tl.int64) * width + column
    tl.store(place, tl.load(place, mask=column < width, other=0.0) + total, mask=column < width)


def forward(x: Tensor, weight: Tensor, eps: float, to: Tensor, number: int, *, normed_residual: bool, every: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm and take.

    Args:
        x: [P, H], contiguous.
        weight: [H].
        eps: added to the mean square.
        to: [P] row of the result that each row becomes, or -1.
        number: R, rows of the result; each is named once in ``to``.
        normed_residual: the residual is the normed row.
        every: also all rows, normed.

    Returns:
        normed and residual [R, H], in memory of their own; every [P, H], empty where not asked for; 1 / rms [P] fp32 of the rows that were normed.
    """
    rows, width = x.shape
    normed, residual = x.new_empty(number, width), x.new_empty(number, width)
    whole = torch.empty_like(x) if every else x.new_empty(0)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        high, block, warps = _blocks(width)
        _forward[(triton.cdiv(rows, high),)](
            x, weight, to, normed, residual, whole, inverse, rows, width, eps,
            NORMED=normed_residual, EVERY=every, BLOCK_ROWS=high, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return normed, residual, whole, inverse


def sums(width: int, device: torch.device) -> Tensor:
    """Zeros [programs, H] fp32 for the weight's gradient."""
    return torch.zeros(programs(width), width, dtype=torch.float32, device=device)


def backward(
    d_normed: Tensor, d_residual: Tensor, d_every: Tensor | None, d_state: Tensor | None, x: Tensor, weight: Tensor, to: Tensor, inverse: Tensor,
    partial: Tensor, *, normed_residual: bool,
) -> Tensor:  # fmt: skip
    """Gradients of :func:`forward`.

    Args:
        d_normed, d_residual: [R, H], contiguous.
        d_every: [P, H], contiguous; given where the forward made all rows.
        d_state: [P, H], rows contiguous: what reaches x another way.
        x, weight, to, inverse, normed_residual: of the forward.
        partial: from :func:`sums`; the weight's gradient is added to it.

    Returns:
        d_x [P, H].
    """
    rows, width = x.shape
    d_x = torch.empty_like(x)
    if rows:
        high, block, warps = _blocks(width)
        _backward[(min(partial.shape[0], triton.cdiv(rows, high)),)](
            d_normed, d_residual, d_every, d_state, x, weight, to, inverse, d_x, partial, rows, width, 0 if d_state is None else d_state.stride(0),
            NORMED=normed_residual, EVERY=d_every is not None, STATE=d_state is not None, BLOCK_ROWS=high, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return d_x
