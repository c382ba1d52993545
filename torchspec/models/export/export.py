"""Export of a trained draft as a directory that a server reads, checked before it counts.

A draft's family says what each server's ``config.json`` and tensors are and what it would serve wrongly (``family.py``). Servers are silent about a missing
tensor, so what was written is read back by ``import_draft`` (exact names), its architecture and vocabulary compared, and its logits compared with those of
the trained weights cast to the export's type. A directory appears whole or not at all, and takes the place of an earlier export alone (``folders.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchspec.errors import UserError
from torchspec.files import dumps
from torchspec.folders import check_output, workplace
from torchspec.models.export.draft_files import write_tensors
from torchspec.models.export.import_draft import import_draft
from torchspec.models.export.model_card import Training, model_card
from torchspec.models.families import family_named
from torchspec.models.family import Draft, Family, Format
from torchspec.models.ops.not_finite import named, no_longer_numbers, not_finite
from torchspec.models.training.checkpoint import read_draft_weights, read_entries, read_facts
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.paths import home
from torchspec.target import Dtype, Target

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportOptions:
    """How a draft is written."""

    form: Format = "vllm"
    """Whose format: vllm, speculators or sglang."""
    dtype: Dtype = "auto"
    """Type of the tensors; auto takes the target's."""
    max_shard_size: str = "5GB"
    """Largest file; a bigger draft is written in shards with an index."""
    tokenizer: bool = False
    """Also write the target's tokenizer and generation settings, for servers that look for them in the draft's directory."""
    target_name: str | None = None
    """Hub id to name the target by in the card and the configuration, where the target is a local copy."""
    weights: Literal["raw", "average"] | None = None
    """Of a checkpoint with both: those in training, or their average; None takes the average where there is one."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to what was trained."""

    directory: str
    tensors: int
    nbytes: int
    max_logit_difference: float
    """Largest difference of logits between the reloaded export and the trained draft, both in the export's type."""

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.tensors} tensors, {self.nbytes / 2**20:.1f} MiB; reloaded and compared, largest difference {self.max_logit_difference:g}"
        )


def export_checkpoint(
    checkpoint: Path, target: Target, directory: Path, *, options: ExportOptions | None = None, vocabulary: VocabularyMapping | None = None
) -> ExportReport:
    """Export a training checkpoint (file or sharded folder).

    Args:
        checkpoint: what ``fit`` saved.
        target: the model the draft was trained for.
        directory: where the draft goes; an earlier export there is replaced, anything else refused.
        options: format, type and the like.
        vocabulary: prune a draft of the whole vocabulary to this one; None exports it as it was trained.

    Raises:
        UserError: a damaged or foreign checkpoint, another target, a draft that the format cannot say, no room, or a failed self-check.
    """
    facts = read_facts(checkpoint)
    if facts["target"]["fingerprint"] != target.fingerprint:
        raise UserError(
            "target", target.config.path, f"is not the target of this checkpoint ({facts['target']['path']})", "give the target that the draft was trained for"
        )
    family = family_named(facts["family"], field="checkpoint (family)")
    config, ids = family.config_from_dict(facts["draft_config"]), facts["draft_ids"]
    trained = None if ids is None else VocabularyMapping(draft_ids=ids, target_size=config.vocab_size)
    draft = Draft(config, read_draft_weights(checkpoint, (options or ExportOptions()).weights), trained, family=family)
    if vocabulary is not None:
        draft = prune(draft, vocabulary)
    training = Training(family.options(**facts["options"]), read_entries(checkpoint).get("global_step"), facts.get("recipe", {}))
    return export_draft(draft, target, directory, options=options, training=training)


def prune(draft: Draft, vocabulary: VocabularyMapping) -> Draft:
    """A draft of the whole vocabulary, cut to the rows of a smaller one.

    Raises:
        UserError: it was trained with a pruned one.
    """
    if draft.vocabulary is not None and draft.vocabulary.size < draft.config.vocab_size:
        raise UserError("draft_vocab_size", vocabulary.size, f"cannot prune a draft that was trained with {draft.vocabulary.size} tokens", "leave it out")
    assert draft.family is not None
    kept = {name: draft.weights[name][vocabulary.draft_ids] for name in draft.family.vocabulary_rows if name in draft.weights}
    return replace(draft, config=draft.config.with_draft_vocabulary(vocabulary.size), weights={**draft.weights, **kept}, vocabulary=vocabulary)


