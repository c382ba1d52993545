"""Vocabulary pruning: the draft's head covers the W tokens that the target's answers use most.

The mapping is counted once over the supervised tokens of the training set, goes into every checkpoint, and comes from the checkpoint on resume: it is never
recomputed over a
trained head. A smaller head is most of the draft's cost; tokens outside it count as misses in accuracy and acceptance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.errors import UserError
from torchspec.models.training.checkpoint import read_facts
from torchspec.models.vocabulary import VocabularyMapping


class VocabularyPruning(pl.Callback):
    """Prune the draft's vocabulary before the model is built.

    Args:
        size: W, rows of the draft's head.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError("callbacks.VocabularyPruning.size", size, "is below 1", "use the number of tokens to keep, for example 32000")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.choose_vocabulary(trainer, pl_module)

    def choose_vocabulary(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Give the module its vocabulary. It asks for it itself when it builds the draft, which another callback's ``setup`` may have it do first.

        Raises:
            UserError: the draft that is there, or that training starts or resumes from, has another number of tokens.
        """
        if pl_module.task is not None:
            built = pl_module.draft_config.draft_vocab_size
            if built != self.size:
                _refuse(self.size, built, "the draft that was built before")
            return
        if pl_module.vocabulary is not None:  # of model.start_from
            if pl_module.vocabulary.size != self.size:
                _refuse(self.size, pl_module.vocabulary.size, "the draft that training starts from")
            return
        total = pl_module.target.vocab_size
        if self.size > total:
            raise UserError(
                "callbacks.VocabularyPruning.size", self.size, f"is larger than the target's vocabulary of {total}", "lower it, or drop the callback"
            )
        path = getattr(trainer, "resume_path", None)
        if path is not None:
            ids = read_facts(Path(path))["draft_ids"]
            saved = total if ids is None else len(ids)
            if saved != self.size:
                _refuse(self.size, saved, path)
            pl_module.vocabulary = None if ids is None else VocabularyMapping(draft_ids=ids, target_size=total)
            return
        counts = trainer.datamodule.token_counts()  # type: ignore[attr-defined]
        mapping = VocabularyMapping.from_counts(counts, self.size, always=trainer.datamodule.special_end_ids())  # type: ignore[attr-defined]
        pl_module.vocabulary = mapping
        rank_zero_info(f"draft vocabulary: {self.size} of {total} tokens, covering {mapping.coverage(counts):.2%} of the supervised tokens")


def _refuse(size: int, saved: int, source: str) -> None:
    raise UserError("callbacks.VocabularyPruning.size", size, f"differs from the {saved} tokens of {source}", f"use {saved}, or start a new run without it")
