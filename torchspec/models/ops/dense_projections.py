"""Projections of ordinary (grouped-query) attention, as Llama and Qwen3 have them.

A layer's attention is two things: parameters under the names that servers read (an ``nn.Module``), and what they do in one forward pass: weights cast once
to the compute type, fused where one product serves. The second is the :class:`Projections` interface, which ``latent_projections.py`` fills
differently; scores and softmax are in ``attention/`` for both.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import MULTIPLE
from torchspec.models.ops.norm import RMSNorm
from torchspec.models.ops.rope import rotate
from torchspec.models.ops.shared_rows import Residual, linear
from torchspec.models.ops.shared_weight import Weight, wide

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the rows, [R, 1, d/2] in fp32 (fp64 where the draft computes in it); see ``rope.tables``."""


class Projections(Protocol):
    """One layer's attention weights during one forward pass.

    Everything that reads the layer's input is linear in it and stacked in one weight, ``inputs``; the caller makes those products, because the part of the
    input that is an embedding is the same for several steps. ``flat`` is the result, [R, rows of the weight]; heads come out after norm and RoPE.
    """

    inputs: Weight
    """[query part + key-value part, width]."""
    bias: Tensor | None
    """Of ``inputs``, in the type that sums are kept in: so autograd sums its gradients over the steps."""
    query_size: int
    """Rows of the query part."""
    only_rotated: bool
    """Whether flat is the heads of queries, keys and values side by side, and RoPE by halves all that happens to them."""
    head_size: int
    """d."""

    def round(self, columns: slice, *, gradient: bool) -> None:
        """Make products 8-bit ones where that is known to pay: with these columns of ``inputs``, and the output's; with ``gradient`` also their weight
        gradients."""

    def queries(self, flat: Tensor, rotation: Rotation) -> Tensor:
        """From the query part: [R, h, d], scaled so that the softmax of q.k / sqrt(d) is the layer's own."""

    def keys_values(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """From the key-value part: key and value, [R, g, d] each."""

    def all(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the same rows."""

    def output(self, attended: Tensor, residual: Residual) -> Tensor:
        """[R, h, d] to the residual stream, added to ``residual`` [R, H]."""


class DenseAttention(nn.Module):
    """Parameters of one layer.

    Args:
        width: of its input.
        hidden_size: H, of its output.
        heads, kv_heads: of queries; of keys and values.
        head_dim: d.
        bias: on all four projections.
        norm_eps: of RMSNorms on the heads of queries and keys (Qwen3 style); None for no such norms.
    """

    def __init__(self, width: int, *, hidden_size: int, heads: int, kv_heads: int, head_dim: int, bias: bool = False, norm_eps: float | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)
        if norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, norm_eps)
            self.k_norm = RMSNorm(head_dim, norm_eps)

    def cast(self, dtype: torch.dtype) -> Projections:
        """The weights for one forward pass."""
        return DenseProjections(self, dtype)


class DenseProjections:
    """:class:`Projections` of grouped-query attention."""

    def __init__(self, attention: DenseAttention, dtype: torch.dtype) -> None:
        self.attention = attention
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.inputs = Weight.of([part.weight for part in parts], dtype)
        biases = [part.bias.to(wide(dtype)) for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.query_size = attention.q_proj.weight.shape[0]
        self.o = Weight.of([attention.o_proj.weight], dtype)
        self.o_bias = None if attention.o_proj.bias is None else attention.o_proj.bias.to(wide(dtype))
        self.norms = [attention.q_norm.cast(), attention.k_norm.cast()] if hasattr(attention, "q_norm") else [None, None]
        self.only_rotated, self.head_size = self.norms == [None, None], attention.head_dim

    def round(self, columns: slice, *, gradient: bool) -> None:
        sides = (self.query_size, self.inputs.data.shape[0] - self.query_size, *self.o.data.shape, self.inputs.data[:, columns].shape[1])
        if all(side % MULTIPLE == 0 for side in sides):
            self.inputs.store.round_columns(columns, gradient=gradient)
            self.o.store.round_columns(slice(None), gradient=gradient)

    def queries(self, flat: Tensor, rotation: Rotation) -> Tensor:
        return self._heads(flat, (flat.shape[1],), rotation)[0]

    def keys_values(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        key, value = self._heads(flat, (0, flat.shape[1] // 2, flat.shape[1] // 2), rotation)[1:]
        return key, value

    def all(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        side = (flat.shape[1] - self.query_size) // 2
        query, key, value = self._heads(flat, (self.query_size, side, side), rotation)
        return query, key, value

    def output(self, attended: Tensor, residual: Residual) -> Tensor:
        return linear(attended.flatten(1), self.o, bias=self.o_bias, residual=residual)

    def _heads(self, flat: Tensor, sizes: tuple[int, ...], rotation: Rotation) -> list[Tensor]:
        """Query, key and value parts, as far as there are any, as heads [R, heads, d]; the first two after norm (Qwen3 style) and RoPE."""
        size = self.attention.head_dim
        if kernels.usable(flat) and self.only_rotated:
            return list(_Heads.apply(flat, sizes, size, *rotation))
        heads = [part.unflatten(-1, (-1, size)) for part in flat.split(sizes, dim=-1)]
        for i, norm in enumerate(self.norms[: len(heads)]):
            if sizes[i]:
                heads[i] = rotated(heads[i] if norm is None else norm(heads[i]), rotation)
        return heads


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Heads [R, heads, d] rotated in the width of the tables."""
    if kernels.usable(x):
        rotated_heads: Tensor = _Heads.apply(x.flatten(1), (x.shape[1] * x.shape[2],), x.shape[2], *rotation)[0]
        return rotated_heads
    return rotate(x.to(rotation[0].dtype), *rotation).to(x.dtype)


class _Heads(torch.autograd.Function):
    """Split [R, C] into queries, keys and values as heads, as far as there are any; the first two are turned."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: tuple[int, ...], head: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        from torchspec.models.ops.kernels import heads

        ctx.save_for_backward(cos, sin)
        ctx.rows, ctx.kind = flat.shape[0], flat.dtype
        made = [flat.new_empty(flat.shape[0], size // head, head) for size in sizes]
        heads.split(flat, cos, sin, **_named("", made), where=None, entries=None)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from torchspec.models.ops.kernels import heads

        cos, sin = ctx.saved_tensors
        given = _named("d_", [grad.contiguous() for grad in grads])
        return heads.join(ctx.rows, cos, sin, **given, entries=None, dtype=ctx.kind), None, None, None, None


def _named(prefix: str, parts: list[Tensor]) -> dict[str, Tensor | None]:
    """As the kernel takes them, None where there are no such heads."""
    found = [part if part.shape[1] else None for part in parts] + [None] * (3 - len(parts))
    return {f"{prefix}{name}": part for name, part in zip(("query", "key", "value"), found, strict=True)}
