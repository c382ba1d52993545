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


class FailsAtStepTwo(CSVLogger):
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step >= 1:  # counted from 0
            raise ConnectionError("the server is gone")


class WandbLogger(CSVLogger):
    """Known by its name, as the package may be missing; its server takes no artifact."""

    _wandb_init: dict[str, Any] = {}

    @property
    def version(self) -> str:
        return "no such run"
