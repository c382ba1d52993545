"""Attention of the EAGLE-3 unroll, forward and backward, without a T x T matrix.

At step k the query of position t attends, in one softmax, to the step-0 keys of its own conversation up to t and to its own later keys:

    keys(t) = { K_0[s], s <= t }  u  { k_i[t], i = 1..k }

The first part is ordinary causal attention; the second is k single keys a row. Both are merged through the log-sum-exp. For the backward,
p = exp(score - lse) and delta = sum(dO * O) with the *merged* lse and output give the exact gradient of each part, so a flash backward that is handed
the merged pair is right for the first part as it stands (Dao, FlashAttention-2, arXiv 2307.08691, section 3.2).

Queries may cover a subset of the rows (only supervised positions need an output). Two paths, equal in value and gradient: torch's varlen flash kernel on
CUDA in half precision, and a blocked one everywhere else, which computes in fp32 (fp64 for fp64 inputs).

Letters: N rows of the pack, R query rows, h heads, g key-value heads, d head size, E extra keys (= k).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
"""Query rows of a block: scores take h x 256 x T."""


def unroll_attention(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor | None, extra_value: Tensor | None, *, rows: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Attend.

    Args:
        query: [R, h, d], after RoPE.
        key, value: [N, g, d] of step 0, key after RoPE; g divides h, and query head i uses key-value head i // (h / g).
        extra_key, extra_value: [R, E, g, d] of the rows' own later steps, or None at step 0.
        rows: [R] pack position of each query, increasing.
        cu_seqlens: [S+1] int32 on the host.

    Returns:
        [R, h, d] in the type of ``query``.
    """
    if extra_key is None or extra_value is None:
        extra_key = extra_value = key.new_empty(query.shape[0], 0, *key.shape[1:])
    attended: Tensor = _UnrollAttention.apply(query, key, value, extra_key, extra_value, rows, cu_seqlens)
    return attended


class _UnrollAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
        causal = _flash_forward if flash else _blocked_forward
        out, lse = causal(query, key, value, rows, cu_seqlens, scale)
        if extra_key.shape[1]:
            out, lse = _merge(out, lse, query, extra_key, extra_value, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, extra_key, extra_value, out, lse, rows, cu_seqlens)
        ctx.flash = flash
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, extra_key, extra_value, out, lse, rows, cu_seqlens = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = grads[0].contiguous()
        causal = _flash_backward if ctx.flash else _blocked_backward
        d_query, d_key, d_value = causal(grad, query, key, value, out, lse, rows, cu_seqlens, scale)
        if not extra_key.shape[1]:
            return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None, None
        more, d_extra_key, d_extra_value = _merge_backward(grad, query, extra_key, extra_value, out, lse, scale)
        d_query = d_query.to(more.dtype) + more
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), d_extra_key.to(key.dtype), d_extra_value.to(value.dtype), None, None


