"""Published block drafts read back: vLLM's plain form (z-lab's, DeepSpec's DSpark) and speculators'.

What a slot sees follows vLLM's order: ``is_causal``, ``dflash_config.causal``, then layer types. Layer ids: ours under ``eagle_aux_hidden_state_layer_ids``
and speculators' ``aux_hidden_state_layer_ids``, blocks' outputs (one less) elsewhere. A head or an embedding that is published too must be the target's: a
draft here has none of its own. An embedding that differs in the mask's row alone is a learned mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.blocks.config import KINDS, BlockConfig, Kind
from torchspec.models.blocks.formats import ARCHITECTURES
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.family import Draft
from torchspec.models.ops.rope_parameters import rope_of
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target

_ROUNDING = 0.01
"""Relative difference of a published table that another float type may make."""
_SLIDING = "sliding_attention"
_UNKNOWN = {
    "hidden_act": "silu", "mlp_bias": False, "is_neox_style": True, "attention_sink_bias": False, "add_swa_attention_sink_bias": False,
    "attention_value_scale": None, "input_embedding_scale": 1.0, "final_logit_softcapping": 0.0, "use_aux_hidden_state": True,
    "markov_head_type": "vanilla", "projector_type": None,
}  # fmt: skip
"""What changes the computation and a draft here does not have, with the value that says nothing."""


def kind_of(described: Mapping[str, Any]) -> Kind | None:
    """Which block draft a ``config.json`` describes; None for another one."""
    form, names = described.get("speculators_model_type"), described.get("architectures") or []
    for kind in KINDS:
        if form == kind or (form is None and ARCHITECTURES[kind] in names):
            return kind
    return None


def read_draft(described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, where: str) -> Draft:
    """Architecture and weights of a published draft.

    Args:
        described: its ``config.json``.
        tensors: all of it, by name.
        target: the model it drafts for.
        where: for errors.

    Raises:
        UserError: a field that we cannot honour, missing or unknown tensors, or a head, embedding or size that is not the target's.
    """
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    config = config_of(described, tensors, target, where=where)
    head = TargetHead.of(target)
    ids = _vocabulary(tensors, config, where)
    published = tensors.pop("lm_head.weight", None)
    if published is not None and not _same(published, head.weight if ids is None else head.weight[ids.draft_ids]):
        raise UserError("draft", where, "has a head of its own", "a block draft is trained here with the target's head: such a draft cannot be gone on with")
    _mask(tensors, config, target, where)
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in BlockDraft(config).named_parameters()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        problem = "; ".join(f"{word} {', '.join(names[:4])}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names)
        raise UserError("draft", where, problem, "give a whole draft of this kind")
    wrong = [f"{name} {tuple(tensors[name].shape)}, not {tuple(shape)}" for name, shape in expected.items() if tensors[name].shape != shape]
    if wrong:
        raise UserError("draft", where, f"has tensors of other shapes than its config.json: {', '.join(wrong[:3])}", "correct its config.json")
    return Draft(config, {name: tensors[name] for name in expected}, ids)


def config_of(described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, where: str) -> BlockConfig:
    """The architecture that a published ``config.json`` describes.

    Raises:
        UserError: see :func:`read_draft`.
    """
    kind = kind_of(described)
    if kind is None:
        raise UserError("draft", where, f"is of architecture {described.get('architectures')}", f"give one of {', '.join(ARCHITECTURES.values())}")
    published = "speculators_model_type" in described
    network: dict[str, Any] = described.get("transformer_layer_config") or {} if published else described
    inner: dict[str, Any] = described.get("dflash_config") or {}
    say = {**network, **described, **inner}
    for name, value in _UNKNOWN.items():
        if say.get(name, value) not in (value, None):
            raise UserError("draft", where, f"has {name}={say[name]}", "such a draft cannot be trained here")
    anchored = say.get("sample_from_anchor")
    if kind == "dspark" and (anchored is False or (published and anchored is None)):
        raise UserError("draft", where, "is a DSpark draft whose anchor predicts nothing (sample_from_anchor)", "such a draft cannot be trained here")
    if kind != "dspark" and anchored:
        problem = "predicts at its anchor (sample_from_anchor), which is DSpark's layout without its heads"
        raise UserError("draft", where, problem, "servers of DFlash would take each of its tokens one late: such a draft cannot be trained here")
    window, causal = _attention(network, inner, described, published=published, where=where)
    if say.get("mask_token_id") is None:
        raise UserError("draft", where, "names no mask_token_id", "add it to its config.json")
    vocab = _size(network, "vocab_size", where)
    more: dict[str, Any] = {}
    if kind == "dspark":
        if not say.get("markov_rank") or "markov_head.markov_w1.weight" not in tensors:
            problem = "has DSpark's layout and no Markov head: trained as DFlash with labels one later"
            raise UserError("draft", where, problem, "such a draft cannot be trained here")
        more = {"markov_rank": say["markov_rank"], "confidence": "confidence_head.proj.weight" in tensors}
        if more["confidence"] and not say.get("confidence_head_with_markov", False):
            raise UserError("draft", where, "has a confidence head that does not read the Markov embedding", "such a draft cannot be trained here")
    if kind == "dflash2":
        names = {"conv_taps": "conv_kernel_size", "conv_group": "conv_group_size", "selector_rank": "selector_rank", "selector_candidates": "selector_top_k"}
        more = {ours: _size(say, theirs, where) for ours, theirs in names.items()}
    heads = _size(network, "num_attention_heads", where)
    config = BlockConfig(
        kind=kind,
        hidden_size=_size(network, "hidden_size", where),
        intermediate_size=_size(network, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=network.get("num_key_value_heads") or heads,
        head_dim=network.get("head_dim") or _size(network, "hidden_size", where) // heads,
        vocab_size=vocab,
        draft_vocab_size=described.get("draft_vocab_size") or vocab,
        aux_layers=_layers(described, inner, tensors, target, where),
        rope_parameters=rope_of(SimpleNamespace(**network, _name_or_path=where), exact=True),
        max_position_embeddings=_size(network, "max_position_embeddings", where),
        mask_token_id=int(say["mask_token_id"]),
        learned_mask=_learned(tensors, int(say["mask_token_id"]), target),
        block_size=_size(say, "block_size", where),
        num_layers=_size(network, "num_hidden_layers", where),
        causal=causal,
        sliding_window=window,
        rms_norm_eps=float(network.get("rms_norm_eps", 1e-6)),
        initializer_range=float(network.get("initializer_range", 0.02)),
        attention_bias=bool(network.get("attention_bias", False)),
        logit_scale=float(say.get("logit_scale") or 1.0),
        **more,
    )
    for name, theirs, ours in (("vocab_size", config.vocab_size, target.vocab_size), ("hidden size", config.hidden_size, target.hidden_size)):
        if theirs != ours:
            raise UserError("draft", where, f"was made for a target of {name} {theirs}; this one has {ours}", "give the draft's own target")
    return config


def _attention(
    network: dict[str, Any], inner: dict[str, Any], described: dict[str, Any], *, published: bool, where: str
) -> tuple[int | None, bool]:  # fmt: skip
    """Window, and whether blocks are causal."""
    kinds = list(network.get("layer_types") or [])
    sliding = [kind == _SLIDING for kind in kinds]
    if any(sliding) and not all(sliding):
        raise UserError("draft", where, "has layers with and without a window", "such a draft cannot be trained here")
    windowed = any(sliding) or bool(inner.get("use_swa"))
    window = inner.get("swa_window_size") or network.get("sliding_window") if windowed else None
    if windowed and window is None:
        raise UserError("draft", where, "attends to a window that it does not name", "add sliding_window to its config.json")
    if network.get("is_causal") is not None:
        return window, bool(network["is_causal"])
    if inner.get("causal") is not None:
        return window, bool(inner["causal"])
    if published:  # trained so by speculators; full-attention layers see their whole block whatever is said
        return window, windowed and not described.get("sliding_window_non_causal", False)
    return window, any(sliding)


def _layers(described: dict[str, Any], inner: dict[str, Any], tensors: dict[str, Tensor], target: Target, where: str) -> tuple[int, ...]:
    """Auxiliary layers in our counting."""
    for name in ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"):
        if described.get(name):
            return target.aux_layers(list(described[name]))
    for ids in (inner.get("target_layer_ids"), *(described.get(name) for name in ("dspark_target_layer_ids", "target_layer_ids", "layer_ids"))):
        if ids:
            return target.aux_layers([i + 1 for i in ids])
    if "fc.weight" not in tensors:
        raise UserError("draft", where, "lacks fc.weight", "give a whole draft")
    return spread_layers(target, tensors["fc.weight"].shape[1] // target.hidden_size)


def spread_layers(target: Target, number: int) -> tuple[int, ...]:
    """The rule of published DFlash drafts that name no layers: blocks round(1 + i (L - 4) / (n - 1)), as outputs in our counting."""
    if number == 1:
        return (target.num_layers // 2 + 1,)
    blocks = [round(1 + i * (target.num_layers - 4) / (number - 1)) for i in range(number)]
    return target.aux_layers([block + 1 for block in blocks])


def _size(values: dict[str, Any], name: str, where: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError("draft", where, f"has {name}={value}", "correct its config.json")
    return value


def _vocabulary(tensors: dict[str, Tensor], config: BlockConfig, where: str) -> VocabularyMapping | None:
    offsets, member = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if offsets is None and config.draft_vocab_size == config.vocab_size:
        return None
    if offsets is None or offsets.numel() != config.draft_vocab_size:
        raise UserError("draft", where, f"lacks a d2t of its {config.draft_vocab_size} draft tokens", "give a whole draft")
    ids = offsets.to(torch.int64) + torch.arange(offsets.numel())
    if member is not None and not torch.equal(member.to(torch.bool).nonzero()[:, 0], ids):
        raise UserError("draft", where, "has a d2t and a t2d that contradict each other, or draft tokens out of order", "give a draft whose tables agree")
    return None if ids.numel() == config.vocab_size else VocabularyMapping(ids, config.vocab_size)


def _same(published: Tensor, own: Tensor) -> bool:
    if published.shape != own.shape:
        return False
    return bool(torch.allclose(published.float(), own.float(), rtol=_ROUNDING, atol=_ROUNDING * float(own.float().abs().mean())))


def _learned(tensors: dict[str, Tensor], token: int, target: Target) -> bool:
    """Whether the mask's row is the draft's own: in a file or tensor of its own, or in an embedding that differs there."""
    if "mask_embedding" in tensors:
        return True
    table = tensors.get("embed_tokens.weight")
    return table is not None and token < table.shape[0] and not _same(table[token], read_embedding(target)[token])


def _mask(tensors: dict[str, Tensor], config: BlockConfig, target: Target, where: str) -> None:
    """Leave the mask's row alone of a published embedding, the rest of which must be the target's."""
    table = tensors.pop("embed_tokens.weight", None)
    if table is None:
        return
    own = read_embedding(target)
    if config.learned_mask and "mask_embedding" not in tensors:
        tensors["mask_embedding"] = table[config.mask_token_id].clone()
        table = table.clone()
        table[config.mask_token_id] = own[config.mask_token_id].to(table.dtype)
    if not _same(table, own):
        raise UserError("draft", where, "has an embedding of its own", "a block draft is trained here with the target's: such a draft cannot be gone on with")
