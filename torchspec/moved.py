"""Names that configurations of before may hold and that do not exist any more: refused with what to write instead."""

from __future__ import annotations

import re
from typing import Any

from torchspec.errors import Shown, UserError

_NOT_KNOWN = Shown("...")
_ASKED = "is asked of the model and is no option any more"
OPTIONS: dict[str, tuple[str, str]] = {
    "data.unroll_steps": (_ASKED, "leave it out; model.unroll_steps says it"),
    "data.aux_layers": (_ASKED, "leave it out; model.aux_layers says it"),
}
"""Option → what became of it, and the fix."""
CLASSES: dict[str, str] = {
    "torchspec.models.muon.MuonAdamW": "torchspec.models.optim.muon.MuonAdamW",
    **{f"torchspec.models.schedules.{name}": f"torchspec.models.optim.schedules.{name}" for name in ("Constant", "Linear", "Cosine", "WSD")},
}
"""Class that a ``class_path`` may name → where it is now."""


def moved(said: str, value: Any = _NOT_KNOWN) -> UserError | None:
    """The error for an option or a class of before that is named in the complaint of a parser, or None.

    Args:
        said: by the parser, or the name alone.
        value: that the option was given, where it is known.
    """
    for name, (problem, fix) in OPTIONS.items():
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", said):
            return UserError(name, value, problem, fix)
    old = next((old for old in CLASSES if re.search(rf"(?<![\w.]){re.escape(old)}(?!\w)", said)), None)
    return None if old is None else UserError("class_path", old, "has moved", f"write {CLASSES[old]}")
