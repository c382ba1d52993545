"""The files of a linear draft: its ``config.json`` and tensors, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.made_up.linear.config import ARCHITECTURE_FIELDS, LinearConfig
from tests.made_up.linear.network import LinearDraft
from torchspec.errors import UserError
from torchspec.models.family import Draft, Format
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target

ARCHITECTURE = "LinearDraft"


def refuse(form: Format) -> None:
    """Raise UserError for formats that cannot say a linear draft."""
    if form != "vllm":
        raise UserError("format", form, "knows no linear draft", "export with --format vllm")


def describe(config: LinearConfig, target: Target, *, dtype: torch.dtype, target_name: str | None) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": [ARCHITECTURE],
        **config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "target": target_name or target.config.path,
    }


def shapes(config: LinearConfig) -> dict[str, torch.Size]:
    """Every tensor of the network by its name, without making it."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in LinearDraft(config).named_parameters()}


def tensors(draft: Draft) -> dict[str, Tensor]:
    """What is written: the weights, and for a pruned vocabulary the target id of each row."""
    return dict(draft.weights) if draft.vocabulary is None else {**draft.weights, "draft_ids": draft.vocabulary.draft_ids}


def read(described: dict[str, Any], found: dict[str, Tensor], target: Target, *, folder: Path) -> Draft:
    """A draft from its files. Raises UserError where they are not those of one draft for this target."""
    config = LinearConfig.from_dict({name: described[name] for name in ARCHITECTURE_FIELDS if name in described})
    if (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        raise UserError("draft", str(folder), "was made for a target of other sizes", "give the draft's own target")
    ids = found.pop("draft_ids", None)
    expected = shapes(config)
    if {name: tensor.shape for name, tensor in found.items()} != expected or (ids is None) != (config.draft_vocab_size == config.vocab_size):
        raise UserError("draft", str(folder), f"does not hold {', '.join(expected)} in the shapes of its config.json", "its files are not those of one draft")
    return Draft(config, found, None if ids is None else VocabularyMapping(ids, config.vocab_size), described=described)


def probe(draft: Draft) -> Tensor:
    """Logits [6, W] fp32 over fixed random states."""
    made = LinearDraft(draft.config)
    made.load_state_dict({name: tensor.float() for name, tensor in draft.weights.items()})
    states = torch.randn(6, draft.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return made(states)
