"""Every variant of the draft's architecture, by a short name: options on top of ``packs.draft_config``. Golden references, parity and the numerics
benchmark all go over this one table."""

from __future__ import annotations

from typing import Any

from torchspec.models.eagle3.config import LatentSizes

_LATENT = {"mla": LatentSizes(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8), "head_dim": 10, "num_kv_heads": 4}
_WIDE_VALUES = {"mla": LatentSizes(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=12), "head_dim": 8, "num_kv_heads": 4}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a key head for each query head": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "EAGLE-3.1 (fc_norm, norm_output)": {"fc_norm": True, "norm_output": True},
    "attention_bias": {"attention_bias": True},
    "Qwen3 (qk_norm)": {"qk_norm": True},
    "Qwen3, norm_before_residual": {"qk_norm": True, "norm_before_residual": True},
    "Qwen3, six heads on two, head_dim 10": {"qk_norm": True, "num_heads": 6, "head_dim": 10},
    "two layers": {"num_layers": 2},
    "two layers, EAGLE-3.1, bias, norm_before_residual": {
        "num_layers": 2, "attention_bias": True, "norm_before_residual": True, "fc_norm": True, "norm_output": True,
    },
    "three layers, Qwen3, EAGLE-3.1": {"num_layers": 3, "qk_norm": True, "fc_norm": True, "norm_output": True},
    "H < D, own embedding": {"hidden_size": 12, "head_dim": 6},
    "H > D, own embedding, fc_norm": {"hidden_size": 24, "head_dim": 6, "fc_norm": True},
    "eight heads on two, head_dim 10": {"num_heads": 8, "head_dim": 10},
    "heads wider than H": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 20},
    "one aux layer": {"aux_layers": (2,)},
    "five aux layers, norm_before_fc": {"aux_layers": (0, 1, 3, 4, 8), "norm_before_fc": True},
    "RoPE base 500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "RoPE linear": _rope("linear", factor=4.0),
    "RoPE dynamic": _rope("dynamic", factor=4.0),
    "RoPE llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "RoPE yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0),
    "RoPE yarn, its optional fields": _rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, attention_factor=1.3, truncate=False,
    ),
    "MLA": _LATENT,
    "MLA, values wider than keys": _WIDE_VALUES,
    "MLA, yarn": {**_LATENT, **_rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)},
    "MLA, norm_before_residual": {**_LATENT, "norm_before_residual": True},
    "MLA, two layers, EAGLE-3.1": {**_LATENT, "num_layers": 2, "fc_norm": True, "norm_output": True},
}  # fmt: skip
