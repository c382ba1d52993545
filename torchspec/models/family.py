"""What a draft family is: everything that the trainer, the files and the servers must know of it and that differs between families.

A family is one object at the top of its folder's ``family.py``, found by name in ``families.py``. It holds nothing of a run. What a run needs of it:

    target ──config──► architecture ──supervision──► what data/ batches        architecture ──task──► what is trained and sharded
    architecture, weights ──describe, tensors──► files of a server             files ──recognises, read──► architecture, weights

Letters: N tokens of a pack, K horizon, R_0 rows, W draft vocabulary, V the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.metrics import StepOutput
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.loss_formulas import FORWARD_KL, LossWeights
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.supervision import Supervision
from torchspec.target import Target

Format = Literal["vllm", "speculators", "sglang"]
FORMATS: tuple[Format, ...] = ("vllm", "speculators", "sglang")
Init = Literal["target", "target_head", "random"]


class Architecture(Protocol):
    """What fixes the shapes and the arithmetic of a draft: a frozen dataclass of the family, with these among its fields."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def draft_vocab_size(self) -> int:
        """W; V where the vocabulary is not pruned."""
        ...

    @property
    def hidden_size(self) -> int:
        """H."""
        ...

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Hidden-state indices in Transformers' counting; empty for a draft that reads the last hidden state alone."""
        ...

    def with_draft_vocabulary(self, size: int) -> Self:
        """The same draft over ``size`` tokens."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        ...


class Options(Protocol):
    """How a draft is trained, beside its architecture: the family's frozen dataclass, ``model.options`` by its fields. It refuses what it cannot mean itself
    (``UserError`` of ``model.options.NAME``)."""

    __dataclass_fields__: Any


class Task(Protocol):
    """What the module holds, shards and calls: an ``nn.Module`` whose parameters are all the draft's."""

    draft: nn.Module
    """The network; its state dict is what checkpoints hold and exports write."""
    mean_alpha: Tensor
    """[K] mean alpha of each depth over the previous optimizer step, 0 before the first."""

    @property
    def watched(self) -> Tensor:
        """A small weight that every loss reaches: its gradient is looked at for NaN."""
        ...

    def __call__(self, batch: PackedBatch, measure: bool = False) -> StepOutput:
        """Loss and sums of a batch on this module's device; ``measure``: also alpha and what was followed."""
        ...


@dataclass(frozen=True, eq=False)
class Build:
    """How a task is made, beside architecture and options."""

    target: Target
    vocabulary: VocabularyMapping | None
    """None for the whole one."""
    compute_dtype: torch.dtype
    device: torch.device
    """That it will train on: decides the type of the target head (``hardware.working_dtype``). Tensors are made on torch's default device."""
    loss: LossWeights = FORWARD_KL
    init: Init = "target"
    train_head: bool = True
    recompute: bool = False
    fp8: Fp8 = Fp8.NONE


@dataclass(frozen=True, eq=False)
class Draft:
    """A draft's architecture and weights: as they were read, or as they are to be written."""

    config: Any
    """:class:`Architecture`, the family's own class."""
    weights: dict[str, Tensor]
    """By their name in the network, any float type; all of them."""
    vocabulary: VocabularyMapping | None
    """None for the whole one."""
    embedding: Tensor | None = None
    """[V, H] of a draft that uses the target's table, where it was published too."""
    described: dict[str, Any] | None = None
    """Its ``config.json``, of one that was read."""
    family: Family | None = None
    """Whose it is, of one that was read."""