def export_draft(draft: Draft, target: Target, directory: Path, *, options: ExportOptions | None = None, training: Training | None = None) -> ExportReport:
    """Write a draft directory.

    Args:
        draft: what to write; its weights may be of any float type.
        target: gives the embedding table, the served length and the type.
        directory: replaced when it is an earlier export.
        options: format, type and the like.
        training: facts for the model card.

    Raises:
        UserError: as :func:`export_checkpoint`.
    """
    options, family = options or ExportOptions(), draft.family
    assert family is not None
    kind = target.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    trained_with = None if training is None else training.options
    described = family.describe(draft.config, target, form=options.form, dtype=kind, options=trained_with, target_name=options.target_name)
    names = _checked_names(family, draft)
    cast = replace(draft, weights={name: draft.weights[name].detach().to("cpu", kind).contiguous() for name in names})
    if wrong := not_finite((name, draft.weights[name]) for name in names):
        raise UserError("checkpoint", str(directory), f"is not exported: {no_longer_numbers(wrong)}", "export an earlier checkpoint")
    if wrong := not_finite(cast.weights.items()):
        problem = f"cannot hold these weights: they overflow ({named(wrong)})"
        raise UserError("dtype", str(kind).removeprefix("torch."), problem, "export in bfloat16 or float32")
    parameters = sum(tensor.numel() for tensor in cast.weights.values())
    tensors = family.tensors(cast, target, form=options.form, dtype=kind)
    card = model_card(draft, target, form=options.form, dtype=described["dtype"], parameters=parameters, target_name=options.target_name, training=training)

    place = check_output(home(directory), field="export directory")
    try:
        with workplace(place, field="export directory") as partial:
            _write(partial, described, card, tensors, target, options)
            family.write_beside(partial, cast, form=options.form)
            difference = _self_check(partial, cast, kind, target)
    except (OSError, SafetensorError) as error:
        need = sum(t.nbytes for t in tensors.values())
        raise UserError(
            "export directory", str(directory), f"cannot take the draft of {need / 2**20:.0f} MiB ({error})", "free space there or choose another directory"
        ) from error
    return ExportReport(str(directory), len(tensors), sum(t.nbytes for t in tensors.values()), difference)


def _checked_names(family: Family, draft: Draft) -> list[str]:
    expected, weights = family.shapes(draft.config), draft.weights
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise UserError("checkpoint", missing or unknown, "has missing or unknown draft tensors", "export a checkpoint of this architecture")
    wrong = [name for name, shape in expected.items() if weights[name].shape != shape]
    if wrong:
        raise UserError("checkpoint", wrong, "has draft tensors of another shape", "export a checkpoint of this architecture")
    return list(expected)


def _write(folder: Path, described: dict[str, Any], card: str, tensors: dict[str, Tensor], target: Target, options: ExportOptions) -> None:
    (folder / "config.json").write_text(dumps(described, indent=2) + "\n")
    (folder / "README.md").write_text(card)
    if options.tokenizer:
        target.tokenizer().save_pretrained(folder)
        _save_generation_settings(target, folder)
    write_tensors(folder, tensors, max_shard_size=options.max_shard_size)


def _save_generation_settings(target: Target, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(target.config.path, revision=target.config.revision or "main")
    except (OSError, ValueError):  # the target ships none
        return
    settings.save_pretrained(folder)


def _self_check(folder: Path, trained: Draft, kind: torch.dtype, target: Target) -> float:
    """Read the files back alone and compare logits with those of the trained weights in the export's type; returns the largest difference."""

    def broken(what: str) -> UserError:
        return UserError("export directory", str(folder.parent), what, "report this: it is a defect of the exporter")

    family = trained.family
    assert family is not None
    again = import_draft(str(folder), target, family=family)
    if again.config != trained.config:
        raise broken("holds a config.json that does not describe the trained draft")
    pruned = None if trained.vocabulary is None or trained.vocabulary.size == trained.config.vocab_size else trained.vocabulary.draft_ids
    found = None if again.vocabulary is None else again.vocabulary.draft_ids
    if (pruned is None) != (found is None) or (pruned is not None and found is not None and not torch.equal(pruned, found)):
        raise broken("holds a wrong vocabulary mapping")
    trained = replace(trained, embedding=None)  # an imported one's may be of another type: the target's is written
    difference = float((family.probe(trained, target, dtype=kind) - family.probe(again, target, dtype=kind)).abs().max())
    if not difference == 0.0:
        raise UserError(
            "export directory", str(folder.parent), f"reloads with logits that differ by {difference}", "check the disk; if it is whole, report this"
        )
    return difference
