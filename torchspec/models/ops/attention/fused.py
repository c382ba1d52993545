"""An unroll step's attention in one autograd function, from the input projection's result to the attended rows, where the flash kernel serves and a head
is turned by RoPE and by nothing else.

One kernel turns the heads and writes each where it is read: queries to the pack's rows, keys and values to the rows of step 0 or to the slots of a later
one. One kernel brings the gradients back, those of keys and values from the fp32 sums. ``attention.py`` does the same in several functions, and has the
letters; the order in which autograd comes back through tokens is explained in ``shared.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.attention.dispatch import KeyValueCache, PackBounds, Queries, UnrollCache
from torchspec.models.ops.dense_projections import Projections, Rotation

_SPREAD = 8 / 7
"""Queries are kept for the backward as they are spread over the pack's rows where that takes at most so many times their own memory."""


class _Begin(torch.autograd.Function):
    """Step 0's keys and values to the token of their store."""

    @staticmethod
    def forward(ctx: Any, store: KeyValueCache, flat: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from torchspec.models.ops.kernels import heads

        store.key, store.value = (flat.new_empty(store.rows, *store.extra_key.shape[2:]) for _ in range(2))
        heads.split(flat, cos, sin, query=None, key=store.key, value=store.value, where=None, entries=None)
        ctx.set_materialize_grads(False)
        ctx.store = store
        ctx.save_for_backward(cos, sin)
        return flat.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from torchspec.models.ops.kernels import heads

        cos, sin = ctx.saved_tensors
        found, kind = ctx.store.collect(), ctx.store.key.dtype
        if found is None:
            return None, None, None, None
        d_flat = heads.join(cos.shape[0], cos, sin, d_query=None, d_key=found[0], d_value=found[1], entries=None, dtype=kind)
        return None, d_flat, None, None


class _Step(torch.autograd.Function):
    """Attend; a later step fills the next slot before. Autograd comes back here when every later step has added to the slot's gradient."""

    @staticmethod
    def forward(
        ctx: Any, store: KeyValueCache, token: Tensor, flat: Tensor, cos: Tensor, sin: Tensor, queries: Queries, size: int, later: bool
    ) -> tuple[Tensor, Tensor]:
        from torchspec.models.ops.kernels import heads

        groups = store.extra_key.shape[2]
        query = flat.new_empty(store.rows, flat.shape[1] // size - (2 * groups if later else 0), size)
        key, value = (store.extra_key[:, store.count], store.extra_value[:, store.count]) if later else (None, None)
        heads.split(flat, cos, sin, query=query, key=key, value=value, where=queries.where, entries=queries.entries if later else None)
        store.count += later
        out, lse = store.attend(query, queries, size**-0.5)
        ctx.set_materialize_grads(False)
        ctx.store, ctx.queries, ctx.count, ctx.later = store, queries, store.count, later
        kept = query if query.shape[0] <= _SPREAD * out.shape[0] else query.index_select(0, queries.at)
        ctx.save_for_backward(kept, out, lse, cos, sin)
        return out, token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from torchspec.models.ops.kernels import heads

        query, out, lse, cos, sin = ctx.saved_tensors
        store, queries, count = ctx.store, ctx.queries, ctx.count
        grad = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
        d_query = store.attend_backward(grad, query, out, lse, queries, count, query.shape[-1] ** -0.5, unroll=True)
        d_key, d_value = (total[:, count - 1] for total in store.extra_sums) if ctx.later else (None, None)
        entries = queries.entries if ctx.later else None
        d_flat = heads.join(out.shape[0], cos, sin, d_query=d_query, d_key=d_key, d_value=d_value, entries=entries, dtype=out.dtype)
        return None, None, d_flat, None, None, None, None, None


class FusedCache:
    """:class:`~torchspec.models.ops.attention.dispatch.UnrollCache` that takes the projection's results as they are."""

    def __init__(self, store: KeyValueCache, flat: Tensor, rotation: Rotation) -> None:
        self._store = store
        self._token: Tensor = _Begin.apply(store, flat, *rotation)

    def first(self, attention: Projections, flat: Tensor, rotation: Rotation, queries: Queries) -> Tensor:
        """As there."""
        return self._attend(flat, rotation, queries, later=False)

    def later(self, attention: Projections, flat: Tensor, rotation: Rotation, queries: Queries) -> Tensor:
        """As there."""
        return self._attend(flat, rotation, queries, later=True)

    def _attend(self, flat: Tensor, rotation: Rotation, queries: Queries, *, later: bool) -> Tensor:
        attended, self._token = _Step.apply(self._store, self._token, flat, *rotation, queries, self._store.extra_key.shape[-1], later)
        return attended


def remember(attention: Projections, flat: Tensor, rotation: Rotation, conversations: PackBounds, *, entries: int, slots: int) -> UnrollCache | FusedCache:
    """What the queries of one layer see over the unroll, with step 0's keys and values in it.

    Args:
        attention: the layer's projections.
        flat: [N, key-value part].
        rotation: of the N rows.
        conversations: of the pack.
        entries: M.
        slots: later steps, K - 1.
    """
    if attention.only_rotated and kernels.usable(flat):
        from torchspec.models.ops.attention import flash as attention_flash

        like = flat.detach().view(flat.shape[0], -1, attention.head_size)[:, : flat.shape[1] // (2 * attention.head_size)]
        if attention_flash.serves(like):
            return FusedCache(KeyValueCache(like, conversations, total=flat.shape[0], entries=entries, slots=slots), flat, rotation)
    key, value = attention.keys_values(flat, rotation)
    return UnrollCache(key, value, conversations, entries=entries, slots=slots)
