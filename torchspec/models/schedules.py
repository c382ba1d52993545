"""Learning-rate schedules: constant, linear, cosine and warmup-stable-decay (WSD), one factor function each.

All share the warm-up: step s (from 0) of ``warmup`` steps runs at (s + 1) / (warmup + 1) of the peak, so that no step runs at 0. ``total_steps`` may stay
empty: ``DraftModule`` fills in the number of optimizer steps of the run. WSD: Hu et al., MiniCPM, arXiv 2404.06395, section 4.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchspec.errors import UserError


class Schedule(LRScheduler):
    """Peak learning rate times :meth:`factor`.

    Args:
        optimizer: holds the peak rate of each group.
        warmup_steps: optimizer steps of the linear rise; a value below 1 is a share of ``total_steps``.
        total_steps: optimizer steps of the run; None takes the trainer's.
        final: share of the peak that is left at the end.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.0, total_steps: int | None = None, final: float = 0.0) -> None:
        if warmup_steps < 0:
            raise UserError("lr_scheduler.warmup_steps", warmup_steps, "is negative", "use 0 or more")
        if not 0.0 <= final <= 1.0:
            raise UserError("lr_scheduler.final", final, "is no share of the peak", "use a number from 0 to 1")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final = final
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Give the length of the run where the user did not, and set the first step's rate anew."""
        if self.total_steps is None:
            self.total_steps = total_steps
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        total = max(self.total_steps or 1, 1)
        warmup = self.warmup_steps * total if 0 < self.warmup_steps < 1 else self.warmup_steps
        warmup = min(int(warmup), total)
        step = self.last_epoch
        rise = min(1.0, (step + 1) / (warmup + 1))
        progress = min(1.0, max(0.0, (step - warmup) / max(total - warmup, 1)))
        return [base * rise * self.factor(progress) for base in self.base_lrs]

    @abstractmethod
    def factor(self, progress: float) -> float:
        """Share of the peak after ``progress`` (0 to 1) of the steps that follow the warm-up."""


class Constant(Schedule):
    """Warm-up, then the peak to the end."""

    def factor(self, progress: float) -> float:
        return 1.0


class Linear(Schedule):
    """Warm-up, then a straight line down to ``final``."""

    def factor(self, progress: float) -> float:
        return self.final + (1.0 - self.final) * (1.0 - progress)


class Cosine(Schedule):
    """Warm-up, then half a cosine down to ``final``."""

    def factor(self, progress: float) -> float:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WSD(Schedule):
    """Warm-up, the peak, then a straight line down to ``final`` over the last ``decay`` share of the run.

    Args:
        decay: share of the steps after the warm-up that decay.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.0, total_steps: int | None = None, final: float = 0.0, decay: float = 0.2) -> None:
        if not 0.0 < decay <= 1.0:
            raise UserError("lr_scheduler.decay", decay, "is no share of the run", "use a number above 0, up to 1")
        self.decay = decay
        super().__init__(optimizer, warmup_steps, total_steps, final)

    def factor(self, progress: float) -> float:
        into = max(0.0, (progress - (1.0 - self.decay)) / self.decay)
        return 1.0 - (1.0 - self.final) * into
