"""The family: what the package asks of it, a line each (``torchspec/models/family.py``). ``model.family: tests.made_up.linear.family:LINEAR``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.made_up.linear import formats
from tests.made_up.linear.config import LinearConfig, LinearOptions
from tests.made_up.linear.task import LinearTask
from torchspec.models.family import Build, Draft, Family, Format
from torchspec.supervision import Supervision, Unroll
from torchspec.target import Target


class Linear:
    """Holds nothing of a run."""

    name = "tests.made_up.linear.family:LINEAR"
    title = "Linear"
    paper = "nowhere"
    tag = "linear"
    options = LinearOptions
    fixed_options: tuple[str, ...] = ()
    vocabulary_rows = ("head.weight",)
    beside: tuple[str, ...] = ()

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        """The stream in the middle of the target."""
        return (target.num_layers // 2,)

    def config(self, target: Target, *, aux_layers: tuple[int, ...], given: Mapping[str, Any], where: str) -> LinearConfig:
        """The architecture for a target."""
        return LinearConfig.of(target, aux_layers=aux_layers, given=given, where=where)

    def config_from_dict(self, plain: Mapping[str, Any]) -> LinearConfig:
        """Back from a checkpoint."""
        return LinearConfig.from_dict(plain)

    def notes(self, config: LinearConfig, target: Target) -> list[str]:
        """Nothing that is not the target's own."""
        return []

    def shapes(self, config: LinearConfig) -> dict[str, torch.Size]:
        """Of every tensor."""
        return formats.shapes(config)

    def supervision(self, config: LinearConfig, options: LinearOptions, *, stage: Literal["train", "validate"], horizon: int = 0) -> Supervision:
        """One draft token, whatever is measured: a draft that proposes one cannot be measured at two."""
        return Unroll(1)

    def task(self, config: LinearConfig, options: LinearOptions, build: Build) -> LinearTask:
        """What is trained."""
        return LinearTask.build(config, options, build)

    def refuse(self, config: LinearConfig, target: Target, *, form: Format) -> None:
        """Formats that cannot say it."""
        formats.refuse(form)

    def describe(
        self, config: LinearConfig, target: Target, *, form: Format, dtype: torch.dtype, options: LinearOptions | None, target_name: str | None
    ) -> dict[str, Any]:
        """``config.json``."""
        formats.refuse(form)
        return formats.describe(config, target, dtype=dtype, target_name=target_name)

    def tensors(self, draft: Draft, target: Target, *, form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is written."""
        return formats.tensors(draft)

    def write_beside(self, folder: Path, draft: Draft, *, form: Format) -> None:
        """Nothing."""

    def recognises(self, described: Mapping[str, Any]) -> bool:
        """By the architecture's name."""
        return described.get("architectures") == [formats.ARCHITECTURE]

    def read(self, described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, folder: Path) -> Draft:
        """A published draft."""
        return formats.read(described, tensors, target, folder=folder)

    def probe(self, draft: Draft, target: Target, *, dtype: torch.dtype) -> Tensor:
        """For the export's self-check."""
        return formats.probe(draft)

    def horizon(self, config: LinearConfig, options: LinearOptions | None) -> int:
        """One draft token."""
        return 1

    def speculative(self, folder: str, k: int) -> dict[str, Any]:
        """As a vLLM would take it that had such drafts."""
        return {"method": "linear", "model": folder, "num_speculative_tokens": k}

    def sglang_flags(self, folder: str, k: int) -> list[str]:
        """None: SGLang knows no such draft."""
        return []

    def card(self, config: LinearConfig) -> list[tuple[str, str]]:
        """One row of the model card."""
        return [("hidden size", str(config.hidden_size))]

    def card_of_training(self, options: LinearOptions) -> list[tuple[str, str]]:
        """And one of its training."""
        return [("head scale", f"{options.head_scale:g}")]


LINEAR: Family = Linear()
