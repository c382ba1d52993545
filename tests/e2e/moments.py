"""A callback for tests: writes down every micro-batch that a rank trains, and at a moment chosen beforehand kills the whole run with SIGKILL, or sends a rank
another signal."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import psutil

Moment = Literal["accumulation", "validation", "epoch", "save", "setup", "never"]


class Witness(pl.Callback):
    """See the module.

    Args:
        folder: for ``rank-N.jsonl``.
        moment: ``accumulation``, between two micro-batches of the optimizer step after ``at``; ``validation``, before its second batch, once ``at`` steps are
            done; ``epoch``, when epoch ``at`` (from 0) begins; ``save``, inside the first checkpoint after ``at`` steps; ``setup``; ``never``.
        at: see there.
        rank: that acts.
        number: of the signal it sends itself; 9 kills all processes of the run.
    """

    def __init__(
        self,
        folder: str,
        moment: Literal["accumulation", "validation", "epoch", "save", "setup", "never"] = "never",
        at: int = 0,
        rank: int = 0,
        number: int = 9,
    ) -> None:
        self.folder, self.moment, self.at, self.rank, self.number = Path(folder), moment, at, rank, number

    def _kill(self, trainer: pl.Trainer, moment: str) -> None:
        if moment != self.moment or trainer.global_rank != self.rank:
            return
        self.moment = "never"
        if self.number == signal.SIGKILL:
            for process in psutil.Process().children(recursive=True):
                process.kill()
        (self.folder / "signalled").touch()
        os.kill(os.getpid(), self.number)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step >= self.at:
            self._kill(trainer, "save")

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._kill(trainer, "setup")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.at:
            self._kill(trainer, "epoch")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at and batch_idx % trainer.accumulate_grad_batches == 1:
            self._kill(trainer, "accumulation")
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as notes:
            notes.write(json.dumps({"step": trainer.global_step, "pack": batch.pack_index, "samples": list(batch.sample_ids)}) + "\n")

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 1 and trainer.global_step >= self.at:
            self._kill(trainer, "validation")


def trained(folder: Path) -> dict[int, list[tuple[int, tuple[int, ...]]]]:
    """Of each optimizer step (by the number of those before it) the packs of all ranks with their samples, in plan order; takes the notes away."""
    steps: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for file in folder.glob("rank-*.jsonl"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).append((entry["pack"], tuple(entry["samples"])))
        file.unlink()
    return {step: sorted(packs) for step, packs in sorted(steps.items())}
