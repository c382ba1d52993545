"""RoPE as plain values: read from a Transformers configuration of any version, and checked for what training and every server would not agree on.

The form is Transformers 5's (``rope_type``, ``rope_theta`` and the kind's own fields). A base that is read with a default trains every draft wrongly
without a word, so there is no default anywhere here. A draft turns whole heads by the position in its text: a target's partial or multi-axis rotation is
not taken over.
"""

from __future__ import annotations

from typing import Any

from torchspec.errors import UserError

KINDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
}
"""Kinds that Transformers, speculators and vLLM compute alike, with the fields that each must have and may have."""
_COMMON = frozenset({"rope_type", "rope_theta"})
_NOTHING = (("partial_rotary_factor", 1.0),)
"""Fields whose value says nothing."""


def base_and_kind(config: Any) -> tuple[float | None, str]:
    """Base and kind of a Transformers configuration's RoPE, wherever the version keeps them; a base of None where there is none."""
    parameters = _written(config)
    kind = parameters.get("type") or parameters.get("rope_type") or "default"
    kind = "default" if kind == "mrope" else kind  # of text alone, every axis has the same position
    base = parameters.get("rope_theta")
    return None if base is None else float(base), kind


def _written(config: Any) -> dict[str, Any]:
    """What a configuration says, with the base among it."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if parameters and "rope_theta" not in parameters and all(isinstance(value, dict) for value in parameters.values()):
        # one entry a layer type (Gemma-3): the draft attends to everything, as full-attention layers do
        parameters = dict(parameters.get("full_attention") or next(iter(parameters.values())))
    if not parameters:
        parameters = dict(getattr(config, "rope_scaling", None) or {})
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(config, "rope_theta", None)
    return parameters


def rope_of(config: Any, *, exact: bool = False) -> dict[str, Any]:
    """RoPE of a Transformers configuration, in the form of version 5, wherever the version keeps it.

    Args:
        config: of a target, or anything with the same attributes.
        exact: of a draft: refuse what a draft here would not honour, rather than leaving it out.

    Raises:
        UserError: when no base is found, or the draft cannot have the target's kind (longrope).
    """
    parameters = _written(config)
    base, kind = base_and_kind(config)
    if base is None:
        raise UserError(
            "data.target.path", getattr(config, "_name_or_path", ""), "has a configuration without a RoPE base", "give rope_parameters in model.draft"
        )
    parameters.pop("type", None)
    if kind not in KINDS:
        raise UserError(
            "data.target.path",
            getattr(config, "_name_or_path", ""),
            f"has RoPE of kind {kind}, which a draft cannot have",
            f"give rope_parameters of one of the kinds {', '.join(KINDS)} in model.draft",
        )
    required, optional = KINDS[kind]
    left = {name for name, value in parameters.items() if value is not None and name not in required | optional | _COMMON and (name, value) not in _NOTHING}
    if exact and left:
        raise UserError("draft", getattr(config, "_name_or_path", ""), f"has RoPE with {', '.join(sorted(left))}", "such a draft cannot be trained here")
    kept = {name: parameters[name] for name in sorted(required | optional) if parameters.get(name) is not None}
    return {"rope_type": kind, "rope_theta": base, **kept}


def check_rope(parameters: dict[str, Any], *, latent: bool) -> None:
    """Refuse what a draft cannot be served with.

    Args:
        parameters: in Transformers 5's form.
        latent: whether the attention is DeepSeek's, whose servers read YaRN their own way.

    Raises:
        UserError: a missing base, an unknown kind, a field that is missing, unknown or of no effect.
    """
    where = "draft.rope_parameters"
    kind = parameters.get("rope_type")
    if kind not in KINDS:
        raise UserError(f"{where}.rope_type", kind, f"is not one of {', '.join(KINDS)}", "choose one of these for the draft")
    if parameters.get("rope_theta") is None:
        raise UserError(where, parameters, "holds no rope_theta", "give the base of the rotary embedding")
    required, optional = KINDS[kind]
    missing = sorted(name for name in required if parameters.get(name) is None)
    if missing:
        raise UserError(where, parameters, f"lacks {', '.join(missing)}", f"give all of {', '.join(sorted(required))}")
    unknown = sorted(parameters.keys() - required - optional - _COMMON)
    if unknown:
        raise UserError(where, unknown, f"has no effect on RoPE of kind {kind}", "remove it")
    if not latent:
        return
    if kind not in {"default", "yarn"}:
        raise UserError(f"{where}.rope_type", kind, "is not served with latent attention", "choose default or yarn")
    odd = sorted(parameters.keys() & {"attention_factor", "truncate"})
    if odd:
        raise UserError(where, odd, "is ignored by servers of latent attention", "remove it")
    if bool(parameters.get("mscale")) != bool(parameters.get("mscale_all_dim")):
        raise UserError(where, parameters, "has one of mscale and mscale_all_dim", "give both or none: libraries differ on one alone")
