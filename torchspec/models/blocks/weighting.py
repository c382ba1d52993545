"""What each slot of a block weighs in the loss.

    uniform   1
    decay     exp(-(j-1) / gamma)                                   j = 1..K (DFlash, arXiv 2602.06036)
    dpace     sum_{i >= j, supervised} prod_{l <= i} s_l            s = (1 - alpha) c + alpha, c = exp(-CE of the label), detached (arXiv 2605.18810)

The loss of a step is divided by its blocks times the sum of the slots' weights (``dpace``: times K): known from the plan alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["dpace", "decay", "uniform"]
WEIGHTINGS: tuple[Weighting, ...] = ("dpace", "decay", "uniform")


def fixed_weights(kind: Weighting, horizon: int, gamma: float) -> list[float]:
    """[K] weights that do not depend on the draft: those of ``decay``, or 1. What ``dpace`` does not weigh (confidence, selector) has the decay's."""
    if kind == "uniform":
        return [1.0] * horizon
    return [float(weight) for weight in torch.exp(-torch.arange(horizon, dtype=torch.float64) / gamma)]


def normaliser(kind: Weighting, horizon: int, gamma: float) -> float:
    """What the weighted losses of a block are divided by."""
    return float(horizon) if kind == "dpace" else sum(fixed_weights(kind, horizon, gamma))


def dpace(right: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """D-PACE weights.

    Args:
        right: [B, K] probability of each slot's label.
        supervised: [B, K] bool, the first slots of each block.
        alpha: share that does not depend on the draft.

    Returns:
        [B, K], 0 where nothing is supervised.
    """
    smooth = torch.where(supervised, (1 - alpha) * right + alpha, 1.0)
    so_far = torch.where(supervised, smooth.cumprod(1), 0.0)
    return torch.where(supervised, so_far.flip(1).cumsum(1).flip(1), 0.0)
