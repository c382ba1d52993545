"""Export of a trained draft in vLLM's plain EAGLE-3 format, checked before it counts.

Format (read against vLLM 0.32 and 0.33): ``config.json`` of a ``LlamaForCausalLMEagle3`` (``Eagle3Qwen3ForCausalLM`` where queries and keys are normed) and
``model.safetensors`` with the draft's own names, the target's embedding table, and, for a pruned vocabulary, ``d2t`` (offsets: target id = draft id +
d2t[draft id]) and
``t2d``. vLLM is silent about a missing tensor, so the exporter compares the set of names itself, reloads what it wrote and compares logits with the trained
draft.
A directory appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchspec.batch import PackedBatch, UnrollRows
from torchspec.errors import UserError
from torchspec.models.checkpoint import read_draft_weights, read_facts
from torchspec.models.draft_config import DraftConfig
from torchspec.models.eagle3 import Eagle3Draft
from torchspec.models.target_weights import read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Options of the architecture that vLLM reads by the same name; absent means off."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how near it is to what was trained."""

    directory: str
    tensors: int
    nbytes: int
    max_logit_difference: float
    """Largest difference of logits between the reloaded export and the trained draft, both in the export's type."""


def export_checkpoint(checkpoint: Path, target: Target, directory: Path, *, dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto") -> ExportReport:
    """Export a training checkpoint (file or sharded folder).

    Args:
        checkpoint: what ``fit`` saved.
        target: the model the draft was trained for.
        directory: where the draft goes; replaced when it is an earlier export.
        dtype: type of the tensors; auto takes the target's.

    Raises:
        UserError: a damaged or foreign checkpoint, another target, no room, or a failed self-check.
    """
    facts = read_facts(checkpoint)
    if facts["target"]["fingerprint"] != target.fingerprint:
        raise UserError(
            "target", target.config.path, f"is not the target of this checkpoint ({facts['target']['path']})", "give the target that the draft was trained for"
        )
    config = DraftConfig.from_dict(facts["draft_config"])
    ids = facts["draft_ids"]
    vocabulary = None if ids is None else VocabularyMapping(draft_ids=ids, target_size=config.vocab_size)
    return export_draft(config, read_draft_weights(checkpoint), vocabulary, target, directory, dtype=dtype, trained_with=facts["unroll_steps"])


def export_draft(
    config: DraftConfig,
    weights: dict[str, Tensor],
    vocabulary: VocabularyMapping | None,
    target: Target,
    directory: Path,
    *,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trained_with: int | None = None,
) -> ExportReport:
    """Write a draft directory that stock vLLM serves.

    Args:
        config: the draft's architecture.
        weights: tensors by their name in ``Eagle3Draft``, any float type.
        vocabulary: which target tokens the draft's rows stand for; None for all of them in order.
        target: gives the embedding table, the served length and the type.
        directory: replaced when it is an earlier export.
        dtype: type of the tensors; auto takes the target's.
        trained_with: K of the training, for people.

    Raises:
        UserError: as :func:`export_checkpoint`.
    """
    kind = target.dtype if dtype == "auto" else DTYPES[dtype]
    draft = Eagle3Draft(config)
    tensors = {name: weights[name].detach().to("cpu", kind).contiguous() for name in _checked_names(draft, weights)}
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = read_embedding(target).to(kind).contiguous()
    if vocabulary is not None and vocabulary.size < config.vocab_size:
        tensors["d2t"] = vocabulary.d2t.contiguous()
        tensors["t2d"] = vocabulary.t2d.contiguous()
    described = serving_config(config, kind, target, unroll_steps=trained_with)

    if directory.exists() and not (directory / "config.json").is_file() and any(directory.iterdir()):
        raise UserError("export directory", str(directory), "exists and holds something that is no draft", "give an empty or new directory")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        _write(partial, described, tensors)
        difference = _self_check(partial, config, tensors, vocabulary)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportReport(str(directory), len(tensors), sum(t.nbytes for t in tensors.values()), difference)


def serving_config(config: DraftConfig, kind: torch.dtype, target: Target, *, unroll_steps: int | None = None) -> dict[str, Any]:
    """``config.json`` of the export.

    RoPE is written in the old field (``rope_theta``, ``rope_scaling``) and the new one (``rope_parameters``), so that Transformers 4.57 and 5 both read the
    base that was trained.
    Layer ids: top-level ones in our counting and ``eagle_config`` ones minus one (SGLang's counting); with the default ids neither is written.
    """
    rope = dict(config.rope_parameters)
    scaling = None if rope.get("rope_type", "default") == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    described: dict[str, Any] = {
        "architectures": ["Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "torch_dtype": str(kind).removeprefix("torch."),
        "dtype": str(kind).removeprefix("torch."),
        **{flag: True for flag in FLAGS if getattr(config, flag)},
    }
    if len(config.aux_layers) != 3:
        described["num_aux_hidden_states"] = len(config.aux_layers)
    if target.num_layers < 7 or tuple(config.aux_layers) != target.aux_layers(None):
        described["eagle_aux_hidden_state_layer_ids"] = list(config.aux_layers)
        described["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.aux_layers], "use_aux_hidden_state": True}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(target.hf_config, name, None)
        if value is not None:
            described[name] = value
    if unroll_steps is not None:
        described["torchspec"] = {"unroll_steps": unroll_steps, "target": target.config.path, "target_fingerprint": target.fingerprint}
    return described


def _checked_names(draft: Eagle3Draft, weights: dict[str, Tensor]) -> list[str]:
    expected = {name: parameter.shape for name, parameter in draft.named_parameters()}
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise UserError("checkpoint", missing or unknown, "has missing or unknown draft tensors", "export a checkpoint of this architecture")
    wrong = [name for name, shape in expected.items() if weights[name].shape != shape]
    if wrong:
        raise UserError("checkpoint", wrong, "has draft tensors of another shape", "export a checkpoint of this architecture")
    return list(expected)


def _write(folder: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    try:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with (folder / "model.safetensors").open("rb") as handle:
            os.fsync(handle.fileno())
    except (OSError, SafetensorError) as error:
        need = sum(t.nbytes for t in tensors.values())
        raise UserError(
            "export directory", str(folder.parent), f"cannot take the draft of {need / 2**20:.0f} MiB ({error})", "free space there or choose another directory"
        ) from error


def _self_check(folder: Path, config: DraftConfig, written: dict[str, Tensor], vocabulary: VocabularyMapping | None) -> float:
    """Reload the files alone and compare logits of both on the same random states; returns the largest difference."""
    loaded = load_file(folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    again = DraftConfig.from_export(described, aux_layers=config.aux_layers)
    if again != config:
        raise UserError(
            "export directory",
            str(folder.parent),
            "holds a config.json that does not describe the trained draft",
            "report this: it is a defect of the exporter",
        )
    if vocabulary is not None and vocabulary.size < config.vocab_size:
        ids = torch.arange(vocabulary.size) + loaded["d2t"]
        if not torch.equal(ids, vocabulary.draft_ids) or int(loaded["t2d"].sum()) != vocabulary.size or not bool(loaded["t2d"][ids].all()):
            raise UserError("export directory", str(folder.parent), "holds a wrong vocabulary mapping", "report this: it is a defect of the exporter")
    logits = [_probe(config, tensors) for tensors in (written, loaded)]
    difference = float((logits[0] - logits[1]).abs().max())
    if not difference == 0.0:
        raise UserError(
            "export directory", str(folder.parent), f"reloads with logits that differ by {difference}", "check the disk; if it is whole, report this"
        )
    return difference


def _probe(config: DraftConfig, tensors: dict[str, Tensor]) -> Tensor:
    """Logits [4, W] of the first step of the draft on fixed random inputs, fp32."""
    draft = Eagle3Draft(config)
    if not config.owns_embedding:
        draft.set_embedding(tensors["embed_tokens.weight"].float())
    draft.load_state_dict({name: tensors[name].float() for name, _ in draft.named_parameters()}, strict=True)
    generator = torch.Generator().manual_seed(0)
    n = 4
    every = torch.arange(n)
    batch = PackedBatch(
        input_ids=torch.randint(0, config.vocab_size, (n,), generator=generator),
        position=every,
        sequence=torch.zeros(n, dtype=torch.int64),
        turn=torch.zeros(n, dtype=torch.int64),
        aux=torch.randn(n, len(config.aux_layers) * config.target_hidden_size, generator=generator),
        last=torch.zeros(n, config.target_hidden_size),
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        sample_ids=(0,),
        counts=torch.ones(1),
        rows=UnrollRows(every, (every,), (every,)),
    )
    with torch.no_grad():
        return draft.lm_head(draft.norm(draft(batch)[0]))


def export_for(config: TargetConfig, checkpoint: Path, directory: Path, *, dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto") -> ExportReport:
    """:func:`export_checkpoint` for a target by its configuration."""
    return export_checkpoint(checkpoint, Target(config), directory, dtype=dtype)
