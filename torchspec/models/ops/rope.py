"""Rotary position embedding of the draft: Transformers' own frequency tables, applied to packed rows.

Frequencies come from ``ROPE_INIT_FUNCTIONS``, so that scaling kinds mean what they mean there; ``rope_parameters.py`` says which kinds there are. Pairs are
halves (dimension i turns with i + d/2, Llama's way) or neighbours (2i with 2i + 1, DeepSeek's).
RoPE: Su et al., arXiv 2104.09864; YaRN: 2309.00071.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError


def frequencies(parameters: Mapping[str, Any], *, size: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies [d / 2] fp32 of the d rotated dimensions of a head, and the factor on cos and sin.

    Args:
        parameters: in Transformers 5's form (``rope_parameters.py``).
        size: d.
        max_positions: ``max_position_embeddings``, which some kinds read.
    """
    kind = parameters["rope_type"]
    if kind == "default":
        half = torch.arange(0, size, 2, dtype=torch.float64) / size
        return (1.0 / parameters["rope_theta"] ** half).float(), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with torch.device("cpu"):  # also where the draft is built on the meta device
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](_described(parameters, size, max_positions), device=torch.device("cpu"))
    return inverse.float(), float(factor)


def _described(parameters: Mapping[str, Any], size: int, max_positions: int) -> Any:
    """What Transformers' functions read of a configuration."""
    from transformers import LlamaConfig

    plain = LlamaConfig(
        hidden_size=size,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=size,
        max_position_embeddings=max_positions,
        rope_parameters=dict(parameters),
    )
    assert isinstance(plain.rope_parameters, dict) and plain.rope_parameters["rope_theta"] == parameters["rope_theta"]
    return plain


def check_reach(parameters: Mapping[str, Any], *, max_positions: int, longest: int) -> None:
    """Refuse positions at which training and serving would turn differently.

    Args:
        parameters: of the draft's RoPE.
        max_positions: its ``max_position_embeddings``.
        longest: tokens of the longest conversation, draft tokens included.

    Raises:
        UserError: dynamic RoPE beyond ``max_position_embeddings``, where Transformers changes the base with the length and servers do not.
    """
    if parameters["rope_type"] == "dynamic" and longest > max_positions:
        raise UserError(
            "data.max_length",
            longest,
            f"(with the unroll) exceeds the {max_positions} positions up to which dynamic RoPE is the same everywhere",
            "lower data.max_length, or give the draft RoPE of another kind (yarn)",
        )


def tables(inverse: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, d / 2], for int positions [N]."""
    angle = positions.to(inverse.dtype)[:, None, None] * inverse
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation [N, heads, d] by the tables of its rows, in halves."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation [N, heads, d] by the tables of its rows, neighbours together. The result is in the order of halves, which products of two of them ignore."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