@runtime_checkable
class Family(Protocol):
    """See the module. ``config`` is always the family's own :class:`Architecture`, ``options`` its own :class:`Options`."""

    name: str
    """As in ``model.family``."""
    title: str
    """For people."""
    paper: str
    """Where it is described: its arXiv number."""
    tag: str
    """Of the model card."""
    options: type[Any]
    """Dataclass of :class:`Options`; every field has a default."""
    fixed_options: tuple[str, ...]
    """Options that a resumed run may not change."""
    vocabulary_rows: tuple[str, ...]
    """Tensors with a row for each token of the draft vocabulary, which pruning cuts."""
    beside: tuple[str, ...]
    """Names of files that a published draft may hold beside ``config.json`` and its tensors."""

    # -- architecture

    def aux_layers(self, target: Target) -> tuple[int, ...]:
        """Default of ``model.aux_layers``. Raises UserError where the target has none."""
        ...

    def config(self, target: Target, *, aux_layers: tuple[int, ...], given: Mapping[str, Any], where: str) -> Any:
        """The architecture for a target, with fields of the user's file in place of what the target suggests.

        Args:
            target: the frozen model.
            aux_layers: hidden-state indices fed to the draft.
            given: fields of ``model.draft``'s JSON without ``family``; empty where there is none.
            where: ``model.draft (FILE)``, for errors.

        Raises:
            UserError: unknown fields, or what does not fit the target.
        """
        ...

    def config_from_dict(self, plain: Mapping[str, Any]) -> Any:
        """Back from :meth:`Architecture.to_dict`."""
        ...

    def notes(self, config: Any, target: Target) -> list[str]:
        """What to print of numbers that are not the target's own."""
        ...

    def shapes(self, config: Any) -> dict[str, torch.Size]:
        """Every tensor of the network by its name, without making it."""
        ...

    # -- training

    def supervision(self, config: Any, options: Any, *, stage: Literal["train", "validate"], horizon: int = 0) -> Supervision:
        """Where the draft learns; in validation up to ``horizon`` draft tokens where that is more than are trained and the family can."""
        ...

    def task(self, config: Any, options: Any, build: Build) -> nn.Module:
        """A fresh :class:`Task`; weights from torch's global random state."""
        ...

    # -- files

    def refuse(self, config: Any, target: Target, *, form: Format) -> None:
        """Raise UserError for what a format cannot say, or its server would run otherwise than it was trained."""
        ...

    def describe(self, config: Any, target: Target, *, form: Format, dtype: torch.dtype, options: Any | None, target_name: str | None) -> dict[str, Any]:
        """``config.json``. ``options``: of the training, where they are known. Raises as :meth:`refuse`."""
        ...

    def tensors(self, draft: Draft, target: Target, *, form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors to write, on the host, contiguous, all floats of ``dtype``.

        Args:
            draft: its weights are of ``dtype`` already.
            target: gives what ships beside them.
            form: who reads them.
            dtype: of the export.
        """
        ...

    def write_beside(self, folder: Path, draft: Draft, *, form: Format) -> None:
        """Write what is neither configuration nor tensors (:attr:`beside`), into a folder that is ours."""
        ...

    def recognises(self, described: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this family."""
        ...

    def read(self, described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, folder: Path) -> Draft:
        """A published draft.

        Args:
            described: its ``config.json``.
            tensors: all of it, by the names in its files.
            target: the model it drafts for; gives what may be left out.
            folder: where it lies, for errors and for :attr:`beside`.

        Raises:
            UserError: what this family cannot honour, missing or unknown tensors, sizes that do not fit the target.
        """
        ...

    def probe(self, draft: Draft, target: Target, *, dtype: torch.dtype) -> Tensor:
        """Logits fp32 of a draft over a few fixed random rows: equal for two drafts that a server would run alike.

        Args:
            draft: its weights whole; without an embedding of its own the target's is taken, as ``dtype`` has it.
            target: gives what the draft does not hold.
            dtype: of the export.
        """
        ...

    # -- servers

    def horizon(self, config: Any, options: Any | None) -> int:
        """Draft tokens of one proposal that the draft is made for; of one whose training is not known, what is usual."""
        ...

    def speculative(self, folder: str, k: int) -> dict[str, Any]:
        """vLLM's ``speculative_config`` for a draft directory and k tokens."""
        ...

    def sglang_flags(self, folder: str, k: int) -> list[str]:
        """Words of SGLang's command line for the same."""
        ...

    # -- the model card

    def card(self, config: Any) -> list[tuple[str, str]]:
        """Its rows about what only this family's architecture has."""
        ...

    def card_of_training(self, options: Any) -> list[tuple[str, str]]:
        """Its rows about the options."""
        ...
