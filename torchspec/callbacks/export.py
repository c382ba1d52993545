"""Export of the finished draft at the end of ``fit``: a directory that a server reads as it is, self-checked (``models/export/export.py``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.errors import UserError
from torchspec.files import refuse_foreign
from torchspec.folders import check_output
from torchspec.models.export.export import ExportOptions, export_checkpoint
from torchspec.models.training.checkpoint import is_ours
from torchspec.paths import home
from torchspec.reasons import reason_of
from torchspec.target import Dtype

log = logging.getLogger(__name__)


class ExportDraft(pl.Callback):
    """Write the draft for a server when training ends.

    Args:
        directory: where it goes; None means ``draft`` under the run's folder.
        which: the ``best`` checkpoint by the monitored metric, or the ``last`` state of the weights.
        dtype: type of the tensors; auto takes the target's.
        format: whose format: vllm, speculators or sglang.
        target_name: hub id to name the target by, where it is a local copy.
        log_artifact: also log the directory as an artifact when a W&B logger is in use.
    """

    def __init__(
        self,
        directory: str | None = None,
        which: Literal["best", "last"] = "last",
        dtype: Dtype = "auto",
        format: Literal["vllm", "speculators", "sglang"] = "vllm",
        target_name: str | None = None,
        log_artifact: bool = True,
    ) -> None:
        self.directory = directory
        self.which = which
        self.options = ExportOptions(form=format, dtype=dtype, target_name=target_name)
        self.log_artifact = log_artifact

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if self.which == "best" and self._best(trainer) is None:
            raise UserError(
                "callbacks.ExportDraft.which", "best", "needs a ModelCheckpoint with a monitor", "add one, for example of val/acceptance_length, or use last"
            )

        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._refuse_early(trainer, pl_module)

    def _refuse_early(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say before training, on every rank, that the draft would have to take the place of something else."""
        said: tuple[Any, ...] | None = None
        if trainer.is_global_zero:
            start = getattr(pl_module, "start", None)
            try:
                check_output(self.folder(trainer), field="callbacks.ExportDraft.directory", reads=None if start is None else Path(home(start.source)))
                if not is_ours(self._kept(trainer)):
                    refuse_foreign(self._kept(trainer), is_ours, field="trainer.default_root_dir", what="checkpoint")
            except UserError as error:
                said = error.field, error.value, error.problem, error.fix
        said = trainer.strategy.broadcast(said)
        if said is not None:
            raise UserError(*said)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run or trainer.global_step == 0:  # type: ignore[attr-defined]
            return
        checkpoint = self._checkpoint(trainer)
        if trainer.is_global_zero:
            directory = self.folder(trainer)
            report = export_checkpoint(checkpoint, pl_module.target, directory, options=self.options)
            rank_zero_info(f"draft exported to {report}")
            if self.log_artifact:
                try:
                    self._log(trainer, directory)
                except Exception as error:  # the draft is there; a logger must not lose the run its end
                    log.warning("the draft is in %s, but is not logged as an artifact: %s", directory, reason_of(error))
        trainer.strategy.barrier("export")

    def _checkpoint(self, trainer: pl.Trainer) -> Path:
        best = self._best(trainer) if self.which == "best" else None
        if best is not None and best.best_model_path:
            rank_zero_info(f"best by {best.monitor}: {best.best_model_path}")
            return Path(best.best_model_path)
        if best is not None:
            log.warning("callbacks.ExportDraft.which=best: %s of this run was never validated, so the last state is exported", best.monitor)
        path = self._kept(trainer)
        trainer.save_checkpoint(path, weights_only=True)  # every rank: a sharded save is collective
        return path

    @staticmethod
    def _kept(trainer: pl.Trainer) -> Path:
        """The weights that were exported, to export them again."""
        return Path(trainer.default_root_dir) / "export.ckpt"

    @staticmethod
    def _best(trainer: pl.Trainer) -> ModelCheckpoint | None:
        """The callback that keeps the best checkpoint."""
        return next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None), None)

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the draft of this run goes."""
        return Path(home(self.directory) if self.directory else Path(trainer.default_root_dir) / "draft")

    @staticmethod
    def _log(trainer: pl.Trainer, directory: Path) -> None:
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            if type(logger).__name__ == "WandbLogger":
                import wandb

                artifact = wandb.Artifact(name=f"draft-{logger.version}", type="model")
                artifact.add_dir(str(directory))
                logger.experiment.log_artifact(artifact)
