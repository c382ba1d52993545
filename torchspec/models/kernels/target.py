"""What the target says at a row, from its logits over the whole vocabulary; twin: ``models/loss.py:target_distribution``.

    kept_w = whole[id_w]        best = argmax kept        inside = (max kept = max whole)
    total = logsumexp(kept)     mass = exp(total - logsumexp(whole))       p_w = exp(kept_w - total), not stored

One pass over V logits and one over the W kept ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW = tl.constexpr(-1e30)
_BLOCK = 2048


@triton.jit
def _row(values, column, seen, top, index, weight):
    """Lane-wise running maximum, its column, and the sum of exponentials below it."""
    higher = tl.maximum(top, values)
    index = tl.where(values > top, column, index)
    weight = weight * tl.exp(top - higher) + tl.where(seen, tl.exp(values - higher), 0.0)
    return higher, index, weight


@triton.jit
def _ask(whole, ids, kept, best, inside, total, mass, vocabulary, width, PRUNED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top, index, weight = tl.full([BLOCK], _LOW, tl.float32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        column = first + lane
        seen = column < vocabulary
        values = tl.load(whole + row * vocabulary + column, mask=seen, other=_LOW).to(tl.float32)
        top, index, weight = _row(values, column, seen, top, index, weight)
    highest = tl.max(top, axis=0)
    everything = highest + tl.log(tl.sum(weight * tl.exp(top - highest), axis=0))
    if PRUNED:
        top, index, weight = tl.full([BLOCK], _LOW, tl.float32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + lane
            seen = column < width
            token = tl.load(ids + column, mask=seen, other=0)
            raw = tl.load(whole + row * vocabulary + token, mask=seen, other=_LOW)
            tl.store(kept + row * width + column, raw, mask=seen)
            top, index, weight = _row(raw.to(tl.float32), column, seen, top, index, weight)
    among = tl.max(top, axis=0)
    tl.store(best + row, tl.min(tl.where(top == among, index, 2147483647), axis=0))
    tl.store(inside + row, (among == highest).to(tl.int8))
    own = among + tl.log(tl.sum(weight * tl.exp(top - among), axis=0))
    tl.store(total + row, own)
    tl.store(mass + row, tl.exp(own - everything))


def ask(whole: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reduce logits.

    Args:
        whole: [R, V] logits, contiguous.
        ids: [W] target ids of the draft rows; None for all.

    Returns:
        kept [R, W] (``whole`` itself without ids), best [R] int32, inside [R] int8, total [R] fp32, mass [R] fp32.
    """
    rows, vocabulary = whole.shape
    kept = whole if ids is None else whole.new_empty(rows, ids.shape[0])
    best = torch.empty(rows, dtype=torch.int32, device=whole.device)
    inside = torch.empty(rows, dtype=torch.int8, device=whole.device)
    total, mass = (torch.empty(rows, dtype=torch.float32, device=whole.device) for _ in range(2))
    if rows:
        _ask[(rows,)](
            whole, ids, kept, best, inside, total, mass, vocabulary, kept.shape[1],
            PRUNED=ids is not None, BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
        )  # fmt: skip
    return kept, best, inside, total, mass
