"""The checkpoint that ``--ckpt_path last`` goes on from.

Lightning's ModelCheckpoint with a monitor writes ``last`` only when the monitored metric improves, so a run that is killed would go back to its best
validation, however old. This one keeps the newest state alone, in ``last``, apart from the best; one of each in a configuration.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest state: every so many steps, when training ends, and when it is broken off.

    Args:
        every_n_train_steps: optimizer steps between two.
        dirpath: folder; None means ``checkpoints`` under the run's folder.
    """

    def __init__(self, every_n_train_steps: int = 200, dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, every_n_train_steps=every_n_train_steps, save_top_k=0, save_last=True, save_on_exception=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._should_save_on_exception(trainer):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
