"""On-policy training with a speculating answerer (``data.on_policy.answer_workers``): hands it the draft in training, now and then.

The engine that answers the training prompts drafts with what was learned so far, so answers come faster as training goes on, and their acceptance
(``pipeline/answer_acceptance_length``) is that of serving, on fresh answers, over the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from torchspec.errors import UserError
from torchspec.files import is_replaceable
from torchspec.folders import in_the_way, remove
from torchspec.models.export.export import export_checkpoint
from torchspec.models.training.checkpoint import is_ours, recover
from torchspec.models.training.checkpoint import remove as remove_checkpoint


class ServeDraft(pl.Callback):
    """Export the draft when training starts and every so many optimizer steps, and tell the workers that answer.

    Drafts go to ``serve/`` under the run's folder, which those workers must see; the newest two stay.

    Args:
        every_n_steps: optimizer steps between two drafts.
    """

    serves_draft = True

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise UserError("callbacks.ServeDraft.every_n_steps", every_n_steps, "is below 1", "use 1 or more")
        self.every_n_steps = every_n_steps
        self._client: Any | None = None
        self._served: int | None = None
        self._proposed = 1
        self._kept: list[Path] = []
        """Drafts of this process that are on disk, in the order they were served."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        policy = trainer.datamodule.corpus.on_policy  # type: ignore[attr-defined]
        if stage == "fit" and (policy is None or not policy.answer_workers):
            raise UserError("data.on_policy.answer_workers", 0, "leaves nobody to serve the draft", "set it to 1 or more, or take ServeDraft out")
        if policy is not None:
            self._proposed = int(policy.num_speculative_tokens)
            pl_module.refuse_proposals(self._proposed, field="data.on_policy.num_speculative_tokens")
        horizon = pl_module.supervision("train").horizon
        if stage == "fit" and policy is not None and policy.num_speculative_tokens > horizon:
            rank_zero_warn(
                f"data.on_policy.num_speculative_tokens: {policy.num_speculative_tokens} tokens are proposed of a draft that trains {horizon}: "
                "later ones are accepted less than a draft trained for them would have it"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:  # of an earlier run in this folder: its step numbers say nothing of which is newer
            recover(_folder(trainer))
            for old in _folder(trainer).glob("step-*"):
                _remove(old)
        self._kept.clear()
        trainer.strategy.barrier("serve-draft")  # a rank must not write into what is being removed
        self._serve(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._served:
            self._serve(trainer, pl_module)

    def _serve(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._served = step = trainer.global_step
        folder = _folder(trainer)
        checkpoint = folder / f"step-{step}.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=True)  # every rank: a sharded save is collective
        if trainer.is_global_zero:
            draft = _free(folder / f"step-{step}")
            export_checkpoint(checkpoint, pl_module.target, draft)
            _remove(checkpoint)
            if self._client is None:
                self._client = trainer.datamodule.connect("serve-draft")  # type: ignore[attr-defined]
            self._client.new_draft(str(draft), step, pl_module.family.speculative(str(draft), self._proposed))
            self._kept.append(draft)
            while len(self._kept) > 2:
                _remove(self._kept.pop(0))

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _folder(trainer: pl.Trainer) -> Path:
    """Where the drafts of a run go."""
    return Path(trainer.default_root_dir).resolve() / "serve"


def _free(draft: Path) -> Path:
    """A name under which nothing of somebody else's stands."""
    found, number = draft, 0
    while (found.exists() and not found.is_dir()) or in_the_way(found):
        number += 1
        found = draft.with_name(f"{draft.name}-{number}")
    return found


def _remove(path: Path) -> None:
    """Remove a draft or a checkpoint of a run; anything else of such a name stays."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix == ".ckpt":
            if is_ours(path):
                remove_checkpoint(path)
        else:
            remove(path)
    elif path.suffix == ".ckpt" and is_replaceable(path, is_ours):
        path.unlink(missing_ok=True)
