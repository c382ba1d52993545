"""An average of the weights over the course of training, validated, kept and exported in their place.

It stands beside the optimizer's moments: in fp32, sharded as each weight is, saved and restored with them, so that a
resume is exact on any number of ranks and the weights in training stay what they are in every checkpoint.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchspec.errors import DeviceLost, UserError
from torchspec.models.training.averages import KEY
from torchspec.models.training.checkpoint import read_entries


class Average(pl.Callback):
    """After optimizer step n (from ``start`` on) average += (weight - average) / min(n, horizon): the mean of all
    weights at first, an exponential moving average over ``horizon`` steps from then on.

    Args:
        horizon: optimizer steps that it looks back; below 1 a share of the run.
        start: optimizer steps before it begins; below 1 a share of the run.
    """

    averages_weights = True
    """For the rule that one average at a time stands in the weights' place."""

    def __init__(self, horizon: float = 0.1, start: float = 0.0) -> None:
        if not horizon > 0:  # NaN neither
            raise UserError("callbacks.Average.horizon", horizon, "is not above 0", "use steps, or a share of the run below 1")
        if not 0 <= start < math.inf:
            raise UserError("callbacks.Average.start", start, "is no number of steps", "use 0 or more steps, or a share of the run below 1")
        self.horizon, self.start = horizon, start
        self._running = False
        self._saved = False
        """Whether the checkpoint that is resumed from has averages."""
        self._began: int | None = None
        """Optimizer steps done when it began."""
        self._exchanged = False

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        path = getattr(trainer, "resume_path", None)
        saved = read_entries(Path(path)).get("callbacks", {}).get(self.state_key, {}) if path is not None else {}
        self._running, self._saved, self._exchanged = False, saved.get("began") is not None, False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda given, *_: self._after_step(trainer, pl_module, given))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._running = True

    def _steps(self, given: float, trainer: pl.Trainer, pl_module: Any) -> float:
        return given * pl_module.planned_steps() if 0 < given < 1 else given

    @torch.no_grad()
    def _after_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Also called by torch when it makes room for a sharded optimizer's state, before that is read: for what is
        there to be read."""
        if not self._running and not self._saved:
            return
        if self._running and self._began is None:
            if trainer.global_step < int(self._steps(self.start, trainer, pl_module)):
                return
            self._began = trainer.global_step
        seen = trainer.global_step - (self._began or 0) + 1
        weight = 1.0 / min(float(seen), max(1.0, self._steps(self.horizon, trainer, pl_module)))
        for p in _trained(optimizer):
            state = optimizer.state[p]
            if KEY not in state:
                state[KEY] = p.detach().clone()
            elif self._running:
                state[KEY].lerp_(p, weight)

    # -- validation reads the average

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._running and not trainer.sanity_checking and self._began is not None:
            self._exchange(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._exchanged:
            self._exchange(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Before the checkpoint of a run that is broken off, which holds the weights in training."""
        if self._exchanged and not isinstance(exception, DeviceLost):
            self._exchange(trainer, pl_module)

    @torch.no_grad()
    def _exchange(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            for p in _trained(optimizer):
                average: Tensor | None = optimizer.state[p].get(KEY)
                if average is not None:
                    kept = p.detach().clone()
                    p.copy_(average)
                    average.copy_(kept)
        self._exchanged = not self._exchanged
        gathered = getattr(pl_module.task, "reshard", None)
        if gathered is not None:
            gathered()  # fsdp2 keeps whole weights after a forward without a backward: they would be the other ones

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began = state_dict["began"]


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters that the optimizer has stepped."""
    return [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
