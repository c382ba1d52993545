"""The k single keys of an unroll step merged into causal attention, forward and backward; twin: ``models/ops/attention/torch.py``.

Forward, a row r and head at a time, with (O, L) the causal output and its log-sum-exp and s_e = q.k_e / sqrt(d):

    L' = log(exp(L) + sum_e exp(s_e)),        O' = exp(L - L') O + sum_e exp(s_e - L') v_e

Backward, with delta = dO'.O' and p_e = exp(s_e - L'):

    ds_e = p_e (dO'.v_e - delta) / sqrt(d),   dq += sum_e ds_e k_e,   dk_e += ds_e q,   dv_e += p_e dO'    (sums over the heads of a group)

Letters: N rows of the pack, R query rows, h heads, g key-value heads, d head size, E slots for later keys, M step-0 entries. Slots live at [entry, slot], and
a step of row r reads slots 0..count-1 of entry[r].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels import power_of_two


@triton.jit(do_not_specialize=["count", "l_row", "l_head"], do_not_specialize_on_alignment=["rows"])
def _forward(
    causal, causal_lse, query, extra_key, extra_value, rows, entries, out, lse, count, group, size, heads, slots, scale, c_row, c_head, l_row, l_head,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program does one row and one key-value head."""
    r, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, column = tl.arange(0, GROUP), tl.arange(0, SIZE)
    head = (g * group + member).to(tl.int64)  # heads of a long pack may be more than 2^31 elements apart
    mine = member < group
    seen = mine[:, None] & (column[None, :] < size)
    n = tl.load(rows + r).to(tl.int64)
    own = head[:, None] * size + column[None, :]
    q = tl.load(query + n * heads * size + own, mask=seen, other=0.0).to(tl.float32)
    total = tl.load(causal + n * c_row + head[:, None] * c_head + column[None, :], mask=seen, other=0.0).to(tl.float32)
    top = tl.load(causal_lse + n * l_row + head * l_head, mask=mine, other=0.0)
    key_heads = heads // group
    base = ((tl.load(entries + r).to(tl.int64) * slots) * key_heads + g) * size + column
    slot = tl.arange(0, SLOTS)
    place = base[None, :] + slot[:, None] * key_heads * size
    read = (slot < count)[:, None] & (column < size)[None, :]
    k = tl.load(extra_key + place, mask=read, other=0.0).to(tl.float32)
    v = tl.load(extra_value + place, mask=read, other=0.0).to(tl.float32)
    score = tl.where((slot < count)[None, :], tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale, float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1))
    old, new = tl.exp(top - higher), tl.exp(score - higher[:, None])
    weight = old + tl.sum(new, axis=1)
    total = total * old[:, None] + tl.sum(new[:, :, None] * v[None, :, :], axis=1)
    tl.store(out + r * heads * size + own, (total / weight[:, None]).to(out.dtype.element_ty), mask=seen)
    tl.store(lse + r * heads + head, higher + tl.log(weight), mask=mine)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows", "seen_before"])
