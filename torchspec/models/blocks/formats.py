"""``config.json`` and tensors of an exported block draft, for each server, and what a server would serve wrongly.

Read against vLLM 0.32 and 0.33, speculators 0.9.0 and SGLang 0.5.23. Who decides what a slot sees is the server, from config.json: vLLM by ``is_causal``
before layer types, SGLang likewise; so both are written. Windows are each slot's own. Layer ids: a block's output is ``i`` in our counting and ``i - 1``
under ``target_layer_ids``. Tensors go by the draft's own names; the head is the target's, and its rows are written where they are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.family import FORMATS, Draft, Format
from torchspec.models.target_head import TargetHead
from torchspec.target import Target

MASK_FILE = "mask_embedding.pt"
SPECULATORS_VERSION = "0.9.0"
ARCHITECTURES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "Qwen3DSparkModel"}
_SPECULATORS_CLASS = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "Qwen3DSparkModel"}


def refuse_unserved(config: BlockConfig, target: Target, *, form: Format) -> None:
    """Refuse a draft that the format cannot say, or that its server would run as another one without a word.

    Raises:
        UserError: the option, why, and which format can.
    """
    if form not in FORMATS:
        raise UserError("format", form, f"is not one of {', '.join(FORMATS)}", "choose one of these")
    reasons: dict[str, bool] = {}
    if form == "speculators":
        reasons = {
            "causal blocks without a window (speculators' full-attention layers see their whole block)": config.causal and config.sliding_window is None,
            "a logit scale (the format has none)": config.logit_scale != 1.0,
            "a learned mask (the format has none)": config.learned_mask,
        }
    elif form == "sglang":
        reasons = {
            "a pruned vocabulary (SGLang uses the target's whole head, and skips lm_head and d2t)": config.draft_vocab_size < config.vocab_size,
            "a learned mask (SGLang writes it over the target's own row)": config.learned_mask,
            f"aux layer {target.num_layers} (SGLang captures before a block, so never after the last)": target.num_layers in config.aux_layers,
            "aux layer 0 (SGLang counts blocks' outputs, so never the embedding)": 0 in config.aux_layers,
            "a logit scale (not known to be read)": config.logit_scale != 1.0,
        }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise UserError("format", form, f"cannot serve this draft: it has {'; '.join(found)}", "export with --format vllm")


def describe(
    config: BlockConfig, target: Target, *, form: Format, dtype: torch.dtype, training: Mapping[str, Any] | None = None, target_name: str | None = None
) -> dict[str, Any]:
    """``config.json`` of a draft.

    Args:
        config: the draft's architecture.
        target: gives special token ids and its own name.
        form: who reads it.
        dtype: of the tensors beside it.
        training: for people: how it was trained.
        target_name: hub id to name the target by; None takes ``target.config.path`` where that is a hub id.

    Raises:
        UserError: see :func:`refuse_unserved`.
    """
    refuse_unserved(config, target, form=form)
    network, kind = _network(config, target), str(dtype).removeprefix("torch.")
    types = {"torch_dtype": kind, "dtype": kind}
    if form == "speculators":
        return {**_speculators(config, target, network, target_name), **types}
    described = {"architectures": [ARCHITECTURES[config.kind]], **network, "draft_vocab_size": config.draft_vocab_size, **types}
    described |= {"block_size": config.block_size, "eagle_aux_hidden_state_layer_ids": list(config.aux_layers), "mask_token_id": config.mask_token_id}
    described["num_target_layers"] = target.num_layers
    if config.logit_scale != 1.0:
        described["logit_scale"] = config.logit_scale
    block: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": [i - 1 for i in config.aux_layers]}
    if config.kind == "dspark":
        described |= {"target_layer_ids": block["target_layer_ids"], "sample_from_anchor": True, **_dspark(config)}
    if config.kind == "dflash2":
        block |= _dflash2(config)
        if config.logit_scale != 1.0:
            block["output_multiplier"] = config.logit_scale
    described["dflash_config"] = block
    if training is not None:
        described["torchspec"] = {"options": dict(training), "target": target_name or target.config.path, "target_fingerprint": target.fingerprint}
    return described


def _network(config: BlockConfig, target: Target) -> dict[str, Any]:
    """The transformer part, as Transformers' Qwen3 configuration reads it."""
    rope, windowed = dict(config.rope_parameters), config.sliding_window is not None
    described: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"},
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "is_causal": config.causal,
        "layer_types": ["sliding_attention" if windowed else "full_attention"] * config.num_layers,
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(target.hf_config, name, None)
        if value is not None:
            described[name] = value
    return described


def _dspark(config: BlockConfig) -> dict[str, Any]:
    more = {"markov_rank": config.markov_rank, "markov_head_type": "vanilla", "enable_confidence_head": config.confidence}
    return {**more, "confidence_head_with_markov": config.confidence}


def _dflash2(config: BlockConfig) -> dict[str, Any]:
    sizes = {"conv_kernel_size": config.conv_taps, "conv_group_size": config.conv_group}
    return {**sizes, "selector_rank": config.selector_rank, "selector_top_k": config.selector_candidates}


def _speculators(config: BlockConfig, target: Target, network: dict[str, Any], target_name: str | None) -> dict[str, Any]:
    """Every flag is written: readers of this format disagree on what an absent one means. There must be no top-level ``model_type``."""
    local = Path(target.config.path)
    name = target_name or (str(local.resolve()) if local.is_dir() else target.config.path)
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.horizon, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    extra = {"dspark": _dspark, "dflash2": _dflash2}.get(config.kind, lambda _: {})(config)
    return {
        "architectures": [_SPECULATORS_CLASS[config.kind]],
        "speculators_model_type": config.kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": config.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": name, "architectures": list(getattr(target.full_hf_config, "architectures", None) or [])},
        },
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": list(config.aux_layers),
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.kind == "dspark",
        "sliding_window_non_causal": not config.causal,
        "tie_word_embeddings": False,
        **extra,
        "transformer_layer_config": network,
    }


def written(draft: Draft, target: Target, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a draft as servers look for them: its own but a learned mask, and the rows of the target's head with their ids where they are fewer."""
    tensors = {name: tensor for name, tensor in draft.weights.items() if name != "mask_embedding"}
    vocabulary = draft.vocabulary
    if vocabulary is None or vocabulary.size == draft.config.vocab_size:
        return tensors
    rows = TargetHead.of(target).weight[vocabulary.draft_ids].to(dtype)
    return {**tensors, "lm_head.weight": rows.contiguous(), "d2t": vocabulary.d2t.contiguous(), "t2d": vocabulary.t2d.contiguous()}


def write_mask(folder: Path, draft: Draft) -> None:
    """A learned mask as the file that vLLM looks for; nothing where there is none."""
    if "mask_embedding" in draft.weights:
        torch.save({"embedding": draft.weights["mask_embedding"], "mask_token_id": draft.config.mask_token_id}, folder / MASK_FILE)


def read_mask(folder: Path) -> dict[str, Tensor]:
    """A learned mask that is published in a file of its own, by its name in the network."""
    file = folder / MASK_FILE
    if not file.is_file():
        return {}
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {"mask_embedding": (state["embedding"] if isinstance(state, dict) else state).reshape(-1)}
