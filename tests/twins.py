"""Tiny random twins of big targets: configuration keys, tensor names and quantised layouts as published, 8 blocks of width 256.

``python -m tests.twins --table`` trains each for three steps and prints what became of it; ``--out FOLDER`` keeps the twins.

Weights come from Transformers' class of the family. What it writes is then turned into what is published: layers for
multi-token prediction whose names end like those of embedding, norm and head; names before Transformers' renamings; and
weights in FP8, INT4 or MXFP4 (``quantised.py``). Beside a quantised twin can stand its dequantised copy.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantised import FP8, INT4, Packed, fp8, int4, mxfp4
from tests.tiny import save_tokenizer

L, D = 8, 256
V = 448
SIZES = {"hidden_size": D, "num_hidden_layers": L, "max_position_embeddings": 4096, "initializer_range": 0.05, "vocab_size": V}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512}
LATENT |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 256}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
DELTA = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
MAMBA = ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe", "attention"]
IMAGE_IDS = {"image_token_id": 300, "video_token_id": 301}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Twin:
    """How one is made."""

    model_type: str
    config: dict[str, Any]
    names: tuple[str, str, str]
    """Stored names of embedding table, final norm and output head."""
    extra: Callable[[Tensors], Tensors] = lambda tensors: {}
    """Tensors that are published beside those of the class."""
    rename: Callable[[str], str] = lambda name: name
    """From what Transformers writes to what is published."""
    pack: Callable[[str, Tensor], Packed] | None = None
    packed: Callable[[str], bool] = lambda name: False
    """Which weights are quantised, by stored name."""
    quantization: dict[str, Any] | None = None
    text_quantization: dict[str, Any] | None = None
    written: dict[str, Any] | None = None
    """Keys of config.json that differ from what Transformers writes; None takes one out."""
    image: bool = False


PLAIN = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
INNER = ("model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight")


def next_token_layer(tensors: Tensors) -> Tensors:
    """DeepSeek's and GLM's block behind the last one, with a table, a norm and a head of its own."""
    at = f"model.layers.{L}."
    block = {name.replace(f"model.layers.{L - 1}.", at): value for name, value in tensors.items() if f"model.layers.{L - 1}." in name}
    table, norm, head = (tensors[name] for name in PLAIN)
    ends = {"embed_tokens.weight": table * 0.5, "shared_head.head.weight": head * 0.5, "shared_head.norm.weight": norm + 1}
    joint = {"enorm.weight": norm, "hnorm.weight": norm, "eh_proj.weight": torch.cat([table[:D], head[:D]], 1)}
    return block | {at + name: value for name, value in {**ends, **joint}.items()}


def qwen_mtp(prefix: str) -> Callable[[Tensors], Tensors]:
    """``mtp.*`` of Qwen3-Next and Qwen3.5."""

    def extra(tensors: Tensors) -> Tensors:
        own, norm = f"{prefix}layers.3.", tensors[f"{prefix}norm.weight"]
        block = {name.replace(own, "mtp.layers.0."): value for name, value in tensors.items() if name.startswith(own)}
        ends = {"mtp.norm.weight": norm + 1, "mtp.pre_fc_norm_embedding.weight": norm, "mtp.pre_fc_norm_hidden.weight": norm}
        return block | ends | {"mtp.fc.weight": torch.cat([tensors[f"{prefix}embed_tokens.weight"][:D]] * 2, 1)}

    return extra


def kimi_name(name: str) -> str:
    """Kimi keeps the text model whole under ``language_model.``, the tower beside it."""
    bare = name.removeprefix("model.")
    if bare.startswith(("vision_tower.", "mm_projector.")):
        return bare.replace("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed.")
    inner = bare.removeprefix("language_model.").removeprefix("model.").replace("blocks.", "layers.")
    return f"language_model.{inner}" if inner.startswith("lm_head.") else f"language_model.model.{inner}"


def _qwen35(*, moe: bool, tied: bool) -> Twin:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    text = {**SIZES, **HEADS, **DELTA, **(SPARSE if moe else {"intermediate_size": 512}), "layer_types": KINDS, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": D, "num_position_embeddings": 64}
    config = {"text_config": {**text, "tie_word_embeddings": tied}, "vision_config": vision, **IMAGE_IDS, "tie_word_embeddings": tied}
    names = (INNER[0], INNER[1], INNER[0] if tied else INNER[2])
    return Twin(kind, config, names, extra=qwen_mtp("model.language_model."), image=True)


def _deepseek(**more: Any) -> Twin:
    config = {**SIZES, **LATENT, **ROUTED, "intermediate_size": 512, "rope_parameters": {**YARN, "rope_theta": 10000.0}}
    return Twin("deepseek_v3", {**config, "tie_word_embeddings": False}, PLAIN, extra=next_token_layer, **more)


def _kimi(**more: Any) -> Twin:
    text = {**SIZES, **LATENT, **ROUTED, "intermediate_size": 512, "rope_parameters": YARN, "model_type": "deepseek_v3", "tie_word_embeddings": False}
    vision = {**VISION, "pos_emb_height": 8, "pos_emb_width": 8}
    names = ("language_model.model.embed_tokens.weight", "language_model.model.norm.weight", "language_model.lm_head.weight")
    config = {"text_config": text, "vision_config": vision, "projection_hidden_size": 64, "tie_word_embeddings": False}
    return Twin("kimi_k25", config, names, rename=kimi_name, written={"tie_word_embeddings": None}, image=True, **more)


def _minimax(**more: Any) -> Twin:
    config = {**SIZES, **HEADS, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 32, "rope_theta": 5e6}
    return Twin("minimax_m2", {**config, "tie_word_embeddings": False}, PLAIN, **more)


def _gpt_oss(**more: Any) -> Twin:
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 128}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    config = {**SIZES, **HEADS, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
    return Twin("gpt_oss", {**config, "rope_parameters": rope, "tie_word_embeddings": False}, PLAIN, **more)


def _experts(name: str) -> bool:
    return ".experts." in name and name.endswith(".weight")


_FP8_OF_DEEPSEEK = {"pack": fp8, "packed": lambda n: n.endswith("_proj.weight") and "eh_proj" not in n, "quantization": FP8}
_FP8_OF_MINIMAX = {
    "pack": fp8,
    "packed": lambda n: n.endswith((".w1.weight", ".w2.weight", ".w3.weight", "_proj.weight")),
    "quantization": {**FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
}
_MXFP4 = {
    "pack": mxfp4,
    "packed": lambda n: n.endswith(("experts.gate_up_proj", "experts.down_proj")),
    "quantization": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    },
}
_QWEN_NEXT = {
    **SIZES, **HEADS, **DELTA, **SPARSE, "intermediate_size": 512, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25},
}  # fmt: skip
_GLM = {
    **SIZES, **ROUTED, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "use_qk_norm": True,
    "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}, "tie_word_embeddings": False,
}  # fmt: skip
_GLM5 = {
    **SIZES, **LATENT, **ROUTED, "intermediate_size": 512, "index_topk": 64, "index_head_dim": 64, "index_n_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA4 = {
    "text_config": {
        **SIZES, **HEADS, "intermediate_size": 256, "intermediate_size_mlp": 512, "num_local_experts": 4, "attention_chunk_size": 128,
    },
    "vision_config": {
        **{**VISION, "intermediate_size": 256}, "vision_output_dim": 128, "projector_input_dim": 128, "projector_output_dim": 128, "image_size": 28,
    },
    "boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302,
}  # fmt: skip
_NEMOTRON = {
    **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"}, **HEADS, "layers_block_type": MAMBA, "intermediate_size": 512,
    "ssm_state_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2, "chunk_size": 32, "n_routed_experts": 4,
    "moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256, "use_mamba_kernels": False,
}  # fmt: skip
_GEMMA4 = {
    "text_config": {
        **SIZES, **HEADS, "global_head_dim": 64, "intermediate_size": 512, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 32,
        "sliding_window": 64, "final_logit_softcapping": 30.0, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    },
    "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 32},
    "audio_config": None, "boi_token_id": 300, "eoi_token_id": 301, "image_token_id": 302, "video_token_id": 303, "boa_token_id": 304,
    "eoa_token_index": 305, "audio_token_id": 306,
}  # fmt: skip
TWINS: dict[str, Twin] = {
    "qwen3": Twin("qwen3", {**SIZES, **HEADS, "intermediate_size": 512, "tie_word_embeddings": False}, PLAIN),
    "kimi_k25": _kimi(pack=int4, packed=_experts, text_quantization=INT4),
    "kimi_k25_bf16": _kimi(),
    "minimax_m2": _minimax(),
    "minimax_m2_fp8": _minimax(**_FP8_OF_MINIMAX),
    "qwen3_next": Twin("qwen3_next", _QWEN_NEXT, PLAIN, extra=qwen_mtp("model.")),
    "qwen3_5": _qwen35(moe=False, tied=False),
    "qwen3_5_tied": _qwen35(moe=False, tied=True),
    "qwen3_5_moe": _qwen35(moe=True, tied=False),
    "deepseek_v3": _deepseek(),
    "deepseek_v3_fp8": _deepseek(**_FP8_OF_DEEPSEEK),
    "glm4_moe": Twin("glm4_moe", _GLM, PLAIN, extra=next_token_layer),
    "glm_moe_dsa": Twin("glm_moe_dsa", _GLM5, PLAIN, extra=next_token_layer),
    "gpt_oss": _gpt_oss(**_MXFP4),
    "gpt_oss_bf16": _gpt_oss(),
    "llama4": Twin(
        "llama4", _LLAMA4, ("language_model.model.embed_tokens.weight", "language_model.model.norm.weight", "language_model.lm_head.weight"), image=True
    ),
    "nemotron_h": Twin("nemotron_h", _NEMOTRON, ("backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight")),
    "gemma4": Twin("gemma4", _GEMMA4, (INNER[0], INNER[1], INNER[0]), image=True),
}
QUANTISED = [name for name, twin in TWINS.items() if twin.pack is not None]


def make(name: str, folder: Path, *, dequantised: Path | None = None) -> Path:
    """Write a twin, with tokenizer; returns its folder.

    Args:
        name: of :data:`TWINS`.
        folder: to make.
        dequantised: where its dequantised copy goes, in fp32 where the weights were quantised.
    """
    twin = TWINS[name]
    folder.mkdir(parents=True, exist_ok=True)
    assert save_tokenizer(folder) <= V
    described = _save_class(twin, folder)
    tensors = {twin.rename(key): value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    tensors |= twin.extra(tensors)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    described = {key: value for key, value in {**described, **(twin.written or {})}.items() if key not in (twin.written or {}) or value is not None}
    packs = {key: twin.pack(key, value) for key, value in tensors.items() if twin.pack is not None and twin.packed(key)}
    if dequantised is not None:
        dequantised.mkdir(parents=True, exist_ok=True)
        save_tokenizer(dequantised)
        _write(dequantised, {key: packs[key].meant if key in packs else value for key, value in tensors.items()}, described)
    stored = {key: value for key, value in tensors.items() if key not in packs} | {k: v for pack in packs.values() for k, v in pack.stored.items()}
    if twin.quantization is not None:
        described["quantization_config"] = twin.quantization
    if twin.text_quantization is not None:
        described["text_config"]["quantization_config"] = twin.text_quantization
    _write(folder, stored, described)
    return folder


def _save_class(twin: Twin, folder: Path) -> dict[str, Any]:
    """Seeded weights in bf16 with uneven norms; returns config.json."""
    import transformers as t

    torch.manual_seed(0)
    config = t.AutoConfig.for_model(twin.model_type, **json.loads(json.dumps(twin.config)))
    model = (t.AutoModelForImageTextToText if twin.image else t.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in key and key.endswith("weight"):
                parameter += torch.linspace(-0.2, 0.2, parameter.numel())
    model.to(torch.bfloat16).save_pretrained(folder)
    described: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return described


def _write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """Two shards with an index, and config.json."""
    shards = {key: f"model-{number % 2 + 1:05d}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file(
            {key: tensors[key].clone(memory_format=torch.contiguous_format) for key in shards if shards[key] == shard},
            folder / shard,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def stored(folder: Path) -> dict[str, str]:
    """Name of a tensor → its shard."""
    shards: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return shards


def drop(folder: Path, name: str) -> None:
    """Take one tensor out of a twin."""
    index = folder / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    shard = folder / described["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(described))


# -- the table


def train(name: str, folder: Path, *, engine: str) -> str:
    """What three steps of ``main.py fit`` and an export of a twin end with."""
    from tests.e2e.runs import config, run
    from tests.tiny import save_conversations

    run_folder = folder / f"run-{name}-{engine}"
    run_folder.mkdir(parents=True, exist_ok=True)
    rows = save_conversations(folder / "train.jsonl", 48)
    changes: dict[str, Any] = {"trainer__max_steps": 3, "trainer__max_epochs": None, "data__engine": engine}
    changes |= {"model__aux_layers": [2, 4, 5], "data__target": {"path": str(folder / name), "dtype": "bfloat16"}}
    if engine == "vllm":
        changes["data__engines"] = {"threads": 1}
    file = config(run_folder, folder / name, rows, None, **changes)
    code, output = run("fit", "--config", str(file), timeout=570)
    exported = next(iter(run_folder.rglob("model.safetensors")), None)
    if code == 0 and exported is not None:
        return "passes"
    lines = [line for line in output.splitlines() if line.startswith("error:")] or output.strip().splitlines()[-1:]
    return f"exit {code}: {lines[-1][:300] if lines else 'no word'}"


def right(name: str, folder: Path) -> str:
    """Whether head, norm and embedding are those of the files."""
    from torchspec.models.target_head import TargetHead, read_embedding
    from torchspec.target import Target, TargetConfig

    try:
        target = Target(TargetConfig(str(folder / name)))
        head, table = TargetHead.of(target), read_embedding(target)
    except Exception as error:  # the others are wanted all the same
        return f"{type(error).__name__}: {error}"[:200]
    found = dict(zip(TWINS[name].names, (table, head.norm_weight, head.weight), strict=True))
    for key, value in found.items():
        if not torch.equal(load_file(folder / name / stored(folder / name)[key])[key], value):  # type: ignore[arg-type]
            return f"{key} differs"
    return (
        f"right, {str(head.weight.dtype).removeprefix('torch.')}{', cap ' + str(head.soft_cap) if head.soft_cap else ''}{', tied' if len(found) == 2 else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make twins, or train each for three steps and print a table.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TWINS)}; all by default")
    parser.add_argument("--table", action="store_true", help="train them")
    parser.add_argument("--engines", nargs="*", default=["transformers"], help="transformers, vllm")
    parser.add_argument("--out", type=Path, help="where to keep them; a temporary folder by default")
    args = parser.parse_args()
    unknown = set(args.names) - set(TWINS)
    if unknown:
        sys.exit(f"unknown twins: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        if args.table:
            print(f"| twin | head, norm, embedding | {' | '.join(args.engines)} |\n|---|---|{'---|' * len(args.engines)}", flush=True)
        for name in args.names or TWINS:
            make(name, out / name)
            cells = [right(name, out), *(train(name, out, engine=engine) for engine in args.engines)] if args.table else ["made"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
