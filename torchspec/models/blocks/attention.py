"""Attention of block drafts, forward and backward: in plain torch for every device; ``attention_triton.py`` has the kernels for CUDA in half precision.

Row j of the block at anchor a asks, in one softmax, for the context before the anchor and for its own block:

    keys(a, j) = { C[s], s < a, in a's conversation }  u  { B[a, i], i any or i <= j }

A sliding window w counts from each row's own position a + j, as servers have it: keys from a + j - (w - 1) on, and where the block is seen both ways up to
a + j + (w - 1). Blocks of a conversation are taken some at a time, so that scores of a few hundred rows are alive; the backward makes them again.

Letters: A blocks, S rows of each, N rows of the pack, h heads, g key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspec.blocks import BlockRows
from torchspec.models.ops import kernels

if TYPE_CHECKING:
    from torchspec.models.blocks.attention_triton import Plan

_ROWS = 256
"""Rows at a time."""


@dataclass(frozen=True)
class BlockMask:
    """What a row may see beside its context."""

    causal: bool
    """Of its block only the rows up to itself."""
    window: int | None
    """Positions that a row sees, itself among them; None for all."""


@dataclass(frozen=True)
class _Tile:
    """Blocks low..high-1 and the context rows start..end-1 that they read."""

    low: int
    high: int
    start: int
    end: int


def _tiles(rows: BlockRows, mask: BlockMask) -> Iterator[_Tile]:
    """Some blocks of one conversation each."""
    spans, at_once = rows.spans.tolist(), max(_ROWS // rows.slots, 1)
    low = 0
    while low < len(spans):
        high = low + 1
        while high < len(spans) and high - low < at_once and spans[high][0] == spans[low][0]:
            high += 1
        start, first = spans[low]
        if mask.window is not None:
            start = max(start, first - (mask.window - 1))
        yield _Tile(low, high, start, spans[high - 1][1])
        low = high


def _hidden(tile: _Tile, rows: BlockRows, mask: BlockMask) -> Tensor:
    """[b, S, K + S] bool: keys of a tile, context then block, that a row does not see."""
    device, slots = rows.base.device, rows.slots
    anchor = rows.base[tile.low : tile.high] + 1
    at = torch.arange(slots, device=device)
    context = torch.arange(tile.start, tile.end, device=device)
    outside = (context >= anchor[:, None])[:, None, :].expand(-1, slots, -1)
    ahead = at[None, :] - at[:, None]  # of a key before a row in the same block
    block = ahead > 0 if mask.causal else torch.zeros_like(ahead, dtype=torch.bool)
    if mask.window is not None:
        reach = mask.window - 1
        outside = outside | (context < (anchor[:, None] + at - reach)[:, :, None])
        block = block | (ahead < -reach) | (ahead > reach)
    return torch.cat([outside, block[None].expand(outside.shape[0], -1, -1)], dim=-1)


def _accumulated(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, rows: BlockRows, mask: BlockMask) -> Tensor:
        out = torch.empty_like(query)
        normaliser = torch.empty(query.shape[:-1], dtype=_accumulated(query[:0]).dtype, device=query.device)
        for tile in _tiles(rows, mask):
            part = slice(tile.low, tile.high)
            score, values = _scores(tile, query, key, value, context_key, context_value, rows, mask)
            lse = torch.logsumexp(score, dim=-1)
            share = score.sub_(lse[..., None]).exp_()
            context = tile.end - tile.start
            found = _by_block(torch.matmul(_flat(share[..., :context]), values[0]), share) + torch.matmul(share[..., context:], values[1])
            out[part] = _as_rows(found).to(out.dtype)
            normaliser[part] = _as_rows(lse[..., None])[..., 0]
        ctx.rows, ctx.mask = rows, mask
        ctx.save_for_backward(query, key, value, context_key, context_value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, context_key, context_value, out, normaliser = ctx.saved_tensors
        rows, scale, groups = ctx.rows, query.shape[-1] ** -0.5, key.shape[2]
        kind = normaliser.dtype
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        d_context = [torch.zeros_like(t, dtype=kind) for t in (context_key, context_value)]
        delta = (_accumulated(grads[0]) * _accumulated(out)).sum(-1)
        for tile in _tiles(rows, ctx.mask):
            part, seen, context = slice(tile.low, tile.high), slice(tile.start, tile.end), tile.end - tile.start
            share, values = _scores(tile, query, key, value, context_key, context_value, rows, ctx.mask)
            share = share.sub_(_heads(normaliser[part, ..., None], groups)).exp_()
            grad, q = _heads(_accumulated(grads[0][part]), groups), _heads(_accumulated(query[part]), groups)
            inner = torch.cat([_by_block(torch.matmul(_flat(grad), values[0].transpose(1, 2)), share), grad @ values[1].transpose(-1, -2)], dim=-1)
            d_score = inner.sub_(_heads(delta[part, ..., None], groups)).mul_(share).mul_(scale)
            d_context[1][seen] += torch.matmul(_flat(share[..., :context]).transpose(1, 2), _flat(grad)).transpose(0, 1)
            d_context[0][seen] += torch.matmul(_flat(d_score[..., :context]).transpose(1, 2), _flat(q)).transpose(0, 1)
            d_value[part] = _keys_back(share[..., context:].transpose(-1, -2) @ grad).to(value.dtype)
            d_key[part] = _keys_back(d_score[..., context:].transpose(-1, -2) @ q).to(key.dtype)
            keys = _accumulated(context_key[seen]).transpose(0, 1), _block_keys(key[part])
            d_q = _by_block(torch.matmul(_flat(d_score[..., :context]), keys[0]), share) + d_score[..., context:] @ keys[1]
            d_query[part] = _as_rows(d_q).to(query.dtype)
        return d_query, d_key, d_value, d_context[0].to(context_key.dtype), d_context[1].to(context_value.dtype), None, None


def _heads(x: Tensor, groups: int) -> Tensor:
    """[b, S, h, d] as [g, b, h/g, S, d]."""
    return x.unflatten(2, (groups, -1)).permute(2, 0, 3, 1, 4)


def _as_rows(x: Tensor) -> Tensor:
    """Back from :func:`_heads`."""
    return x.permute(1, 3, 0, 2, 4).flatten(2, 3)


def _block_keys(x: Tensor) -> Tensor:
    """[b, S, g, d] as [g, b, 1, S, d]."""
    return _accumulated(x).permute(2, 0, 1, 3)[:, :, None]


def _keys_back(x: Tensor) -> Tensor:
    """[g, b, h/g, S, d] summed over the queries of a key: [b, S, g, d]."""
    return x.sum(2).permute(1, 2, 0, 3)


def _flat(x: Tensor) -> Tensor:
    """[g, b, h/g, S, c] as [g, b * h/g * S, c]."""
    return x.flatten(1, 3)


def _by_block(x: Tensor, like: Tensor) -> Tensor:
    """Back from :func:`_flat`, with the leading sizes of ``like``."""
    return x.unflatten(1, like.shape[1:4])


def _scores(
    tile: _Tile, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, rows: BlockRows, mask: BlockMask
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[g, b, h/g, S, K + S] scaled scores, -inf where a row does not see; and values of the context [g, K, d] and of the blocks."""
    part, seen = slice(tile.low, tile.high), slice(tile.start, tile.end)
    q = _heads(_accumulated(query[part]), key.shape[2]) * query.shape[-1] ** -0.5
    keys, own = _accumulated(context_key[seen]).permute(1, 2, 0), _block_keys(key[part])
    score = torch.cat([_by_block(torch.matmul(_flat(q), keys), q), q @ own.transpose(-1, -2)], dim=-1)
    score.masked_fill_(_hidden(tile, rows, mask)[None, :, None], float("-inf"))
    return score, (_accumulated(context_value[seen]).transpose(0, 1), _block_keys(value[part]))


