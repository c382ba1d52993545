"""``config.json`` of an exported draft, for each server, and what a server would serve wrongly.

Read against vLLM 0.32 and 0.33, speculators 0.9.0 and SGLang 0.5.23. RoPE is written in the old fields (``rope_theta``, ``rope_scaling``) and the new one
(``rope_parameters``), so that Transformers 4.57 and 5 both read the base that was trained. Layer ids: SGLang counts a block's output as the block, one
less than everybody else, and reads ``eagle_config``; the others read the top-level list in our counting. With the default ids neither is written in the
plain forms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig, default_layers
from torchspec.models.family import FORMATS, Draft, Format
from torchspec.models.target_head import read_embedding
from torchspec.target import Target

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Options that every server reads by these names; absent means off in the plain forms."""
SPECULATORS_VERSION = "0.9.0"


def describe(
    config: DraftConfig, target: Target, *, form: Format, dtype: torch.dtype, unroll_steps: int | None = None, target_name: str | None = None
) -> dict[str, Any]:
    """``config.json`` of a draft.

    Args:
        config: the draft's architecture.
        target: gives special token ids, its own name and the default layer ids.
        form: who reads it.
        dtype: of the tensors beside it.
        unroll_steps: K of the training, for people and as speculators' number of proposals.
        target_name: hub id to name the target by; None takes ``target.config.path`` where that is a hub id.

    Raises:
        UserError: see :func:`refuse_unserved`.
    """
    refuse_unserved(config, target, form=form)
    network = _network(config, target)
    if len(config.aux_layers) != 3:
        network["num_aux_hidden_states"] = len(config.aux_layers)
    kind = str(dtype).removeprefix("torch.")
    types = {"torch_dtype": kind, "dtype": kind}
    if form == "speculators":
        return {**_speculators(config, target, network, unroll_steps, target_name), **types}
    described = {"architectures": [_architecture(config)], **network, "draft_vocab_size": config.draft_vocab_size, **types}
    described["target_hidden_size"] = config.target_hidden_size
    described |= {flag: True for flag in FLAGS if getattr(config, flag)}
    if target.num_layers < 7 or tuple(config.aux_layers) != default_layers(target):
        described["eagle_aux_hidden_state_layer_ids"] = list(config.aux_layers)
        described["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.aux_layers], "use_aux_hidden_state": True}
    if unroll_steps is not None:
        described["torchspec"] = {"unroll_steps": unroll_steps, "target": target_name or target.config.path, "target_fingerprint": target.fingerprint}
    return described


def written(draft: Draft, target: Target, *, form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a draft as servers look for them: its own, the target's embedding table, and ``d2t`` and ``t2d`` of a pruned vocabulary."""
    config, vocabulary, tensors = draft.config, draft.vocabulary, dict(draft.weights)
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = read_embedding(target).to(dtype).contiguous()
    if form == "sglang":
        for i in range(1, config.num_layers):  # SGLang's name of that norm; vLLM reads the other, and both must be there to serve alike
            tensors[f"layers.{i}.hidden_norm.weight"] = tensors[f"layers.{i}.input_layernorm.weight"].clone()
    if vocabulary is not None and vocabulary.size < config.vocab_size:
        tensors["d2t"] = vocabulary.d2t.contiguous()
        tensors["t2d"] = vocabulary.t2d.contiguous()
    return tensors


def refuse_unserved(config: DraftConfig, target: Target, *, form: Format) -> None:
    """Refuse a draft that the format cannot say, or that its server would run as another one without a word.

    Raises:
        UserError: the option, why, and which format can.
    """
    if form not in FORMATS:
        raise UserError("format", form, f"is not one of {', '.join(FORMATS)}", "choose one of these")
    reasons: dict[str, bool] = {}
    if form == "speculators":
        reasons = {
            "mla (the format knows Llama's and Qwen3's attention)": config.mla is not None,
            "a hidden size that differs from the target's (speculators reads one size for both)": config.owns_embedding,
        }
    elif form == "sglang":
        reasons = {
            "mla (SGLang's latent draft is another network)": config.mla is not None,
            "qk_norm (SGLang's draft has no norms on queries and keys, and skips their tensors)": config.qk_norm,
            "attention_bias (SGLang's draft has none on queries, keys and values)": config.attention_bias,
            "norm_before_residual (SGLang does not read it)": config.norm_before_residual,
            "an embedding of its own (SGLang always takes the target's)": config.owns_embedding,
            f"aux layer {target.num_layers} (SGLang captures before a block, so never after the last)": target.num_layers in config.aux_layers,
            "one aux layer as wide as the draft (SGLang then skips fc)": len(config.aux_layers) == 1 and not config.owns_embedding,
        }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        others = "vllm" if form == "sglang" or config.mla is not None or config.owns_embedding else "vllm or sglang"
        raise UserError("format", form, f"cannot serve this draft: it has {'; '.join(found)}", f"export with --format {others}")


def _architecture(config: DraftConfig) -> str:
    if config.mla is not None:
        return "Eagle3DeepseekV2ForCausalLM"
    return "Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"


def _network(config: DraftConfig, target: Target) -> dict[str, Any]:
    """The transformer part, as Transformers' own configuration of that model type reads it."""
    rope = dict(config.rope_parameters)
    scaling = None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    described: dict[str, Any] = {
        "model_type": "deepseek_v2" if config.mla is not None else "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
    }
    if config.mla is None:
        described["head_dim"] = config.head_dim
    else:
        described |= {name: getattr(config.mla, name) for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(target.hf_config, name, None)
        if value is not None:
            described[name] = value
    return described


def _speculators(config: DraftConfig, target: Target, network: dict[str, Any], unroll_steps: int | None, target_name: str | None) -> dict[str, Any]:
    """Every flag is written: readers of this format disagree on what an absent one means. There must be no top-level ``model_type``.

    speculators opens the verifier when it loads a draft, and cannot do without one, so a local target is named by its whole path.
    """
    local = Path(target.config.path)
    name = target_name or (str(local.resolve()) if local.is_dir() else target.config.path)
    proposal = {"proposal_type": "greedy", "speculative_tokens": unroll_steps or 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": name, "architectures": list(getattr(target.full_hf_config, "architectures", None) or [])},
        },
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        **{flag: getattr(config, flag) for flag in FLAGS},
        "transformer_layer_config": network,
    }
