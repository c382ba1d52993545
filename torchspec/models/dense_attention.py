"""Projections of ordinary (grouped-query) attention, as Llama and Qwen3 have them.

A layer's attention is two things: parameters under the names that servers read (an ``nn.Module``), and what they do in one forward pass: weights cast once
to the compute type, fused where one product serves. The second is the :class:`Projections` interface, which ``mla.py`` fills differently; scores and
softmax are in ``attention.py`` for both.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.models.draft_config import DraftConfig
from torchspec.models.norm import RMSNorm
from torchspec.models.rope import rotate

Turn = tuple[Tensor, Tensor]
"""cos and sin of the rows, [R, 1, d/2] in fp32 (fp64 where the draft computes in it); see ``rope.tables``."""


class Projections(Protocol):
    """One layer's attention weights during one forward pass. x is [R, width] in the compute type; heads come out after norm and RoPE."""

    def keys_values(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Key and value, [R, g, d] each."""

    def queries(self, x: Tensor, turn: Turn) -> Tensor:
        """[R, h, d], scaled so that the softmax of q.k / sqrt(d) is the layer's own."""

    def all(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the same rows."""

    def output(self, attended: Tensor) -> Tensor:
        """[R, h, d] to the residual stream's [R, H]."""


class DenseAttention(nn.Module):
    """Parameters of one layer; ``width`` is 2H in the first layer and H after it."""

    def __init__(self, config: DraftConfig, width: int) -> None:
        super().__init__()
        heads, groups, size, bias = config.num_heads, config.num_kv_heads, config.head_dim, config.attention_bias
        self.head_dim = size
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, groups * size, bias=bias)
        self.v_proj = nn.Linear(width, groups * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def cast(self, dtype: torch.dtype) -> Projections:
        """The weights for one forward pass."""
        return DenseProjections(self, dtype)


class DenseProjections:
    """:class:`Projections` of grouped-query attention: k and v, or q, k and v, in one product."""

    def __init__(self, attention: DenseAttention, dtype: torch.dtype) -> None:
        self.attention = attention
        self.q, self.q_bias = cast_linears([attention.q_proj], dtype)
        self.kv, self.kv_bias = cast_linears([attention.k_proj, attention.v_proj], dtype)
        self.o, self.o_bias = cast_linears([attention.o_proj], dtype)
        self.qkv = torch.cat([self.q, self.kv])
        self.qkv_bias = None if self.q_bias is None or self.kv_bias is None else torch.cat([self.q_bias, self.kv_bias])

    def keys_values(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        key, value = F.linear(x, self.kv, self.kv_bias).chunk(2, dim=-1)
        return self._key(key, turn), value.unflatten(-1, (-1, self.attention.head_dim))

    def queries(self, x: Tensor, turn: Turn) -> Tensor:
        return self._query(F.linear(x, self.q, self.q_bias), turn)

    def all(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [self.q.shape[0], *[self.kv.shape[0] // 2] * 2]
        query, key, value = F.linear(x, self.qkv, self.qkv_bias).split(sizes, dim=-1)
        return self._query(query, turn), self._key(key, turn), value.unflatten(-1, (-1, self.attention.head_dim))

    def output(self, attended: Tensor) -> Tensor:
        return F.linear(attended.flatten(1), self.o, self.o_bias)

    def _query(self, flat: Tensor, turn: Turn) -> Tensor:
        return _turned(flat, self.attention.head_dim, getattr(self.attention, "q_norm", None), turn)

    def _key(self, flat: Tensor, turn: Turn) -> Tensor:
        return _turned(flat, self.attention.head_dim, getattr(self.attention, "k_norm", None), turn)


def _turned(flat: Tensor, size: int, norm: nn.Module | None, turn: Turn) -> Tensor:
    """Split [R, heads * d] into heads, norm (Qwen3 style), rotate in the width of the tables."""
    x = flat.unflatten(-1, (-1, size))
    if norm is not None:
        x = norm(x)
    return rotate(x.to(turn[0].dtype), *turn).to(x.dtype)


def cast_linears(parts: list[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights (and biases, where there are any) of layers with one input, stacked into one product's, in ``dtype``."""
    weights = [part.weight.to(dtype) for part in parts]
    biases = [part.bias.to(dtype) for part in parts if part.bias is not None]
    return torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None