def block_attention(query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor, rows: BlockRows, mask: BlockMask) -> Tensor:
    """Attention of all blocks of a pack, in torch.

    Args:
        query: [A, S, h, d] after norm and rotation.
        key, value: [A, S, g, d] of the blocks; query head i uses key-value head i // (h / g).
        context_key, context_value: [N, g, d] of the pack.
        rows: the blocks.
        mask: what a row sees.

    Returns:
        [A, S, h, d].
    """
    attended: Tensor = _Attend.apply(query, key, value, context_key, context_value, rows, mask)
    return attended


class BlockAttention:
    """:func:`block_attention` for every layer of a draft over one pack: by kernels where they serve.

    Args:
        rows: the blocks.
        mask: what a row sees.
    """

    def __init__(self, rows: BlockRows, mask: BlockMask) -> None:
        self._rows, self._mask = rows, mask
        self._plan: Plan | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor) -> Tensor:
        """[A * S, h, d] for query [A * S, h, d], key and value [A * S, g, d], context_key and context_value [N, g, d]; sizes are those of every layer."""
        if kernels.usable(query):
            from torchspec.models.blocks import attention_triton

            if attention_triton.serves(query, key, slots=self._rows.slots):
                self._plan = self._plan or attention_triton.Plan.of(self._rows, self._mask, query, key)
                return attention_triton.attend(self._plan, query, key, value, context_key, context_value)
        q, k, v = (t.unflatten(0, (-1, self._rows.slots)) for t in (query, key, value))
        return block_attention(q, k, v, context_key, context_value, self._rows, self._mask).flatten(0, 1)
