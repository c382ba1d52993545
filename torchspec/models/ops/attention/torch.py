"""Attention of an unroll step in plain torch, for every device: the causal part in blocks of rows, without a T x T matrix, and the k single keys.

It computes in fp32 (fp64 for fp64 inputs). ``attention.py`` has the mathematics and the letters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256
"""Query rows of a block: scores take h x 256 x T."""


def _wide(t: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return t if t.dtype == torch.float64 else t.float()


# -- the k single keys


def _grouped(query: Tensor, heads: int) -> Tensor:
    """[R, h, d] as [R, g, h/g, d] in wide type."""
    return _wide(query).unflatten(1, (heads, -1))


def merge(out: Tensor, lse: Tensor, query: Tensor, extra_key: Tensor, extra_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Add the single keys, extra_key and extra_value [R, k, g, d], to causal (out [R, h, d], lse [R, h]); query is [R, h, d]. Returns both, merged."""
    q = _grouped(query, extra_key.shape[2])
    score = torch.einsum("rgqd,regd->rgqe", q, _wide(extra_key)).flatten(1, 2) * scale
    merged = torch.logaddexp(lse, torch.logsumexp(score, dim=-1))
    p = torch.exp(score - merged[..., None]).unflatten(1, q.shape[1:3])
    added = torch.einsum("rgqe,regd->rgqd", p, _wide(extra_value)).flatten(1, 2)
    return _wide(out) * torch.exp(lse - merged)[..., None] + added, merged


def merge_backward(
    grad: Tensor, query: Tensor, extra_key: Tensor, extra_value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the single keys add: gradients of query [R, h, d], extra_key and extra_value [R, k, g, d].

    Args:
        grad: [R, h, d] of the merged output.
        query: [R, h, d].
        extra_key: [R, k, g, d], g key-value heads.
        extra_value: [R, k, g, d].
        out: [R, h, d], merged.
        lse: [R, h] log-sum-exp of all keys.
        scale: of the scores.
    """
    groups = extra_key.shape[2]
    q, g = _grouped(query, groups), _grouped(grad, groups)
    ek, ev = _wide(extra_key), _wide(extra_value)
    p = torch.exp(torch.einsum("rgqd,regd->rgqe", q, ek) * scale - lse.unflatten(1, q.shape[1:3])[..., None])
    delta = (g * _grouped(out, groups)).sum(-1, keepdim=True)
    d_score = p * (torch.einsum("rgqd,regd->rgqe", g, ev) - delta) * scale
    d_query = torch.einsum("rgqe,regd->rgqd", d_score, ek).flatten(1, 2)
    return d_query, torch.einsum("rgqe,rgqd->regd", d_score, q), torch.einsum("rgqe,rgqd->regd", p, g)


# -- causal part


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


def causal(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of some rows inside their conversations: output [R, h, d] and log-sum-exp [R, h].

    Args:
        query: [R, h, d] of the rows.
        key: [N, g, d] of the whole pack, g key-value heads.
        value: [N, g, d].
        rows: [R] positions in the pack, ascending.
        cu_seqlens: [S + 1] where conversations begin and end.
        scale: of the scores.
    """
    out = torch.empty_like(query, dtype=_wide(query).dtype)
    lse = out.new_empty(query.shape[:2])
    for first, end, start, stop in _blocks(rows, cu_seqlens):
        score, _ = _scores(query[first:end], key[start:stop], rows[first:end], start, scale)
        total = torch.logsumexp(score, dim=-1)
        p = score.sub_(total[..., None]).exp_()
        out[first:end] = _ungroup(torch.matmul(p, _wide(value[start:stop]).transpose(0, 1)), end - first)
        lse[first:end] = _ungroup(total[..., None], end - first)[..., 0]
    return out, lse


def causal_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rows: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [R, h, d], key and value [N, g, d], given grad [R, h, d] of the output.

    ``out`` and ``lse`` may be those of :func:`merge`: the softmax is over all keys then, and these are the causal keys' part of it.
    """
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
