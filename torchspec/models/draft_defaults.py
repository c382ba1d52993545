"""What a draft gets where the target's own number would not do: RoPE that a server's draft cannot say, and the width of
an expert.

Each choice comes with the sentence that is printed when it is made; ``model.draft`` overrides it.
"""

from __future__ import annotations

import copy
from typing import Any

from torchspec.models.ops.rope_parameters import KINDS, base_and_kind, rope_of
from torchspec.target import Target

_SHORT = 8192
"""Positions up to which a base of 10,000 is used for a target without RoPE; 1,000,000 beyond, as long-context models have
it."""
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
_OF_EXPERTS = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "expert_intermediate_size")
_DENSE = ("intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size")


def whole(config: Any) -> Any:
    """A configuration whose numbers can be read although layers differ in them (Gemma-4's heads): the one that most have."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    copied = copy.deepcopy(config)
    copied.allow_global_per_layer_attribute_access = True
    return copied


def default_rope(config: Any) -> tuple[dict[str, Any], str | None]:
    """RoPE of a draft for a target, and what to say about it.

    Args:
        config: text part of the target's configuration.

    Returns:
        Parameters in Transformers 5's form; a sentence where they are not the target's.
    """
    base, kind = base_and_kind(config)
    if base is None:
        long = int(getattr(config, "max_position_embeddings", None) or 0) > _SHORT
        base = 1e6 if long else 1e4
        return {"rope_type": "default", "rope_theta": base}, f"the target has no RoPE: the draft turns whole heads with base {base:,.0f}"
    if kind not in KINDS:
        said = f"the target's RoPE of kind {kind} is none that a server's draft has: the draft turns whole heads with base {base:,.0f}"
        return {"rope_type": "default", "rope_theta": float(base)}, said
    return rope_of(config), None


def default_width(config: Any, *, hidden_size: int) -> tuple[int, str | None]:
    """Width of the draft's MLP, and what to say about it.

    Args:
        config: text part of the target's configuration.
        hidden_size: D.
    """
    own = _number(config, "intermediate_size")
    if not any(_number(config, name) > 1 for name in _EXPERTS):
        return own or 4 * hidden_size, None
    expert = max(_number(config, name) for name in _OF_EXPERTS)
    if own > expert > 0:  # the width of layers without experts
        return own, None
    width = max(own, 3 * hidden_size, *(_number(config, name) for name in _DENSE))
    said = f"the target's intermediate_size is an expert's ({own or expert}): the draft's MLP is {width} wide"
    return width, None if width == own else said


def notes(target: Target, *, rope_parameters: dict[str, Any], intermediate_size: int) -> list[str]:
    """What to print of a draft with these numbers: each default that is not the target's own."""
    config = whole(target.hf_config)
    rope, about_rope = default_rope(config)
    width, about_width = default_width(config, hidden_size=target.hidden_size)
    chosen = ((about_rope, rope == rope_parameters), (about_width, width == intermediate_size))
    return [f"{said} (model.draft changes it)" for said, holds in chosen if said is not None and holds]


def _number(config: Any, name: str) -> int:
    """A size, the largest of a list (Gemma-3n has one a layer), or 0."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        value = max((item for item in value if isinstance(item, int)), default=0)
    return int(value or 0)
