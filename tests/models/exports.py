"""A target directory that fits the tiny drafts of ``packs.py``, and drafts exported for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models.packs import conversation, draft_config, pack
from tests.models.variants import VARIANTS
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.family import EAGLE3
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.eagle3.options import UnrollOptions
from torchspec.models.export.export import ExportOptions, ExportReport, export_draft
from torchspec.models.export.import_draft import import_draft
from torchspec.models.export.model_card import Training
from torchspec.models.family import Draft
from torchspec.models.target_head import read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig

LAYERS = 9
TRAINED = Training(UnrollOptions(3))


def save_plain_target(folder: Path, *, layers: int = LAYERS, hidden: int = 16, **more: Any) -> Target:
    """A random Llama with the sizes of ``packs.draft_config``; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=40,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, rope_theta=10000.0, initializer_range=0.3, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return Target(TargetConfig(str(folder), dtype="float32"))


@dataclass(frozen=True, eq=False)
class Exported:
    """A draft and where it was exported to."""

    draft: Eagle3Draft
    vocabulary: VocabularyMapping | None
    folder: Path

    @property
    def config(self) -> DraftConfig:
        return self.draft.config

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.draft.named_parameters()}


def random_draft(config: DraftConfig, target: Target, *, seed: int = 0) -> Eagle3Draft:
    """fp32, norms and biases away from their starting values."""
    torch.manual_seed(seed)
    draft = Eagle3Draft(config)
    draft.initialise()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    if not config.owns_embedding:
        draft.set_embedding(read_embedding(target).float())
    return draft


def export_weights(
    config: DraftConfig, weights: dict[str, torch.Tensor], vocabulary: VocabularyMapping | None, target: Target, folder: Path, **more: Any
) -> ExportReport:
    """``export_draft`` of an EAGLE-3 draft."""
    return export_draft(Draft(config, weights, vocabulary, family=EAGLE3), target, folder, **more)


def export_variant(
    variant: str, target: Target, folder: Path, *, form: Any = "vllm", draft_ids: list[int] | None = None, spread: float = 0.3, **options: Any
) -> Exported:
    """A random draft of a variant, its matrices with a standard deviation of ``spread``, written with ``export_draft``."""
    config = draft_config(**VARIANTS[variant], initializer_range=spread).with_draft_vocabulary(len(draft_ids) if draft_ids else 40)
    draft = random_draft(config, target)
    vocabulary = None if draft_ids is None else VocabularyMapping(torch.tensor(draft_ids), config.vocab_size)
    made = Exported(draft, vocabulary, folder)
    report = export_weights(config, made.weights, vocabulary, target, folder, options=ExportOptions(form=form, **options), training=TRAINED)
    assert report.max_logit_difference == 0.0
    return made


def reload_difference(made: Exported, target: Target) -> float:
    """Largest difference of the logits of three teacher-forced steps between the draft in memory and what ``import_draft`` reads of its export, fp32."""
    again = import_draft(str(made.folder), target)
    reloaded = Eagle3Draft(again.config)
    if not again.config.owns_embedding:
        assert again.embedding is not None
        reloaded.set_embedding(again.embedding.float())
    reloaded.load_state_dict({name: tensor.float() for name, tensor in again.weights.items()}, strict=True)
    batch = pack(made.config, [conversation(made.config, [0] + [1] * 11, 0)], 3, dtype=torch.float32)
    with torch.no_grad():
        logits = [[draft.lm_head(draft.norm(state)) for state in draft(batch)] for draft in (made.draft, reloaded)]
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(*logits, strict=True))
