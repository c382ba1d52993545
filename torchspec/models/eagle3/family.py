"""EAGLE-3 as a draft family (``models/family.py`` says what each part is for)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.draft_defaults import notes
from torchspec.models.eagle3.config import DraftConfig, default_layers
from torchspec.models.eagle3.formats import describe, refuse_unserved, written
from torchspec.models.eagle3.importing import read_draft, recognises
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.eagle3.options import UnrollOptions
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.family import Build, Draft, Format
from torchspec.models.target_head import read_embedding
from torchspec.supervision import Unroll
from torchspec.target import Target

_USUAL = 3
"""Draft tokens of a proposal, where it is not known how the draft was trained."""
_PROBED = 6
"""Rows that two drafts are compared at."""


class Eagle3:
    """See the module."""

    name = "eagle3"
    title = "EAGLE-3"
    paper = "arXiv 2503.01840"
    tag = "eagle3"
    options = UnrollOptions
    fixed_options: tuple[str, ...] = ("unroll_steps",)
    vocabulary_rows: tuple[str, ...] = ("lm_head.weight",)
    beside: tuple[str, ...] = ()

    # -- architecture

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        return default_layers(target)

    def config(self, target: Target, *, aux_layers: tuple[int, ...], given: Mapping[str, Any], where: str) -> DraftConfig:
        return DraftConfig.from_fields(given, target=target, aux_layers=aux_layers, where=where)

    def config_from_dict(self, plain: Mapping[str, Any]) -> DraftConfig:
        return DraftConfig.from_dict(dict(plain))

    def notes(self, config: DraftConfig, target: Target) -> list[str]:
        return notes(target, rope_parameters=config.rope_parameters, intermediate_size=config.intermediate_size)

    def shapes(self, config: DraftConfig) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in Eagle3Draft(config).named_parameters()}

    # -- training

    def supervision(self, config: DraftConfig, options: UnrollOptions, *, stage: Literal["train", "validate"], horizon: int = 0) -> Unroll:
        return Unroll(max(options.unroll_steps, horizon) if stage == "validate" else options.unroll_steps)

    def task(self, config: DraftConfig, options: UnrollOptions, build: Build) -> nn.Module:
        return DraftTask.build(config, build, step_weights=options.weights)

    # -- files

    def refuse(self, config: DraftConfig, target: Target, *, form: Format) -> None:
        refuse_unserved(config, target, form=form)

    def describe(
        self, config: DraftConfig, target: Target, *, form: Format, dtype: torch.dtype, options: UnrollOptions | None, target_name: str | None
    ) -> dict[str, Any]:
        steps = None if options is None else options.unroll_steps
        return describe(config, target, form=form, dtype=dtype, unroll_steps=steps, target_name=target_name)

    def tensors(self, draft: Draft, target: Target, *, form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
        return written(draft, target, form=form, dtype=dtype)

    def write_beside(self, folder: Path, draft: Draft, *, form: Format) -> None:
        """Nothing."""

    def recognises(self, described: Mapping[str, Any]) -> bool:
        return recognises(described)

    def read(self, described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, folder: Path) -> Draft:
        return read_draft(described, tensors, target, where=str(folder))

    def probe(self, draft: Draft, target: Target, *, dtype: torch.dtype) -> Tensor:
        """Of two steps."""
        config: DraftConfig = draft.config
        network = Eagle3Draft(config)
        if not config.owns_embedding:
            table = read_embedding(target).to(dtype) if draft.embedding is None else draft.embedding
            network.set_embedding(table.float())
        network.load_state_dict({name: draft.weights[name].float() for name, _ in network.named_parameters()}, strict=True)
        generator = torch.Generator().manual_seed(0)
        n, steps = _PROBED, 2
        one_turn, bounds = np.zeros(n, dtype=np.int64), np.array([0, n])
        batch = PackedBatch(
            input_ids=torch.randint(0, config.vocab_size, (n,), generator=generator),
            position=torch.arange(n),
            sequence=torch.zeros(n, dtype=torch.int64),
            turn=torch.from_numpy(one_turn),
            aux=torch.randn(n, len(config.aux_layers) * config.target_hidden_size, generator=generator),
            last=torch.zeros(n, config.target_hidden_size),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            sample_ids=(0,),
            counts=torch.ones(steps),
            rows=Unroll(steps).rows(one_turn, bounds),
        )
        with torch.no_grad():
            return network.lm_head(network.norm(torch.cat(network(batch))))

    # -- servers

    def horizon(self, config: DraftConfig, options: UnrollOptions | None) -> int:
        return _USUAL if options is None else options.unroll_steps

    def speculative(self, folder: str, k: int) -> dict[str, Any]:
        return {"method": "eagle3", "model": folder, "num_speculative_tokens": k}

    def sglang_flags(self, folder: str, k: int) -> list[str]:
        words = f"--speculative-algorithm EAGLE3 --speculative-num-steps {k} --speculative-eagle-topk 1 --speculative-num-draft-tokens {k + 1}"
        return ["--speculative-draft-model-path", folder, *words.split()]

    # -- the card

    def card(self, config: DraftConfig) -> list[tuple[str, str]]:
        kind = "latent (DeepSeek)" if config.mla is not None else "grouped-query with q/k norms (Qwen3)" if config.qk_norm else "grouped-query (Llama)"
        options = [flag for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias") if getattr(config, flag)]
        return [
            ("layers, hidden size, attention", f"{config.num_layers}, {config.hidden_size}, {kind}"),
            ("options", ", ".join(options) or "none"),
        ]

    def card_of_training(self, options: UnrollOptions) -> list[tuple[str, str]]:
        return [("unroll steps", str(options.unroll_steps)), ("step weights", ", ".join(f"{weight:.4g}" for weight in options.weights))]


EAGLE3 = Eagle3()
