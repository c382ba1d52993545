"""Attention of an unroll, forward and backward, without a T x T matrix.

At step k the query of position t attends, in one softmax, to the step-0 keys of its own conversation up to t and to its own later keys:

    keys(t) = { K_0[s], s <= t }  u  { k_i[t], i = 1..k }

The first part is ordinary causal attention; the second is k single keys a row. Both are merged through the log-sum-exp. For the backward,
p = exp(score - lse) and delta = sum(dO * O) with the *merged* lse and output give the exact gradient of each part, so a flash backward that is handed
the merged pair is right for the first part as it stands (Dao, FlashAttention-2, arXiv 2307.08691, section 3.2).

Two paths, equal in value and gradient: ``flash.py`` on CUDA in half precision, ``torch.py`` everywhere else. Later keys stand in one
array by step-0 entry and slot, written once; the gradients of all keys are summed in fp32 over the steps.

Letters: N rows of the pack, M step-0 entries (supervised rows), R query rows, h heads, g key-value heads, d head size, K unroll steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.attention import torch as attention_torch
from torchspec.models.ops.dense_projections import Projections, Rotation
from torchspec.models.ops.shared_weight import wide

if TYPE_CHECKING:
    from torchspec.models.ops.attention.flash import Causal


@dataclass(frozen=True)
class Queries:
    """Which rows ask at a step."""

    at: Tensor
    """[R] pack position of each, increasing."""
    entries: Tensor
    """[R] its step-0 entry."""
    where: Tensor
    """[N] the query of each pack row, or -1."""
    onto: Tensor | None = None
    """[R] negative where the next step does not ask; None in the last step, or where it is not known."""


@dataclass(frozen=True)
class PackBounds:
    """Where they begin and end."""

    bounds: Tensor
    """[S+1] int32 on the host."""
    on_device: Tensor
    """[S+1] int32 beside the keys."""
    longest: int
    """Tokens."""

    @classmethod
    def of(cls, bounds: Tensor, sequence: Tensor) -> PackBounds:
        """From the host's bounds and the device's ``sequence`` [N] (conversation of each row), so that nothing is copied from the host."""
        number = torch.arange(bounds.shape[0], device=sequence.device)
        return cls(bounds, torch.searchsorted(sequence, number).int(), int(bounds.diff().max()) if bounds.shape[0] > 1 else 0)


class KeyValueCache:
    """Keys and values of one layer and the sums of their gradients.

    Args:
        like: a key, [.., g, d].
        conversations: of the pack.
        total: N.
        entries: M.
        slots: E.
    """

    def __init__(self, like: Tensor, conversations: PackBounds, *, total: int, entries: int, slots: int) -> None:
        self.conversations, self.total, self.count = conversations, total, 0
        self.causal = _causal(like, conversations, total)
        """The flash kernel, where it serves."""
        self.key = self.value = like
        """[P, g, d] of step 0; P is N, or what the flash kernel wants."""
        self.extra_key, self.extra_value = (like.new_empty(entries, slots, *like.shape[-2:]) for _ in range(2))
        self._sums: tuple[Tensor, Tensor] | None = None
        self._extra_sums: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int:
        """P."""
        return self.total if self.causal is None else self.causal.rows

    def add(self, d_key: Tensor, d_value: Tensor) -> None:
        """Add to the gradients of the step-0 keys and values."""
        kind = wide(self.key.dtype)
        if kernels.usable(d_key):
            from torchspec.models.ops.kernels import rows

            first = self._sums is None
            if self._sums is None:
                self._sums = torch.empty_like(self.key, dtype=kind), torch.empty_like(self.value, dtype=kind)
            rows.gather(d_key, d_value, self._sums, first=first)
        elif self._sums is None:
            self._sums = d_key.to(kind), d_value.to(kind)
        else:
            self._sums[0].add_(d_key)
            self._sums[1].add_(d_value)

    def collect(self) -> tuple[Tensor, Tensor] | None:
        """Gradients [P, g, d] of the step-0 keys and values, in the type of the sums. Autograd comes here after every step, so the sums of a further
        backward begin anew."""
        found, self._sums, self._extra_sums = self._sums, None, None
        return found

    @property
    def extra_sums(self) -> tuple[Tensor, Tensor]:
        """Gradients of the later keys and values so far."""
        if self._extra_sums is None:
            kind = wide(self.key.dtype)
            self._extra_sums = torch.zeros_like(self.extra_key, dtype=kind), torch.zeros_like(self.extra_value, dtype=kind)
        return self._extra_sums

    def attend(self, query: Tensor, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
        """By the flash kernel: [R, h, d] and log-sum-exp [R, h], for a spread query [P, h, d]."""
        from torchspec.models.ops.attention import flash as attention_flash

        assert self.causal is not None
        return attention_flash.forward(
            query, self.key, self.value, self.extra_key, self.extra_value,
            causal=self.causal, at=queries.at, entries=queries.entries, count=self.count, scale=scale,
        )  # fmt: skip

    def attend_backward(
        self, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, queries: Queries, count: int, scale: float, *, unroll: bool = False
    ) -> Tensor:
        """Gradient [R, h, d] of the query, which is [P, h, d] or [R, h, d]; those of keys and values are added here.

        Where this is an ``unroll``, every step's queries come back once, the last step's first: then a slot of an entry has no sum before the last step
        that asks there, and the sums need not begin with zeros.
        """
        from torchspec.models.ops.attention import flash as attention_flash

        assert self.causal is not None
        fresh = unroll and self._extra_sums is None
        if fresh:
            kind = wide(self.key.dtype)
            self._extra_sums = torch.empty_like(self.extra_key, dtype=kind), torch.empty_like(self.extra_value, dtype=kind)
        sums = self.extra_sums if count else (self.extra_key, self.extra_value)
        d_query, d_key, d_value = attention_flash.backward(
            grad, query, self.key, self.value, self.extra_key, self.extra_value, out, lse, *sums,
            causal=self.causal, at=queries.at, where=queries.where, entries=queries.entries, count=count, scale=scale,
            fresh=fresh, before=queries.onto if unroll and not fresh else None,
        )  # fmt: skip
        self.add(d_key, d_value)
        return d_query


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, store: KeyValueCache, key: Tensor, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.store, ctx.shape, ctx.kind = store, key.shape, key.dtype
        more = (0, 0, 0, 0, 0, store.rows - key.shape[0])
        store.key, store.value = (F.pad(t, more) if more[-1] else t.contiguous() for t in (key, value))
        return key.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.store.collect()
        if found is None:
            return None, None, None
        return None, *(total[: ctx.shape[0]].to(ctx.kind) for total in found)


class _Append(torch.autograd.Function):
    """Fill the next slot. Autograd comes back here when every later step has added to the slot's gradient."""

    @staticmethod
    def forward(ctx: Any, store: KeyValueCache, token: Tensor, key: Tensor, value: Tensor, entries: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
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
        return None, None, d_key, d_value, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, store: KeyValueCache, token: Tensor, query: Tensor, queries: Queries) -> Tensor:
        query, scale = query.contiguous(), query.shape[-1] ** -0.5
        ctx.store, ctx.queries, ctx.count = store, queries, store.count
        if store.causal is not None:
            from torchspec.models.ops.kernels import rows

            out, lse = store.attend(rows.spread([query], queries.where, store.rows)[0], queries, scale)
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
        if store.causal is not None:
            return None, None, store.attend_backward(grad, query, out, lse, queries, count, scale), None
        d_query, d_key, d_value = attention_torch.causal_backward(grad, query, store.key, store.value, out, lse, queries.at, store.conversations.bounds, scale)
        if count:
            key, value = store.extra_key[queries.entries, :count], store.extra_value[queries.entries, :count]
            more, d_extra_key, d_extra_value = attention_torch.merge_backward(grad, query, key, value, out, lse, scale)
            d_query = d_query + more
            for total, part in zip(store.extra_sums, (d_extra_key, d_extra_value), strict=True):
                total[queries.entries, :count] += part
        store.add(d_key, d_value)
        return None, None, d_query.to(query.dtype), None


