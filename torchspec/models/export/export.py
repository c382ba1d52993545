"""Export of a trained draft as a directory that a server reads, checked before it counts.

``serving_formats.py`` says what each server's ``config.json`` holds and what it would serve wrongly; tensors go by the draft's own names, with the target's
embedding table and, for a pruned vocabulary, ``d2t`` (offsets: target id = draft id + d2t[draft id]) and ``t2d``. Servers are silent about a missing
tensor, so what was written is read back by ``import_draft`` (exact names), its architecture and vocabulary compared, and its logits compared with those of
the trained weights cast to the export's type. A directory appears whole or not at all,
and takes the place of an earlier export alone (``folders.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from torchspec.batch import PackedBatch
from torchspec.errors import UserError
from torchspec.files import dumps
from torchspec.folders import check_output, workplace
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.formats import Format, describe
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.export.draft_files import write_tensors
from torchspec.models.export.import_draft import import_draft
from torchspec.models.export.model_card import model_card
from torchspec.models.target_head import read_embedding
from torchspec.models.training.checkpoint import read_draft_weights, read_entries, read_facts
from torchspec.models.training.finite import named, no_longer_numbers, not_finite
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.paths import home
from torchspec.supervision import Unroll
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
    weights = read_draft_weights(checkpoint, (options or ExportOptions()).weights)
    config, ids = DraftConfig.from_dict(facts["draft_config"]), facts["draft_ids"]
    trained = None if ids is None else VocabularyMapping(draft_ids=ids, target_size=config.vocab_size)
    if vocabulary is not None:
        config, weights, trained = prune(config, weights, trained, vocabulary)
    entries = read_entries(checkpoint)
    training = {
        "unroll_steps": facts["unroll_steps"],
        "step_weights": facts["step_weights"],
        "optimizer_steps": entries.get("global_step"),
        "recipe": facts.get("recipe", {}),
    }
    return export_draft(config, weights, trained, target, directory, options=options, training=training)


def prune(
    config: DraftConfig, weights: dict[str, Tensor], trained: VocabularyMapping | None, vocabulary: VocabularyMapping
) -> tuple[DraftConfig, dict[str, Tensor], VocabularyMapping]:
    """A draft of the whole vocabulary, cut to the rows of a smaller one.

    Raises:
        UserError: it was trained with a pruned one.
    """
    if trained is not None and trained.size < config.vocab_size:
        raise UserError("draft_vocab_size", vocabulary.size, f"cannot prune a draft that was trained with {trained.size} tokens", "leave it out")
    kept = {**weights, "lm_head.weight": weights["lm_head.weight"][vocabulary.draft_ids]}
    return config.with_draft_vocabulary(vocabulary.size), kept, vocabulary


def export_draft(
    config: DraftConfig,
    weights: dict[str, Tensor],
    vocabulary: VocabularyMapping | None,
    target: Target,
    directory: Path,
    *,
    options: ExportOptions | None = None,
    training: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a draft directory.

    Args:
        config: the draft's architecture.
        weights: tensors by their name in ``Eagle3Draft``, any float type.
        vocabulary: which target tokens the draft's rows stand for; None for all of them in order.
        target: gives the embedding table, the served length and the type.
        directory: replaced when it is an earlier export.
        options: format, type and the like.
        training: facts for the model card, see :func:`~torchspec.models.export.model_card.model_card`.

    Raises:
        UserError: as :func:`export_checkpoint`.
    """
    options = options or ExportOptions()
    kind = target.dtype if options.dtype == "auto" else DTYPES[options.dtype]
    steps = None if training is None else training.get("unroll_steps")
    described = describe(config, target, form=options.form, dtype=kind, unroll_steps=steps, target_name=options.target_name)
    names = _checked_names(config, weights)
    tensors = {name: weights[name].detach().to("cpu", kind).contiguous() for name in names}
    if wrong := not_finite((name, weights[name]) for name in names):
        raise UserError("checkpoint", str(directory), f"is not exported: {no_longer_numbers(wrong)}", "export an earlier checkpoint")
    if wrong := not_finite(tensors.items()):
        problem = f"cannot hold these weights: they overflow ({named(wrong)})"
        raise UserError("dtype", str(kind).removeprefix("torch."), problem, "export in bfloat16 or float32")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = read_embedding(target).to(kind).contiguous()
    if options.form == "sglang":
        for i in range(1, config.num_layers):  # SGLang's name of that norm; vLLM reads the other, and both must be there to serve alike
            tensors[f"layers.{i}.hidden_norm.weight"] = tensors[f"layers.{i}.input_layernorm.weight"].clone()
    if vocabulary is not None and vocabulary.size < config.vocab_size:
        tensors["d2t"] = vocabulary.d2t.contiguous()
        tensors["t2d"] = vocabulary.t2d.contiguous()
    card = model_card(
        config, target, form=options.form, dtype=described["dtype"], parameters=parameters, target_name=options.target_name, training=training
    )  # fmt: skip

    place = check_output(home(directory), field="export directory")
    try:
        with workplace(place, field="export directory") as partial:
            _write(partial, described, card, tensors, target, options)
            difference = _self_check(partial, config, weights, kind, vocabulary, target)
    except (OSError, SafetensorError) as error:
        need = sum(t.nbytes for t in tensors.values())
        raise UserError(
            "export directory", str(directory), f"cannot take the draft of {need / 2**20:.0f} MiB ({error})", "free space there or choose another directory"
        ) from error
    return ExportReport(str(directory), len(tensors), sum(t.nbytes for t in tensors.values()), difference)


def _checked_names(config: DraftConfig, weights: dict[str, Tensor]) -> list[str]:
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Eagle3Draft(config).named_parameters()}
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


def _self_check(
    folder: Path, config: DraftConfig, weights: dict[str, Tensor], kind: torch.dtype, vocabulary: VocabularyMapping | None, target: Target
) -> float:
    """Read the files back alone and compare logits with those of the trained weights in the export's type; returns the largest difference."""

    def broken(what: str) -> UserError:
        return UserError("export directory", str(folder.parent), what, "report this: it is a defect of the exporter")

    again = import_draft(str(folder), target)
    if again.config != config:
        raise broken("holds a config.json that does not describe the trained draft")
    pruned = None if vocabulary is None or vocabulary.size == config.vocab_size else vocabulary.draft_ids
    found = None if again.vocabulary is None else again.vocabulary.draft_ids
    if (pruned is None) != (found is None) or (pruned is not None and found is not None and not torch.equal(pruned, found)):
        raise broken("holds a wrong vocabulary mapping")
    trained = {name: tensor.detach().to("cpu", kind) for name, tensor in weights.items()}
    ours = _probe(config, trained, None if config.owns_embedding else read_embedding(target).to(kind))
    difference = float((ours - _probe(config, again.weights, again.embedding)).abs().max())
    if not difference == 0.0:
        raise UserError(
            "export directory", str(folder.parent), f"reloads with logits that differ by {difference}", "check the disk; if it is whole, report this"
        )
    return difference


def _probe(config: DraftConfig, tensors: Mapping[str, Tensor], table: Tensor | None) -> Tensor:
    """Logits of two steps of the draft over six fixed random rows, fp32; ``table`` is the target's embedding where the draft has none."""
    draft = Eagle3Draft(config)
    if table is not None:
        draft.set_embedding(table.float())
    draft.load_state_dict({name: tensors[name].float() for name, _ in draft.named_parameters()}, strict=True)
    generator = torch.Generator().manual_seed(0)
    n, steps = 6, 2
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
        return draft.lm_head(draft.norm(torch.cat(draft(batch))))
