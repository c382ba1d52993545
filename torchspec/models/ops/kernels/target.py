"""What the target says at a row, from its logits over the draft vocabulary and over the rest; twin: ``models/ops/head_loss.py:target_distribution``.

    total = logsumexp(kept)        p_w = exp(kept_w - total), written over kept_w in its type        whole = sum p
    best = argmax kept             inside = (max kept >= max rest)        mass = exp(total - logsumexp(kept and rest)) / whole

The losses read p up to 2K times. In bf16 each is off by up to 2^-8 of itself, as by rounding its logit to bf16 where that is above 1; of a target that is sure
the error is the largest p's alone, up to 2^-9, and the sum is as far from 1. So the sum is kept: losses count with it, and t = p mass adds up rightly.
One pass over the rest and two over what is kept, of which the second finds it in a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels.rounding import LOG2E

_LOW = tl.constexpr(-1e30)
_BLOCK, _WARPS = 8192, 8
VECTOR = 8
"""Neighbours that one thread takes together: what is kept of a pass over a row is one number for all of them."""


@triton.jit
def tile(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Columns of a block, [LANES, VECTOR]: those of a lane are neighbours."""
    return tl.arange(0, LANES)[:, None] * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)[None, :]


@triton.jit
def _pass(logits, width, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Of a row of logits, by lane: the largest, where the block that has it begins, and the sum of exponentials below the largest."""
    offset = tile(BLOCK, LANES)
    top, start, weight = tl.full([LANES], _LOW, tl.float32), tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + offset
        values = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        most = tl.max(values, axis=1)
        higher = tl.maximum(top, most)
        start = tl.where(most > top, first, start)
        weight = weight * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2(values * LOG2E - (higher * LOG2E)[:, None]), axis=1)
        top = higher
    return top, start, weight


@triton.jit
def first_of(logits, top, start, width, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The first column with the largest number of a row, given what :func:`_pass` found of it by lane; and that number. Of NaN alone too it is a column."""
    highest = tl.max(top, axis=0)
    group = start + tl.arange(0, LANES) * (BLOCK // LANES)
    column = tl.minimum(tl.min(tl.where(top == highest, group, width), axis=0), width) + tl.arange(0, BLOCK // LANES)
    values = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(values == highest, column, width - 1), axis=0), highest


@triton.jit
def _ask(
    kept, rest, best, inside, whole, mass, width, others, kept_stride, rest_stride, PRUNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = kept + row * kept_stride
    top, start, weight = _pass(own, width, BLOCK, LANES)
    answer, highest = first_of(own, top, start, width, BLOCK, LANES)
    among = tl.sum(weight * tl.exp2((top - highest) * LOG2E), axis=0)
    total = highest + tl.log(among)
    tl.store(best + row, answer)
    inner = 1.0
    if PRUNED:
        other_top, _, other_weight = _pass(rest + row * rest_stride, others, BLOCK, LANES)
        other = tl.max(other_top, axis=0)
        outside = tl.sum(other_weight * tl.exp2((other_top - other) * LOG2E), axis=0)
        tl.store(inside + row, (highest >= other).to(tl.int8))
        inner = 1.0 / (1.0 + outside / among * tl.exp(other - highest))
    else:
        tl.store(inside + row, tl.full([], 1, tl.int8))
    offset = tile(BLOCK, LANES)
    added = tl.zeros([LANES], tl.float32)
    tl.debug_barrier()
    for first in range(0, width, BLOCK):
        column = first + offset
        seen = column < width
        values = tl.load(own + column, mask=seen, other=float("-inf")).to(tl.float32)
        p = tl.exp2(values * LOG2E - total * LOG2E).to(kept.dtype.element_ty)
        tl.store(own + column, p, mask=seen)
        added += tl.sum(p.to(tl.float32), axis=1)
    every = tl.sum(added, axis=0)
    tl.store(whole + row, every)
    tl.store(mass + row, inner / every)


def ask(kept: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce logits.

    Args:
        kept: [R, W] logits of the draft vocabulary, rows contiguous; overwritten by p. Not in fp16, in which an improbable token's would be 0.
        rest: [R, V - W] logits of all other tokens, rows contiguous; None where there are none.

    Returns:
        best [R] int32, inside [R] int8, whole [R] fp32 (the sum of p as it is rounded), mass [R] fp32 (by which p is multiplied to be the target's own).
    """
    assert kept.dtype != torch.float16
    rows, width = kept.shape
    best = torch.empty(rows, dtype=torch.int32, device=kept.device)
    inside = torch.empty(rows, dtype=torch.int8, device=kept.device)
    whole, mass = (torch.empty(rows, dtype=torch.float32, device=kept.device) for _ in range(2))
    if rows:
        others, stride = (0, 0) if rest is None else (rest.shape[1], rest.stride(0))
        block = min(_BLOCK, triton.next_power_of_2(max(width, others, VECTOR)))
        _ask[(rows,)](
            kept, rest, best, inside, whole, mass, width, others, kept.stride(0), stride,
            PRUNED=rest is not None, BLOCK=block, LANES=block // VECTOR, num_warps=_WARPS if block >= 1024 else 4,
        )  # fmt: skip
    return best, inside, whole, mass
