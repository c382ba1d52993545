"""Tiny models of every causal and image-text class of the installed Transformers, made from the defaults of their
configurations by shrinking numbers.

What a name means is the same in nearly all of them (``hidden_size``, ``n_embd``, ``d_model``, ...), so one table of
sizes makes most; ``MORE`` says what single families need besides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

L, D, HEADS, KV, HEAD, FF, E, V = 4, 64, 4, 2, 16, 96, 4, 160
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "width", "emb_dim", "word_embed_proj_dim"), D),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "vision_output_dim", "projector_hidden_size", "text_hidden_size", "mm_hidden_size"), D),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "num_blocks"), L),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_num_heads"), KV),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "attention_head_dim", "rotary_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "swa_head_dim"), HEAD
    ),
    **dict.fromkeys(("kv_channels", "attention_hidden_size", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rope_head_dim"), HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "lora_rank", "dt_rank", "time_step_rank", "mamba_dt_rank"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "mlp_dim", "d_ff"), FF),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), FF),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "moe_ffn_hidden_size", "block_ff_dim", "shared_intermediate_size"), FF),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "num_selected_experts", "experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), V),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_sequence_length"), 256),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), HEAD),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "index_topk", "chunk_size", "mamba_chunk_size"), 32),
    **dict.fromkeys(("first_k_dense_replace", "index_n_heads"), 1),
    "hidden_size_per_layer_input": 16,
    "initializer_range": 0.1,
}


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT = {"hidden_size": D, "num_hidden_layers": L, "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": FF, "vocab_size": V}
MORE: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 9}},
    "cosmos3_edge": {"mrope_section": [2, 3, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 8, "<|extra_200|>": 9, "<|visual token 000000|>": 10}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "glm4v_moe": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm5_next": {"num_key_value_heads": HEADS, "qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "granite4_vision": {"text_config": {"model_type": "granite", "logits_scaling": 8.0, **TEXT}},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hunyuan_vl": {"head_dim": HEAD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": KV, "head_dim": HEAD},
    "mistral4": {"head_dim": 2 * HEAD},
    "step3p7": {"sliding_window": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""Beside the table of sizes."""
for _name in ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"):
    MORE[_name] = {"rope_parameters": MROPE}
for _name in ("cohere_compass", "cohere_compass_text", "gemma3n", "gemma3n_text"):
    MORE[_name] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
for _name in ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "diffusion_gemma"):
    MORE[_name] = {"per_layer_config": {}}


def shrink(value: Any, changes: dict[str, Any]) -> Any:
    """A configuration's plain values with the sizes of the table."""
    if isinstance(value, list):
        return [shrink(item, changes) for item in value]
    if not isinstance(value, dict):
        return value
    layers = value.get("num_hidden_layers") or value.get("num_layers")
    small: dict[str, Any] = {}
    for name, item in value.items():
        if not isinstance(name, str) or name in {"id2label", "label2id", "architectures", "transformers_version", "model_type"}:
            small[name] = item
        elif name in changes:
            small[name] = copy.deepcopy(changes[name])
        elif isinstance(item, list) and name not in changes and layers and len(item) in (layers, layers + 1) and len(item) > L:
            small[name] = [SIZES[name]] * L if name in SIZES else _of_every_kind(item)
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and name in SIZES:
            small[name] = SIZES[name]
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            small[name] = item if item is None or isinstance(item, list) else min(item, V - 2)
        elif name == "mrope_section" and item:
            small[name] = [2, 3, 3]
        else:
            small[name] = shrink(item, changes)
    if value.get("kv_lora_rank") and "num_key_value_heads" in small:  # every head of latent attention has a key of its own
        small["num_key_value_heads"] = HEADS
    return small


def _of_every_kind(items: list[Any]) -> list[Any]:
    """The first L entries of a list that has one a layer, the last of them of the kinds that would be missing."""
    short, kinds = items[:L], list(dict.fromkeys(str(item) for item in items))
    missing = [kind for kind in kinds if kind not in {str(item) for item in short}]
    for place, kind in enumerate(missing[: L - 1], start=1):
        short[-place] = next(item for item in items if str(item) == kind)
    return short


@dataclass(frozen=True)
class Family:
    """A configuration class and what its checkpoints are saved from."""

    config: type[PreTrainedConfig]
    auto: str
    """Name of the auto class that makes the model whose checkpoint is published: of images and text where there is
    one."""

    @property
    def name(self) -> str:
        return str(self.config.model_type)

    def build(self, *, tied: bool) -> Any:
        """A tiny model in fp32 with seeded weights, norms and biases uneven."""
        plain = shrink(self.config().to_dict(), MORE.get(self.name, {}))
        config = self.config.from_dict(plain)
        for part in parts_of(config):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = getattr(transformers, self.auto).from_config(config).float().eval()
        with torch.no_grad():
            for parameter in {id(p): p for p in model.parameters()}.values():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def parts_of(config: Any) -> list[Any]:
    """A configuration and its text part."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def families() -> list[Family]:
    """Every configuration class of Transformers' two mappings, by name."""
    image, causal = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = {config: "AutoModelForCausalLM" for config in causal} | {config: "AutoModelForImageTextToText" for config in image}
    return sorted((Family(config, auto) for config, auto in found.items()), key=lambda family: family.name)
