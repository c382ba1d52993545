"""Multi-head latent attention of a DeepSeek-style draft (DeepSeek-V2, arXiv 2405.04434, section 2.1), by the names that vLLM reads.

    q = q_b(RMS(q_a(x)))              per head [q_n ; q_r]
    [c ; k_r] = kv_a_with_mqa(x)      k_r is one rope head shared by all heads
    [k_n ; v] = kv_b(RMS(c))          per head
    k = [k_n ; k_r]                   scores q.k / sqrt(nope + rope), times m^2 under YaRN

RoPE turns q_r and k_r alone, in interleaved pairs (2i, 2i+1). The attention itself (``attention/``) wants one head size d for queries, keys and values
and the scale 1/sqrt(d): the narrower of (nope + rope) and v is padded with zeros, and what the scale differs by goes into the queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.models.ops.dense_projections import Projections, Rotation
from torchspec.models.ops.norm import RMSNorm
from torchspec.models.ops.rope import rotate_pairs
from torchspec.models.ops.shared_rows import Residual, linear
from torchspec.models.ops.shared_weight import Weight


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of DeepSeek's multi-head latent attention, by the names of its configuration (arXiv 2405.04434)."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"draft.mla.{name}", value, "is no size", "use 1 or more; servers need every one of them")

    @classmethod
    def of(cls, target: Any) -> LatentSizes | None:
        """The target's own, or None where its attention is another; a target without a query rank (DeepSeek-V2-Lite) gets three times the key's."""
        if getattr(target, "kv_lora_rank", None) is None or getattr(target, "qk_rope_head_dim", None) is None:
            return None
        return cls(
            q_lora_rank=int(getattr(target, "q_lora_rank", None) or 3 * target.kv_lora_rank),
            kv_lora_rank=int(target.kv_lora_rank),
            qk_nope_head_dim=int(target.qk_nope_head_dim),
            qk_rope_head_dim=int(target.qk_rope_head_dim),
            v_head_dim=int(target.v_head_dim),
        )


class LatentAttention(nn.Module):
    """Parameters of one layer.

    Args:
        width: of its input.
        hidden_size: H, of its output.
        heads: of queries, and so of keys and values.
        sizes: the rest.
        norm_eps: of the norms inside.
        scale: of scores, :func:`softmax_scale`.
    """

    def __init__(self, width: int, *, hidden_size: int, heads: int, sizes: LatentSizes, norm_eps: float, scale: float) -> None:
        super().__init__()
        self.sizes, self.heads, self.scale, eps = sizes, heads, scale, norm_eps
        self.q_a_proj = nn.Linear(width, sizes.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, eps)
        self.q_b_proj = nn.Linear(sizes.q_lora_rank, self.heads * (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(sizes.kv_lora_rank, self.heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * sizes.v_head_dim, hidden_size, bias=False)

    def cast(self, dtype: torch.dtype) -> Projections:
        """The weights for one forward pass."""
        return LatentProjections(self, dtype)


class LatentProjections:
    """:class:`~torchspec.models.ops.dense_projections.Projections` of latent attention; every head has a key and a value of its own (g = h)."""

    def __init__(self, attention: LatentAttention, dtype: torch.dtype) -> None:
        self.attention = attention
        self.inputs = Weight.of([attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight], dtype)
        self.bias: Tensor | None = None
        self.query_size = attention.q_a_proj.weight.shape[0]
        self.q_b = Weight.of([attention.q_b_proj.weight], dtype)
        self.kv_b = Weight.of([attention.kv_b_proj.weight], dtype)
        self.o = Weight.of([attention.o_proj.weight], dtype)
        self.query_norm, self.key_norm = attention.q_a_layernorm.cast(), attention.kv_a_layernorm.cast()
        sizes = attention.sizes
        self.qk = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        self.width = max(self.qk, sizes.v_head_dim)
        self.only_rotated, self.head_size = False, self.width

    def all(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        low_query, low_key = flat.split([self.query_size, flat.shape[1] - self.query_size], dim=-1)
        return self.queries(low_query, rotation), *self.keys_values(low_key, rotation)

    def round(self, columns: slice, *, gradient: bool) -> None:
        """Nothing: these products stay as they are."""

    def output(self, attended: Tensor, residual: Residual) -> Tensor:
        return linear(attended[..., : self.attention.sizes.v_head_dim].flatten(1), self.o, residual=residual)

    def queries(self, flat: Tensor, rotation: Rotation) -> Tensor:
        sizes = self.attention.sizes
        heads = linear(self.query_norm(flat), self.q_b).unflatten(-1, (self.attention.heads, -1))
        plain, turned = heads.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        query = torch.cat([plain, _rotated(turned, rotation)], dim=-1) * (self.attention.scale * math.sqrt(self.width))
        return F.pad(query, (0, self.width - self.qk))

    def keys_values(self, flat: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        sizes, heads = self.attention.sizes, self.attention.heads
        latent, shared = flat.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1)
        both = linear(self.key_norm(latent), self.kv_b).unflatten(-1, (heads, -1))
        plain, value = both.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        key = torch.cat([plain, _rotated(shared[:, None], rotation).expand(-1, heads, -1)], dim=-1)
        return F.pad(key, (0, self.width - self.qk)), F.pad(value, (0, self.width - sizes.v_head_dim))


def softmax_scale(sizes: LatentSizes, rope: Mapping[str, Any]) -> float:
    """1/sqrt(nope + rope), times m^2 with m = 0.1 mscale_all_dim ln(factor) + 1 under YaRN (as DeepSeek-V2 and vLLM; YaRN: arXiv 2309.00071)."""
    scale = (sizes.qk_nope_head_dim + sizes.qk_rope_head_dim) ** -0.5
    if rope["rope_type"] == "yarn" and rope["factor"] > 1:
        scale *= (0.1 * float(rope.get("mscale_all_dim") or 0.0) * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    return rotate_pairs(x.to(rotation[0].dtype), *rotation).to(x.dtype)
