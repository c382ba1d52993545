"""Rotary position embedding of the draft: Transformers' own frequency tables, applied to packed rows.

Frequencies come from ``ROPE_INIT_FUNCTIONS``, so that scaling kinds mean what they mean there; ``rope_parameters.py`` says which kinds there are. Pairs are
halves (dimension i turns with i + d/2, Llama's way) or neighbours (2i with 2i + 1, DeepSeek's).
RoPE: Su et al., arXiv 2104.09864; YaRN: 2309.00071.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig


def frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] fp32 of the d turned dimensions of a head, and the factor on cos and sin."""
    kind, size = config.rope_parameters["rope_type"], config.rotary_dim
    if kind == "default":
        half = torch.arange(0, size, 2, dtype=torch.float64) / size
        return (1.0 / config.rope_parameters["rope_theta"] ** half).float(), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with torch.device("cpu"):  # also where the draft is built on the meta device
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](_described(config), device=torch.device("cpu"))
    return inverse.float(), float(factor)


def _described(config: DraftConfig) -> Any:
    """What Transformers' functions read of a configuration."""
    from transformers import LlamaConfig

    plain = LlamaConfig(
        hidden_size=config.rotary_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=config.rotary_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
    assert isinstance(plain.rope_parameters, dict) and plain.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]
    return plain


def check_reach(config: DraftConfig, longest: int) -> None:
    """Refuse positions at which training and serving would turn differently.

    Args:
        config: of the draft.
        longest: tokens of the longest conversation, unroll included.

    Raises:
        UserError: dynamic RoPE beyond ``max_position_embeddings``, where Transformers changes the base with the length and servers do not.
    """
    if config.rope_parameters["rope_type"] == "dynamic" and longest > config.max_position_embeddings:
        raise UserError(
            "data.max_length",
            longest,
            f"(with the unroll) exceeds the {config.max_position_embeddings} positions up to which dynamic RoPE is the same everywhere",
            "lower data.max_length, or give the draft RoPE of another kind (yarn)",
        )


def tables(inverse: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, d / 2], for int positions [N]."""
    angle = positions.to(inverse.dtype)[:, None, None] * inverse
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [N, heads, d] by the tables of its rows, in halves."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [N, heads, d] by the tables of its rows, neighbours together. The result is in the order of halves, which products of two of them ignore."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
