"""How an EAGLE-3 draft is trained, beside its architecture: ``model.unroll_steps`` and ``model.step_weights``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchspec.errors import UserError


@dataclass(frozen=True)
class UnrollOptions:
    """Training options."""

    unroll_steps: int = 7
    """K, steps trained in a row on the draft's own states."""
    step_weights: list[float] | None = None
    """[K] weight of each step's loss; None means 0.8^k."""

    def __post_init__(self) -> None:
        steps, given = self.unroll_steps, self.step_weights
        if steps < 1:
            raise UserError("model.unroll_steps", steps, "is below 1", "use 1 or more")
        if given is None:
            return
        if len(given) != steps:
            raise UserError("model.step_weights", given, f"has {len(given)} entries for {steps} unroll steps", "give one weight a step")
        if not all(0.0 <= weight < math.inf for weight in given) or not any(given):
            raise UserError("model.step_weights", given, "must be numbers of 0 or more, one of them above", "give such a weight for each unroll step")

    @property
    def weights(self) -> list[float]:
        """[K] weight of each step's loss."""
        return [0.8**k for k in range(self.unroll_steps)] if self.step_weights is None else list(self.step_weights)