def _backward(
    grad, query, out, lse, extra_key, extra_value, causal_d_query, rows, entries, seen_before, d_query, d_key, d_value, count, group, size, heads, slots, scale,
    c_row, c_head,
    FRESH: tl.constexpr, LOOK: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program does one row and one key-value head."""
    r, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, column = tl.arange(0, GROUP), tl.arange(0, SIZE)
    head = (g * group + member).to(tl.int64)  # heads of a long pack may be more than 2^31 elements apart
    mine = member < group
    seen = mine[:, None] & (column[None, :] < size)
    n = tl.load(rows + r).to(tl.int64)
    own = head[:, None] * size + column[None, :]
    at = r * heads * size + own
    q = tl.load(query + n * heads * size + own, mask=seen, other=0.0).to(tl.float32)
    d_out = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32)
    delta = tl.sum(d_out * tl.load(out + at, mask=seen, other=0.0).to(tl.float32), axis=1)
    merged = tl.load(lse + r * heads + head, mask=mine, other=float("inf"))
    total = tl.load(causal_d_query + n * c_row + head[:, None] * c_head + column[None, :], mask=seen, other=0.0).to(tl.float32)
    key_heads = heads // group
    base = ((tl.load(entries + r).to(tl.int64) * slots) * key_heads + g) * size + column
    slot = tl.arange(0, SLOTS)
    place = base[None, :] + slot[:, None] * key_heads * size
    read = (slot < count)[:, None] & (column < size)[None, :]
    k = tl.load(extra_key + place, mask=read, other=0.0).to(tl.float32)
    v = tl.load(extra_value + place, mask=read, other=0.0).to(tl.float32)
    if FRESH:
        sum_key, sum_value = tl.zeros([SLOTS, SIZE], tl.float32), tl.zeros([SLOTS, SIZE], tl.float32)
    else:
        summed = read
        if LOOK:
            summed = read & (tl.load(seen_before + r + slot * 0) >= 0)[:, None]
        sum_key = tl.load(d_key + place, mask=summed, other=0.0)
        sum_value = tl.load(d_value + place, mask=summed, other=0.0)
    p = tl.exp(tl.sum(q[:, None, :] * k[None, :, :], axis=2) * scale - merged[:, None])
    d_score = p * (tl.sum(d_out[:, None, :] * v[None, :, :], axis=2) - delta[:, None]) * scale
    total += tl.sum(tl.where((slot < count)[None, :, None], d_score[:, :, None] * k[None, :, :], 0.0), axis=1)
    tl.store(d_key + place, sum_key + tl.sum(d_score[:, :, None] * q[:, None, :], axis=0), mask=read)
    tl.store(d_value + place, sum_value + tl.sum(p[:, :, None] * d_out[:, None, :], axis=0), mask=read)
    tl.store(d_query + at, total.to(d_query.dtype.element_ty), mask=seen)


def _shape(group: int, count: int, size: int) -> dict[str, int]:
    """Blocks of a program, and its warps: one for up to 128 numbers of a thread, for sums within a warp need no shared memory."""
    blocks = {"GROUP": power_of_two(group), "SLOTS": power_of_two(max(count, 1)), "SIZE": power_of_two(size)}
    return {**blocks, "num_warps": min(8, max(1, math.prod(blocks.values()) // 4096))}


def forward(
    causal: Tensor, causal_lse: Tensor, query: Tensor, extra_key: Tensor, extra_value: Tensor, *, rows: Tensor, entries: Tensor, count: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Merge.

    Args:
        causal: [N, h, d] causal output, any strides of rows and heads; rows ``rows`` are read.
        causal_lse: [N, h] fp32, any strides.
        query: [N, h, d], contiguous; rows ``rows`` are read.
        extra_key, extra_value: [M, E, g, d].
        rows: [R] pack rows.
        entries: [R] rows of the slots.
        count: slots to read, may be 0.
        scale: on scores.

    Returns:
        out [R, h, d] in the type of ``query``; lse [R, h] fp32.
    """
    number, heads, size = rows.shape[0], *query.shape[1:]
    groups, slots = extra_key.shape[2], extra_key.shape[1]
    causal = causal if causal.stride(2) == 1 else causal.contiguous()
    out, lse = query.new_empty(number, heads, size), torch.empty(number, heads, dtype=torch.float32, device=query.device)
    if number:
        _forward[(number, groups)](
            causal, causal_lse, query, extra_key, extra_value, rows, entries, out, lse, count, heads // groups, size, heads, slots, scale,
            causal.stride(0), causal.stride(1), causal_lse.stride(0), causal_lse.stride(1),
            **_shape(heads // groups, count, size),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, extra_key: Tensor, extra_value: Tensor, causal_d_query: Tensor, d_key: Tensor, d_value: Tensor,
    *, rows: Tensor, entries: Tensor, count: int, scale: float, fresh: bool = False, before: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of :func:`forward`.

    Args:
        grad: [R, h, d] of the result, contiguous.
        query, out, lse: given to and returned by the forward.
        causal_d_query: [N, h, d] query gradient of the causal part, given the merged output and log-sum-exp; any strides of rows and heads.
        d_key, d_value: [M, E, g, d] fp32; the slots' gradients are added to them.
        fresh: they hold nothing yet, at no entry.
        before: [R] negative where they hold nothing yet at a row's entry; None where they do everywhere.
        extra_key, extra_value, rows, entries, count, scale: as in the forward.

    Returns:
        d_query [R, h, d], both parts, in the type of ``query``.
    """
    number, heads, size = grad.shape
    groups, slots = extra_key.shape[2], extra_key.shape[1]
    causal_d_query = causal_d_query if causal_d_query.stride(2) == 1 else causal_d_query.contiguous()
    d_query = query.new_empty(number, heads, size)
    if number:
        _backward[(number, groups)](
            grad, query, out, lse, extra_key, extra_value, causal_d_query, rows, entries, before, d_query, d_key, d_value, count, heads // groups, size,
            heads, slots, scale, causal_d_query.stride(0), causal_d_query.stride(1), FRESH=fresh, LOOK=before is not None,
            **_shape(heads // groups, count, size),
        )  # fmt: skip
    return d_query
