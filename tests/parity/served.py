"""The drafts that are served in vLLM to be compared: random ones of a tiny target (head_dim 64, the smallest that vLLM's CPU build takes).

Names are those of ``tests/models/variants.py`` where the variant is the same but for its sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models.exports import TRAINED, Exported, export_weights, random_draft
from tests.parity.vllm import Agreement, compare, random_prompts, serve
from tests.tiny import save_target, save_tokenizer
from torchspec.models.eagle3.config import DraftConfig, default_layers
from torchspec.models.eagle3.task import start_from_target
from torchspec.models.export.export import ExportOptions
from torchspec.models.target_head import TargetHead
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig

LAYERS = 8
PROMPTS, TOKENS = 50, 9


@dataclass(frozen=True)
class Case:
    """A draft to serve."""

    changes: dict[str, Any]
    pruned: int | None = None
    form: Any = "vllm"
    aux_layers: tuple[int, ...] | None = None
    from_target: bool = False
    """Starts where training does, so that some of its tokens are accepted."""
    latent: bool = False
    """Of a target with latent attention (DeepSeek-V3): vLLM's CPU build has no cache that a draft of another kind than the target's could share."""


def _rope(kind: str, base: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **more}}


CASES: dict[str, Case] = {
    "plain": Case({}, aux_layers=(2, 4, LAYERS), from_target=True),
    "pruned": Case({}, pruned=100),
    "norm_before_residual": Case({"norm_before_residual": True}, pruned=100, form="speculators"),
    "two layers": Case({"num_layers": 2}, form="sglang", aux_layers=(1, 4, 7)),
    "Qwen3 (qk_norm)": Case({"qk_norm": True}),
    "three layers, Qwen3, EAGLE-3.1": Case({"qk_norm": True, "num_layers": 3, "fc_norm": True, "norm_output": True}, pruned=200, form="speculators"),
    "norm_output": Case({"norm_output": True}),
    "five aux layers, norm_before_fc": Case({"norm_before_fc": True}, aux_layers=(0, 2, 3, 5, LAYERS)),
    "one aux layer": Case({"attention_bias": True, **_rope("default", 500000.0)}, aux_layers=(6,)),
    "RoPE llama3": Case(
        {"num_heads": 4, "num_kv_heads": 2} | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    ),
    "RoPE yarn": Case(_rope("yarn", factor=4.0, original_max_position_embeddings=256)),
    "H < D, own embedding": Case({"hidden_size": 64, "intermediate_size": 96}, pruned=100),
    "MLA": Case({}, latent=True),
    "MLA, two layers, EAGLE-3.1": Case({"num_layers": 2, "fc_norm": True, "norm_output": True}, pruned=100, latent=True),
}


def make(case: Case, target: Target, folder: Path) -> Exported:
    """Random weights of a fair size: logits must differ by more than rounding."""
    config = DraftConfig.from_target(target, aux_layers=target.aux_layers(list(case.aux_layers)) if case.aux_layers else default_layers(target), **case.changes)
    vocabulary = None
    if case.pruned is not None:
        kept = torch.randperm(target.vocab_size, generator=torch.Generator().manual_seed(1))[: case.pruned].sort().values
        vocabulary, config = VocabularyMapping(kept, target.vocab_size), config.with_draft_vocabulary(case.pruned)
    draft = random_draft(DraftConfig.from_dict(config.to_dict() | {"initializer_range": 0.02 if case.from_target else 0.1}), target)
    if case.from_target:
        start_from_target(draft, TargetHead.of(target), None if vocabulary is None else vocabulary.draft_ids)
    made = Exported(draft, vocabulary, folder)
    export_weights(draft.config, made.weights, vocabulary, target, folder, options=ExportOptions(form=case.form), training=TRAINED)
    return made


def save_latent_target(folder: Path) -> Path:
    """A random DeepSeek-V3 without experts; vLLM's CPU kernel takes a latent of 512 and 64 rotary dimensions, nothing else."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    folder.mkdir(parents=True)
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=512,
        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, first_k_dense_replace=LAYERS, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, vocab_size=384, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_theta=10000.0, initializer_range=0.07,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


def run(folder: Path, names: list[str] | None = None) -> dict[str, Agreement]:
    """Serve the cases, in one vLLM process for each of the two targets, and compare each.

    Args:
        folder: for targets, drafts and logs.
        names: of :data:`CASES`; None for all.
    """
    found: dict[str, Agreement] = {}
    prompts = random_prompts(PROMPTS, 380)
    for latent in (False, True):
        cases = {name: CASES[name] for name in names or CASES if CASES[name].latent == latent}
        if not cases:
            continue
        place = folder / ("latent" if latent else "dense")
        path = save_latent_target(place / "target") if latent else save_target(place / "target", layers=LAYERS, spread=0.07)
        target = Target(TargetConfig(str(path), dtype="float32"))
        drafts = {name: make(case, target, place / f"draft-{number}") for number, (name, case) in enumerate(cases.items())}
        # the CPU build's own RoPE is wrong for latent attention
        arguments: dict[str, Any] = {"compilation_config": {"custom_ops": ["none"]}} if latent else {}
        served = serve(place, path, [made.folder for made in drafts.values()], prompts, tokens=TOKENS, **arguments)
        with _one_thread():
            found |= {name: compare(made, path, prompts, result) for (name, made), result in zip(drafts.items(), served, strict=True)}
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads that wait for each other on a busy machine take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
