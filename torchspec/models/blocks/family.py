"""The three block drafts as families: DFlash, DSpark and DFlash 2. See :mod:`torchspec.models.family`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchspec.blocks import Blocks
from torchspec.errors import UserError
from torchspec.models.blocks.config import BlockConfig, Kind
from torchspec.models.blocks.formats import MASK_FILE, describe, read_mask, refuse_unserved, write_mask, written
from torchspec.models.blocks.importing import kind_of, read_draft, spread_layers
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.blocks.options import BlockOptions
from torchspec.models.blocks.probe import probe
from torchspec.models.blocks.task import BlockTask
from torchspec.models.draft_defaults import notes
from torchspec.models.family import Build, Draft, Format
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.target import Target

_LAYERS = 5
"""Auxiliary layers of published drafts."""


@dataclass(frozen=True)
class BlockFamily:
    """One of the three."""

    name: Kind
    title: str
    paper: str
    tag: str
    method: str
    """vLLM's name of the method."""
    algorithm: str
    """SGLang's."""
    vocabulary_rows: tuple[str, ...] = ()
    options: type[Any] = BlockOptions
    fixed_options: tuple[str, ...] = ("anchors",)
    beside: tuple[str, ...] = (MASK_FILE,)

    # -- architecture

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        """Five, spread over the target's depth as published drafts have them."""
        if target.num_layers < _LAYERS + 3:
            problem = f"has no default for a target of {target.num_layers} layers"
            raise UserError("model.aux_layers", None, problem, "list the indices, for example [1, 2]")
        return spread_layers(target, _LAYERS)

    def config(self, target: Target, *, aux_layers: tuple[int, ...], given: Mapping[str, Any], where: str) -> BlockConfig:
        scale = TargetHead.of(target).scale
        return BlockConfig.from_fields(given, target=target, kind=self.name, aux_layers=aux_layers, where=where, logit_scale=scale)

    def config_from_dict(self, plain: Mapping[str, Any]) -> BlockConfig:
        return BlockConfig.from_dict(dict(plain))

    def notes(self, config: BlockConfig, target: Target) -> list[str]:
        said = notes(target, rope_parameters=config.rope_parameters, intermediate_size=config.intermediate_size)
        if config.learned_mask:
            said.append(f"the target's table has no unused row: the draft learns the mask's, which stands for token {config.mask_token_id}")
        return said

    def shapes(self, config: BlockConfig) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in BlockDraft(config).named_parameters()}

    # -- training

    def supervision(self, config: BlockConfig, options: BlockOptions, *, stage: Literal["train", "validate"], horizon: int = 0) -> Blocks:
        """Drawn anchors in training, every candidate in validation; a block has as many draft tokens as it has."""
        return Blocks(config.block_size, config.shift, options.anchors if stage == "train" else None)

    def task(self, config: BlockConfig, options: BlockOptions, build: Build) -> nn.Module:
        return BlockTask.build(config, options, build)

    # -- files

    def refuse(self, config: BlockConfig, target: Target, *, form: Format) -> None:
        refuse_unserved(config, target, form=form)

    def describe(
        self, config: BlockConfig, target: Target, *, form: Format, dtype: torch.dtype, options: BlockOptions | None, target_name: str | None
    ) -> dict[str, Any]:
        training = None if options is None else asdict(options)
        return describe(config, target, form=form, dtype=dtype, training=training, target_name=target_name)

    def tensors(self, draft: Draft, target: Target, *, form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
        return written(draft, target, dtype=dtype)

    def write_beside(self, folder: Path, draft: Draft, *, form: Format) -> None:
        write_mask(folder, draft)

    def recognises(self, described: Mapping[str, Any]) -> bool:
        return kind_of(described) == self.name

    def read(self, described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, folder: Path) -> Draft:
        return read_draft(described, {**tensors, **read_mask(folder)}, target, where=str(folder))

    def probe(self, draft: Draft, target: Target, *, dtype: torch.dtype) -> Tensor:
        return probe(draft, embedding=read_embedding(target).to(dtype), head=TargetHead.of(target).weight.to(dtype))

    # -- servers

    def horizon(self, config: BlockConfig, options: BlockOptions | None) -> int:
        return config.horizon

    def speculative(self, folder: str, k: int) -> dict[str, Any]:
        return {"method": self.method, "model": folder, "num_speculative_tokens": k}

    def sglang_flags(self, folder: str, k: int) -> list[str]:
        """SGLang counts the anchor among the draft tokens."""
        return ["--speculative-algorithm", self.algorithm, "--speculative-draft-model-path", folder, "--speculative-num-draft-tokens", str(k + 1)]

    def card(self, config: BlockConfig) -> list[tuple[str, str]]:
        sees = "the slots before it" if config.causal else "all of its block"
        window = "" if config.sliding_window is None else f", {config.sliding_window} positions back"
        rows = [
            ("layers, hidden size, attention", f"{config.num_layers}, {config.hidden_size}, grouped-query with q/k norms (Qwen3)"),
            ("block", f"{config.block_size} slots, {config.horizon} draft tokens; a slot sees {sees}{window}"),
            ("mask token", f"{config.mask_token_id}{' (a row of its own)' if config.learned_mask else ''}"),
        ]
        if config.kind == "dspark":
            rows.append(("Markov head", f"rank {config.markov_rank}, {'with' if config.confidence else 'without'} a confidence head"))
        if config.kind == "dflash2":
            rows.append(("convolutions", f"{config.conv_taps} taps, groups of {config.conv_group}"))
            rows.append(("selector", f"rank {config.selector_rank}, {config.selector_candidates} candidates"))
        return rows

    def card_of_training(self, options: BlockOptions) -> list[tuple[str, str]]:
        weights = {"dpace": f"D-PACE, alpha {options.alpha:g}", "decay": f"exp(-j / {options.gamma:g})", "uniform": "1"}[options.weights]
        anchors = f"{options.anchors:.0%} of a conversation's" if isinstance(options.anchors, float) else f"{options.anchors} a conversation"
        rows = [("anchors of an epoch", anchors), ("weights of the slots", weights), ("label of cross-entropy", options.label)]
        if self.name == "dspark":
            rows.append(("confidence", f"weight {options.confidence:g}, learns the {options.confidence_target}"))
        if self.name == "dflash2":
            rows.append(("selector", f"weight {options.selector:g}"))
        return rows


DFLASH = BlockFamily("dflash", "DFlash", "arXiv 2602.06036", "dflash", "dflash", "DFLASH")
DSPARK = BlockFamily("dspark", "DSpark", "arXiv 2607.05147", "dspark", "dspark", "DSPARK", ("markov_head.markov_w2.weight",))
DFLASH2 = BlockFamily("dflash2", "DFlash 2", "arXiv 2602.06036, with convolutions and a selector", "dflash2", "dflash", "DFLASH")