def _wide(t: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return t if t.dtype == torch.float64 else t.float()


# -- the k single keys


def _grouped(query: Tensor, heads: int) -> Tensor:
    """[R, h, d] as [R, g, h/g, d] in wide type."""
    return _wide(query).unflatten(1, (heads, -1))


def _merge(out: Tensor, lse: Tensor, query: Tensor, extra_key: Tensor, extra_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add the single keys to causal (out [R, h, d], lse [R, h])."""
    q = _grouped(query, extra_key.shape[2])
    score = torch.einsum("rgqd,regd->rgqe", q, _wide(extra_key)).flatten(1, 2) * scale
    merged = torch.logaddexp(lse, torch.logsumexp(score, dim=-1))
    p = torch.exp(score - merged[..., None]).unflatten(1, q.shape[1:3])
    added = torch.einsum("rgqe,regd->rgqd", p, _wide(extra_value)).flatten(1, 2)
    return _wide(out) * torch.exp(lse - merged)[..., None] + added, merged


def _merge_backward(
    grad: Tensor, query: Tensor, extra_key: Tensor, extra_value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups = extra_key.shape[2]
    q, g = _grouped(query, groups), _grouped(grad, groups)
    ek, ev = _wide(extra_key), _wide(extra_value)
    p = torch.exp(torch.einsum("rgqd,regd->rgqe", q, ek) * scale - lse.unflatten(1, q.shape[1:3])[..., None])
    delta = (g * _grouped(out, groups)).sum(-1, keepdim=True)
    d_score = p * (torch.einsum("rgqd,regd->rgqe", g, ev) - delta) * scale
    d_query = torch.einsum("rgqe,regd->rgqd", d_score, ek).flatten(1, 2)
    return d_query, torch.einsum("rgqe,rgqd->regd", d_score, q), torch.einsum("rgqe,rgqd->regd", p, g)


# -- causal part, blocked


def _blocks(rows: Tensor, cu_seqlens: Tensor) -> list[tuple[int, int, int, int]]:
    """(first query row, end, first key row, end) of each block; a block stays in one conversation, and its keys end with its last query."""
    bounds = cu_seqlens.tolist()
    positions = rows.cpu()
    cuts = torch.searchsorted(positions, torch.tensor(bounds)).tolist()
    found = []
    for low, high, start in zip(cuts[:-1], cuts[1:], bounds[:-1], strict=True):
        for first in range(low, high, _BLOCK):
            end = min(first + _BLOCK, high)
            found.append((first, end, start, int(positions[end - 1]) + 1))
    return found


def _scores(query: Tensor, key: Tensor, rows: Tensor, start: int, scale: float) -> tuple[Tensor, Tensor]:
    """Masked scores [g, (h/g) * b, s] of a block, and its queries [g, (h/g) * b, d]."""
    groups = key.shape[1]
    q = _wide(query).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [g, h/g, b, d]
    q = q.reshape(groups, -1, q.shape[-1])
    score = torch.matmul(q, _wide(key).permute(1, 2, 0)) * scale
    later = torch.arange(start, start + key.shape[0], device=key.device)[None, :] > rows[:, None]
    score.view(groups, -1, *later.shape).masked_fill_(later, -torch.inf)
    return score, q


def _ungroup(x: Tensor, block: int) -> Tensor:
    """[g, (h/g) * b, d] back to [b, h, d]."""
    return x.unflatten(1, (-1, block)).permute(2, 0, 1, 3).flatten(1, 2)


def _blocked_forward(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, dtype=_wide(query).dtype)
    lse = out.new_empty(query.shape[:2])
    for first, end, start, stop in _blocks(rows, cu_seqlens):
        score, _ = _scores(query[first:end], key[start:stop], rows[first:end], start, scale)
        total = torch.logsumexp(score, dim=-1)
        p = score.sub_(total[..., None]).exp_()
        out[first:end] = _ungroup(torch.matmul(p, _wide(value[start:stop]).transpose(0, 1)), end - first)
        lse[first:end] = _ungroup(total[..., None], end - first)[..., 0]
    return out, lse


def _blocked_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_query = torch.empty_like(query, dtype=_wide(query).dtype)
    d_key, d_value = torch.zeros_like(key, dtype=d_query.dtype), torch.zeros_like(value, dtype=d_query.dtype)
    delta = (_wide(grad) * _wide(out)).sum(-1)
    groups = key.shape[1]

    def by_group(x: Tensor) -> Tensor:  # [b, h, d] -> [g, (h/g) * b, d]
        return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(groups, -1, x.shape[-1])

    for first, end, start, stop in _blocks(rows, cu_seqlens):
        score, q = _scores(query[first:end], key[start:stop], rows[first:end], start, scale)
        p = score.sub_(by_group(lse[first:end, :, None])).exp_()
        g = by_group(_wide(grad[first:end]))
        d_value[start:stop] += torch.matmul(p.transpose(1, 2), g).transpose(0, 1)
        d_score = torch.matmul(g, _wide(value[start:stop]).permute(1, 2, 0)).sub_(by_group(delta[first:end, :, None])).mul_(p).mul_(scale)
        d_query[first:end] = _ungroup(torch.matmul(d_score, _wide(key[start:stop]).transpose(0, 1)), end - first)
        d_key[start:stop] += torch.matmul(d_score.transpose(1, 2), q).transpose(0, 1)
    return d_query, d_key, d_value


# -- causal part, torch's varlen flash kernel (all rows of the pack; rows without a query cost little and are dropped)


def _spread(x: Tensor, rows: Tensor, total: int) -> Tensor:
    """[R, ...] at its pack positions in zeros [N, ...]."""
    if x.shape[0] == total:
        return x
    return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    total = key.shape[0]
    cu = cu_seqlens.to(query.device, torch.int32, non_blocking=True)
    longest = int(cu_seqlens.diff().max())
    out, lse, *_ = torch.ops.aten._flash_attention_forward(_spread(query, rows, total), key, value, cu, cu, longest, longest, 0.0, True, False, scale=scale)
    lse = lse.transpose(0, 1)  # [N, h]
    return (out, lse) if query.shape[0] == total else (out[rows], lse[rows])


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = key.shape[0]
    cu = cu_seqlens.to(query.device, torch.int32, non_blocking=True)
    longest = int(cu_seqlens.diff().max())
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    spread_lse = lse if lse.shape[0] == total else lse.new_full((total, lse.shape[1]), torch.inf).index_copy_(0, rows, lse)
    d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
        _spread(grad, rows, total), _spread(query, rows, total), key, value, _spread(out, rows, total), spread_lse.transpose(0, 1).contiguous(),
        cu, cu, longest, longest, 0.0, True, state, state.new_empty(0), scale=scale,
    )  # fmt: skip
    return (d_query if query.shape[0] == total else d_query[rows]), d_key, d_value
