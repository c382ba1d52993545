"""README.md of an exported draft: what it drafts for, how to serve it, and how it was trained, from facts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchspec import __version__
from torchspec.models.family import Draft, Family, Format
from torchspec.models.training import recipe
from torchspec.target import Target

_LIBRARY = {"vllm": "vllm", "speculators": "speculators", "sglang": "sglang"}
_FOLDER = "THIS_DIRECTORY"


@dataclass(frozen=True)
class Training:
    """How a draft was trained."""

    options: Any | None
    """The family's; None where they are not known."""
    optimizer_steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """``recipe.recipe``'s."""


def model_card(
    draft: Draft, target: Target, *, form: Format, dtype: str, parameters: int, target_name: str | None = None, training: Training | None = None
) -> str:
    """The card.

    Args:
        draft: what is written; it knows its family.
        target: what it drafts for.
        form: of the directory.
        dtype: of the tensors.
        parameters: number of trained values.
        target_name: hub id of the target, where it is known by another name than ``target.config.path``.
        training: what of it is known.
    """
    family = draft.family
    assert family is not None
    name = target_name or target.config.path
    hub = target_name is not None or not Path(target.config.path).is_dir()
    lines = ["---", f"library_name: {_LIBRARY[form]}", "pipeline_tag: text-generation", "tags:", "- speculative-decoding", f"- {family.tag}"]
    lines += [f"base_model: {name}", "base_model_relation: adapter"] if hub else []
    lines += ["---", "", f"# {family.title} draft of {name}", ""]
    lines += [f"A draft for speculative decoding ({family.title}, {family.paper}): the target `{name}` verifies what it proposes.", "", "## Serve", ""]
    proposals = family.horizon(draft.config, None if training is None else training.options)
    lines += ["```", _serve(family, form, name, proposals), "```", "", "## Draft", ""]
    lines += _table([("trained parameters", f"{parameters:,}"), *family.card(draft.config), *_architecture(draft.config, target, dtype)])
    rows = [] if training is None else _training(family, training)
    if rows:
        lines += ["", "## Training", ""] + _table(rows)
    lines += ["", f"Written by TorchSpec {__version__}. Layer indices are Transformers' `hidden_states` indices.", ""]
    return "\n".join(lines)


def _serve(family: Family, form: Format, target: str, proposals: int) -> str:
    if form == "sglang":
        return f"python -m sglang.launch_server --model {target} {' '.join(family.sglang_flags(_FOLDER, proposals))}"
    return f"vllm serve {target} --speculative-config '{json.dumps(family.speculative(_FOLDER, proposals))}'"


def _architecture(config: Any, target: Target, dtype: str) -> list[tuple[str, str]]:
    whole = config.draft_vocab_size == config.vocab_size
    rope = getattr(config, "rope_parameters", None)
    return [
        ("aux layers", f"{list(config.aux_layers)} of 0..{target.num_layers}"),
        ("draft vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,}" + (" (whole)" if whole else "")),
        *([] if rope is None else [("RoPE", ", ".join(f"{name} {value}" for name, value in rope.items()))]),
        ("tensors", dtype),
        ("target fingerprint", f"`{target.fingerprint}`"),
    ]


def _training(family: Family, training: Training) -> list[tuple[str, str]]:
    rows = [] if training.options is None else family.card_of_training(training.options)
    if training.optimizer_steps is not None:
        rows.append(("optimizer steps", f"{training.optimizer_steps:,}" + _epochs(training)))
    return rows + recipe.rows(training.recipe)


def _epochs(training: Training) -> str:
    """How often the data were seen, where it is known how many steps that takes."""
    steps = training.recipe.get("data", {}).get("steps_per_epoch")
    return f" ({training.optimizer_steps / steps:.3g} epochs)" if steps and training.optimizer_steps is not None else ""


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
