"""Rotary position embedding of the draft: Transformers' own frequency tables, applied to packed rows.

Half-split pairing (Llama's): dimension i turns with i + d/2. Frequencies come from ``ROPE_INIT_FUNCTIONS``, so that scaling kinds mean what they mean there.
RoPE: Su et al., arXiv 2104.09864; YaRN: 2309.00071.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.draft_config import DraftConfig

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] fp32 and the factor on cos and sin.

    Raises:
        UserError: a kind that serving does not share (longrope), or an unknown one.
    """
    kind = config.rope_parameters["rope_type"]
    if kind not in KINDS:
        raise UserError("draft.rope_parameters.rope_type", kind, f"is not one of {', '.join(KINDS)}", "choose one of these for the draft")
    if kind == "default":
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        return (1.0 / config.rope_parameters["rope_theta"] ** half).float(), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inverse, factor = ROPE_INIT_FUNCTIONS[kind](_described(config), device=torch.device("cpu"))
    return inverse.float(), float(factor)


def _described(config: DraftConfig) -> Any:
    """What Transformers' functions read of a configuration."""
    from transformers import LlamaConfig

    plain = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
    assert isinstance(plain.rope_parameters, dict) and plain.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]
    return plain


def tables(inverse: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [N, 1, head_dim / 2], for int positions [N]."""
    angle = positions.to(inverse.dtype)[:, None, None] * inverse
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [N, heads, head_dim] by the tables of its rows."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
