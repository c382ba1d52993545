"""A random EAGLE-3 draft directory in vLLM's plain format, written by hand from the format's description, so that it does not depend on our exporter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def save_random_draft(folder: Path, target: Path, *, draft_vocab_size: int, seed: int = 0) -> Path:
    """One Llama block over three aux layers, the target's own embedding, and a vocabulary pruned to the first ``draft_vocab_size`` ids."""
    config = AutoConfig.from_pretrained(target)
    table = AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight.detach()
    dtype, hidden, inner, vocab = config.dtype or torch.float32, config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    tensors = {
        "embed_tokens.weight": table.to(dtype).contiguous(),
        "fc.weight": normal(hidden, 3 * hidden),
        "layers.0.self_attn.q_proj.weight": normal(heads * head_dim, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": normal(kv_heads * head_dim, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": normal(kv_heads * head_dim, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": normal(hidden, heads * head_dim),
        "layers.0.mlp.gate_proj.weight": normal(inner, hidden),
        "layers.0.mlp.up_proj.weight": normal(inner, hidden),
        "layers.0.mlp.down_proj.weight": normal(hidden, inner),
        **{f"layers.0.{name}.weight": torch.ones(hidden, dtype=dtype) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        "norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": normal(draft_vocab_size, hidden),
        "d2t": torch.zeros(draft_vocab_size, dtype=torch.int64),
        "t2d": torch.arange(vocab) < draft_vocab_size,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        **{
            name: getattr(config, name)
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
        },
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "draft_vocab_size": draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    return folder
