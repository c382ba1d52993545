"""Our rotary embedding and norm beside Transformers' own modules, fp32."""

from __future__ import annotations

import torch

from tests.models.packs import draft_config
from tests.models.variants import VARIANTS
from torchspec.models.ops.norm import RMSNorm
from torchspec.models.ops.rope import frequencies, rotate, rotate_pairs, tables


def rotary(variant: str) -> float:
    """Largest difference, over all positions that the draft has, of turned random queries in a variant's own head size and kind of RoPE."""
    from transformers import DeepseekV3Config, LlamaConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, apply_rotary_pos_emb_interleave
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = draft_config(**VARIANTS[variant])
    length = config.max_position_embeddings
    x = torch.randn(1, config.num_heads, length, config.rotary_dim, generator=torch.Generator().manual_seed(0))
    shared = {"max_position_embeddings": length, "rope_parameters": dict(config.rope_parameters)}
    if config.mla is None:
        module = LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=config.head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=config.head_dim, **shared)
        )
        apply, ours = apply_rotary_pos_emb, rotate
    else:
        sizes = {name: getattr(config.mla, name) for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
        module = DeepseekV3RotaryEmbedding(DeepseekV3Config(hidden_size=config.hidden_size, num_attention_heads=config.num_heads, **sizes, **shared))
        apply, ours = apply_rotary_pos_emb_interleave, rotate_pairs
    cos, sin = module(x, torch.arange(length)[None])
    theirs, _ = apply(x, x, cos, sin)
    inverse, factor = frequencies(config.rope_parameters, size=config.rotary_dim, max_positions=config.max_position_embeddings)
    mine = ours(x[0].transpose(0, 1), *tables(inverse, factor, torch.arange(length), torch.float32))
    return float((mine.transpose(0, 1) - theirs[0]).abs().max())


def norm(dtype: torch.dtype) -> float:
    """Largest difference of RMSNorm on random rows."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(48, 1e-5).to(dtype), LlamaRMSNorm(48, 1e-5).to(dtype)
    weight = 1 + torch.randn(48, generator=generator)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
        x = (3 * torch.randn(20, 48, generator=generator)).to(dtype)
        return float((ours(x).float() - theirs(x).float()).abs().max())
