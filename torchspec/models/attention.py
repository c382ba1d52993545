"""Attention of the EAGLE-3 unroll, forward and backward, without a T x T matrix.

At step k the query of position t attends, in one softmax, to the step-0 keys of its own conversation up to t and to its own later keys:

    keys(t) = { K_0[s], s <= t }  u  { k_i[t], i = 1..k }

The first part is ordinary causal attention; the second is k single keys a row. Both are merged through the log-sum-exp. For the backward,
p = exp(score - lse) and delta = sum(dO * O) with the *merged* lse and output give the exact gradient of each part, so a flash backward that is handed
the merged pair is right for the first part as it stands (Dao, FlashAttention-2, arXiv 2307.08691, section 3.2).

Two paths, equal in value and gradient: ``attention_flash.py`` on CUDA in half precision, ``attention_torch.py`` everywhere else. Later keys stand in one
array by step-0 entry and slot, written once; the gradients of all keys are summed in fp32 over the steps.

Letters: N rows of the pack, M step-0 entries (supervised rows), R query rows, h heads, g key-value heads, d head size, K unroll steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.models import attention_torch, kernels
from torchspec.models.shared import wide


@dataclass(frozen=True)
class Queries:
    """Which rows ask at a step."""

    at: Tensor
    """[R] pack position of each, increasing."""
    entries: Tensor
    """[R] its step-0 entry."""
    where: Tensor
    """[N] the query of each pack row, or -1."""

    @classmethod
    def of(cls, at: Tensor, entries: Tensor, total: int) -> Queries:
        """For a pack of ``total`` rows."""
        where = at.new_full((total,), -1).index_copy_(0, at, torch.arange(at.shape[0], device=at.device))
        return cls(at, entries, where)


@dataclass(frozen=True)
class Conversations:
    """Where they begin and end."""

    bounds: Tensor
    """[S+1] int32 on the host."""
    on_device: Tensor
    """[S+1] int32 beside the keys."""
    longest: int
    """Tokens."""

    @classmethod
    def of(cls, bounds: Tensor, sequence: Tensor) -> Conversations:
        """From the host's bounds and the device's ``sequence`` [N] (conversation of each row), so that nothing is copied from the host."""
        number = torch.arange(bounds.shape[0], device=sequence.device)
        return cls(bounds, torch.searchsorted(sequence, number).int(), int(bounds.diff().max()) if bounds.shape[0] > 1 else 0)


class _Store:
    """Keys and values of one layer and the sums of their gradients."""

    def __init__(self, key: Tensor, value: Tensor, conversations: Conversations, entries: int, slots: int) -> None:
        self.key, self.value, self.conversations = key, value, conversations
        self.extra_key, self.extra_value = (t.new_empty(entries, slots, *t.shape[1:]) for t in (key, value))
        self.count = 0
        self._sums: tuple[Tensor, Tensor] | None = None
        self._extra_sums: tuple[Tensor, Tensor] | None = None

    def add(self, d_key: Tensor, d_value: Tensor) -> None:
        """Add to the gradients of the step-0 keys and values."""
        kind = wide(self.key.dtype)
        if self._sums is None:
            self._sums = d_key.to(kind), d_value.to(kind)
        else:
            self._sums[0].add_(d_key)
            self._sums[1].add_(d_value)

    def collect(self) -> tuple[Tensor, Tensor]:
        """Gradients of the step-0 keys and values. Autograd comes here after every step, so the sums of a further backward begin anew."""
        found, self._sums, self._extra_sums = self._sums, None, None
        if found is None:
            return torch.zeros_like(self.key), torch.zeros_like(self.value)
        return found[0].to(self.key.dtype), found[1].to(self.value.dtype)

    @property
    def extra_sums(self) -> tuple[Tensor, Tensor]:
        """Gradients of the later keys and values so far."""
        if self._extra_sums is None:
            kind = wide(self.key.dtype)
            self._extra_sums = torch.zeros_like(self.extra_key, dtype=kind), torch.zeros_like(self.extra_value, dtype=kind)
        return self._extra_sums


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, store: _Store, key: Tensor, value: Tensor) -> Tensor:
        ctx.store = store
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.store.collect()


class _Append(torch.autograd.Function):
    """Fill the next slot. Autograd comes back here when every later step has added to the slot's gradient."""

    @staticmethod
    def forward(ctx: Any, store: _Store, token: Tensor, key: Tensor, value: Tensor, entries: Tensor) -> Tensor:
        ctx.store, ctx.slot = store, store.count
        ctx.save_for_backward(entries)
        store.extra_key[entries, store.count] = key
        store.extra_value[entries, store.count] = value
        store.count += 1
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (entries,) = ctx.saved_tensors
        kind = ctx.store.key.dtype
        d_key, d_value = (total[entries, ctx.slot].to(kind) for total in ctx.store.extra_sums)
        return None, grads[0], d_key, d_value, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, store: _Store, token: Tensor, query: Tensor, queries: Queries) -> Tensor:
        query, scale = query.contiguous(), query.shape[-1] ** -0.5
        ctx.store, ctx.queries, ctx.count = store, queries, store.count
        if _flash(query):
            from torchspec.models import attention_flash

            out, lse = attention_flash.forward(
                query, store.key, store.value, store.extra_key, store.extra_value, at=queries.at, where=queries.where, entries=queries.entries,
                count=store.count, bounds=store.conversations.on_device, longest=store.conversations.longest, scale=scale,
            )  # fmt: skip
        else:
            out, lse = attention_torch.causal(query, store.key, store.value, queries.at, store.conversations.bounds, scale)
            if store.count:
                key, value = store.extra_key[queries.entries, : store.count], store.extra_value[queries.entries, : store.count]
                out, lse = attention_torch.merge(out, lse, query, key, value, scale)
            out = out.to(query.dtype)
        ctx.save_for_backward(query, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, out, lse = ctx.saved_tensors
        store, queries, count, grad, scale = ctx.store, ctx.queries, ctx.count, grads[0].contiguous(), query.shape[-1] ** -0.5
        if _flash(query):
            from torchspec.models import attention_flash

            sums = store.extra_sums if count else (store.extra_key, store.extra_value)
            d_query, d_key, d_value = attention_flash.backward(
                grad, query, store.key, store.value, store.extra_key, store.extra_value, out, lse, *sums, at=queries.at, where=queries.where,
                entries=queries.entries, count=count, bounds=store.conversations.on_device, longest=store.conversations.longest, scale=scale,
            )  # fmt: skip
        else:
            d_query, d_key, d_value = attention_torch.causal_backward(
                grad, query, store.key, store.value, out, lse, queries.at, store.conversations.bounds, scale
            )
            if count:
                key, value = store.extra_key[queries.entries, :count], store.extra_value[queries.entries, :count]
                more, d_extra_key, d_extra_value = attention_torch.merge_backward(grad, query, key, value, out, lse, scale)
                d_query = d_query + more
                for total, part in zip(store.extra_sums, (d_extra_key, d_extra_value), strict=True):
                    total[queries.entries, :count] += part
        store.add(d_key, d_value)
        return None, query.new_empty(0), d_query.to(query.dtype), None


def _flash(query: Tensor) -> bool:
    if not (query.is_cuda and kernels.usable(query)):
        return False
    from torchspec.models import attention_flash

    return attention_flash.serves(query)


class UnrollMemory:
    """Keys and values that the queries of one layer see over the unroll.

    Args:
        key, value: [N, g, d] of step 0, key after RoPE; g divides h, and query head i uses key-value head i // (h / g).
        conversations: of the pack.
        entries: M.
        slots: later steps that will append, K - 1.
    """

    def __init__(self, key: Tensor, value: Tensor, conversations: Conversations, *, entries: int, slots: int) -> None:
        self._store = _Store(key.detach(), value.detach(), conversations, entries, slots)
        self._token: Tensor = _Start.apply(self._store, key, value)

    def append(self, key: Tensor, value: Tensor, entries: Tensor) -> None:
        """A later step's key (after RoPE) and value [R, g, d] at entries [R]."""
        self._token = _Append.apply(self._store, self._token, key, value, entries)

    def attend(self, query: Tensor, queries: Queries) -> Tensor:
        """[R, h, d] for queries [R, h, d] after RoPE, in their type."""
        attended: Tensor = _Attend.apply(self._store, self._token, query, queries)
        return attended
