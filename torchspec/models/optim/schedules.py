"""Learning-rate schedules: constant, linear, cosine and warmup-stable-decay (WSD), one factor function each.

All share the warm-up: step s (from 0) of ``warmup`` steps runs at (s + 1) / (warmup + 1) of the peak, so that no step runs at 0. ``total_steps`` may stay
empty: ``DraftModule`` fills in the number of optimizer steps of the run, and a resume for another number of steps goes on along the curve of that length.
WSD: Hu et al., MiniCPM, arXiv 2404.06395, section 4.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchspec.errors import UserError

_SAME = "resume with the configuration of the checkpoint, or start a new run from its weights with model.start_from"


class Schedule(LRScheduler):
    """Peak learning rate times :meth:`factor`.

    Args:
        optimizer: holds the peak rate of each group.
        warmup_steps: optimizer steps of the linear rise; a value below 1 is a share of ``total_steps``.
        total_steps: optimizer steps of the run; None takes the trainer's.
        final: share of the peak that is left at the end.
    """

    _SHAPE: tuple[str, ...] = ("warmup_steps", "final", "base_lrs")
    """What a resumed run must have as the checkpoint has it."""

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.0, total_steps: int | None = None, final: float = 0.0) -> None:
        if not 0 <= warmup_steps < math.inf:
            raise UserError("lr_scheduler.warmup_steps", warmup_steps, "is no number of steps", "use 0 or more, or a share of the run below 1")
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
            self._apply()

    def _apply(self) -> None:
        """Give the optimizer the rates of the step that comes next."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step. The length stays this run's: where it differs from the saved one, the rest of the run follows the new curve.

        Raises:
            UserError: another shape or peak rate than the saved one.
        """
        for name in self._SHAPE:
            saved, ours = state_dict.get(name), getattr(self, name)
            if saved != ours:
                raise UserError(f"ckpt_path (lr_scheduler, {name})", saved, f"differs from this run's {ours}", _SAME)
        total, rates = self.total_steps, state_dict["_last_lr"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "total_steps"})
        if total is not None and total != state_dict["total_steps"]:
            self._apply()
            change = f"{state_dict['total_steps']} of the checkpoint: learning rate {_shown(self._last_lr)} instead of {_shown(rates)}"
            rank_zero_info(f"the schedule goes over {total} optimizer steps from here on, not the {change} at step {self.last_epoch + 1}")

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
    """Warm-up, then the peak to the end: ``final`` has no meaning here."""

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.0, total_steps: int | None = None, final: float = 0.0) -> None:
        if final:
            raise UserError("lr_scheduler.final", final, "has no meaning for Constant, which stays at the peak", "leave it out, or use Linear or Cosine")
        super().__init__(optimizer, warmup_steps, total_steps, final)

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

    _SHAPE = (*Schedule._SHAPE, "decay")

    def __init__(self, optimizer: Optimizer, warmup_steps: float = 0.0, total_steps: int | None = None, final: float = 0.0, decay: float = 0.2) -> None:
        if not 0.0 < decay <= 1.0:
            raise UserError("lr_scheduler.decay", decay, "is no share of the run", "use a number above 0, up to 1")
        self.decay = decay
        super().__init__(optimizer, warmup_steps, total_steps, final)

    def factor(self, progress: float) -> float:
        into = max(0.0, (progress - (1.0 - self.decay)) / self.decay)
        return 1.0 - (1.0 - self.final) * into


def _shown(rates: Sequence[float | Tensor]) -> str:
    """Learning rates for a log line, each different one once."""
    return ", ".join(dict.fromkeys(f"{float(rate):.3g}" for rate in rates))
