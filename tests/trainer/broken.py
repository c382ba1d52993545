"""Callbacks and loggers of a user that fail, named in configurations of tests here."""

from __future__ import annotations

from enum import Enum
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger


class ProgrammingError(Callback):
    """A mistake in somebody's own code."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise ValueError("a mistake of mine")


class WrongSignature(Callback):
    """Lightning's call of it fails."""

    def on_train_start(self) -> None:  # type: ignore[override]
        """Never reached."""


class Shade(Enum):
    LIGHT = 1
    DARK = 2


THING = object()


class Odd(Callback):
    """Arguments that YAML has no form for."""

    def __init__(self, shade: Any = Shade.DARK, thing: Any = THING, function: Any = len) -> None:
        self.shade, self.thing, self.function = shade, thing, function


class FailsAtTheEnd(CSVLogger):
    def finalize(self, status: str) -> None:
        raise ConnectionError("the server is gone")
