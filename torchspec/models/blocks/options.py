"""How a block draft is trained, beside its architecture: ``model.options`` of the families dflash, dspark and dflash2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torchspec.errors import UserError
from torchspec.models.blocks.weighting import WEIGHTINGS, Weighting


@dataclass(frozen=True)
class BlockOptions:
    """Training options."""

    anchors: int | float = 512
    """Blocks of a conversation and epoch: a number at most, or a share of its candidates (0.3). Drawn anew each epoch; validation takes every candidate."""
    weights: Weighting = "dpace"
    """What each slot of a block weighs: ``dpace`` (what a draft that is as good as now would gain), ``decay`` (exp(-j / gamma)) or ``uniform``."""
    gamma: float = 7.0
    """Of ``decay``; of the losses of confidence and selector in any case. The papers have 7 for 16 slots and 4 for 7 or 8."""
    alpha: float = 0.5
    """Of ``dpace``: the share that does not depend on the draft."""
    label: Literal["data", "argmax"] = "data"
    """What cross-entropy and D-PACE take for right: the token of the text, or the target's most likely one. No other loss reads it."""
    confidence: float = 1.0
    """DSpark: weight of the confidence head's loss."""
    confidence_target: Literal["overlap", "argmax"] = "overlap"
    """DSpark: what confidence learns: the probability that sampling accepts (drafts sampled from the draft), or whether the most likely tokens agree (drafts
    taken greedily, as servers do by default)."""
    selector: float = 1.0
    """DFlash 2: weight of the selector's loss."""

    def __post_init__(self) -> None:
        share = isinstance(self.anchors, float)
        if isinstance(self.anchors, bool) or not 0 < self.anchors <= (1 if share else math.inf):
            raise UserError("model.options.anchors", self.anchors, "is neither a number of 1 or more nor a share up to 1.0", "give for example 512 or 0.3")
        choices = {"weights": WEIGHTINGS, "label": ("data", "argmax"), "confidence_target": ("overlap", "argmax")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"model.options.{name}", getattr(self, name), f"is not one of {', '.join(allowed)}", "choose one of these")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError("model.options.gamma", self.gamma, "is not above 0", "use 7 for 16 slots, 4 for 7 or 8")
        if not 0 < self.alpha <= 1:
            raise UserError("model.options.alpha", self.alpha, "is not in (0, 1]", "use 0.5")
        for name in ("confidence", "selector"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"model.options.{name}", getattr(self, name), "is not a weight of 0 or more", "use 1.0")