def _causal(like: Tensor, conversations: PackBounds, total: int) -> Causal | None:
    if not kernels.usable(like):
        return None
    from torchspec.models.ops.attention import flash as attention_flash

    if not attention_flash.serves(like):
        return None
    return attention_flash.Causal(like, total=total, bounds=conversations.on_device, longest=conversations.longest)


class UnrollCache:
    """Keys and values that the queries of one layer see over the unroll.

    Args:
        key, value: [N, g, d] of step 0, key after RoPE; g divides h, and query head i uses key-value head i // (h / g).
        conversations: of the pack.
        entries: M.
        slots: later steps that will append, K - 1.
    """

    def __init__(self, key: Tensor, value: Tensor, conversations: PackBounds, *, entries: int, slots: int) -> None:
        self._store = KeyValueCache(key.detach(), conversations, total=key.shape[0], entries=entries, slots=slots)
        self._token: Tensor = _Start.apply(self._store, key, value)

    def append(self, key: Tensor, value: Tensor, entries: Tensor) -> None:
        """A later step's key (after RoPE) and value [R, g, d] at entries [R]."""
        self._token = _Append.apply(self._store, self._token, key, value, entries)

    def attend(self, query: Tensor, queries: Queries) -> Tensor:
        """[R, h, d] for queries [R, h, d] after RoPE, in their type."""
        attended: Tensor = _Attend.apply(self._store, self._token, query, queries)
        return attended

    def first(self, attention: Projections, flat: Tensor, rotation: Rotation, queries: Queries) -> Tensor:
        """Step 0: [R, h, d] for the projection's query part."""
        return self.attend(attention.queries(flat, rotation), queries)

    def later(self, attention: Projections, flat: Tensor, rotation: Rotation, queries: Queries) -> Tensor:
        """A later step: [R, h, d] for the whole projection, whose keys and values are appended."""
        query, key, value = attention.all(flat, rotation)
        self.append(key, value, queries.entries)
        return self.attend(query, queries)
