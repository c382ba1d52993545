"""The checkpoint that ``--ckpt_path last`` goes on from.

Lightning's ModelCheckpoint with a monitor writes ``last`` only when the monitored metric improves, so a run that is killed would go back to its best
validation, however old. This one keeps the newest state alone, in ``last``, apart from the best; one of each in a configuration.

What it takes the place of is whole, so what it writes must be: nothing before training has begun (a resume that fails has restored a part of its state),
nothing while an optimizer step is under way (weights may have moved, the counters and the schedule not yet), and (as no checkpoint of ours does, see
``models/training/numbers.py``) no weights that are not numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from torchspec.errors import UserError

log = logging.getLogger(__name__)


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest state: every so many steps, when training ends, and when it is broken off between two optimizer steps.

    Args:
        every_n_train_steps: optimizer steps between two.
        dirpath: folder; None means ``checkpoints`` under the run's folder.
    """

    whole = False
    """Whether the trainer's state is that after a number of optimizer steps."""

    def __init__(self, every_n_train_steps: int = 200, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            save_top_k=0,
            save_last=True,
            save_on_exception=True,
            enable_version_counter=False,  # an earlier run's is replaced: two beside each other would leave the older one with the name
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # what was restored is on disk
        self.whole = True

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.whole = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.whole = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not self._should_save_on_exception(trainer):
            return
        try:
            self._save(trainer)
        except UserError as failed:
            log.warning("no checkpoint of this moment: %s", failed)  # what ended the run is the error to be told

    def _save(self, trainer: pl.Trainer) -> None:
        if self.whole and trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
