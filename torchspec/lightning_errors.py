"""Errors of Lightning, of a logger or of the command line's classes that a user can mend, as one line.

What counts is who raised it: a ``raise`` of Lightning's own code, reached through nothing but Lightning, the command
line and this package, is about the configuration. Anything that a user's own code takes part in, and any call that
fails without a ``raise`` of Lightning's, keeps its traceback.
"""

from __future__ import annotations

import dis
import importlib.util
import re
from types import TracebackType

from torchspec.errors import UserError
from torchspec.reasons import missing_package, reason_of

_LIGHTNING = ("lightning", "lightning_utilities")
_NO_USERS_CODE = (*_LIGHTNING, "torchspec", "jsonargparse", "torch", "contextlib", "functools", "importlib", "typing", "__main__", "wandb", "main")
"""Packages whose frames may be on the way to an error; ``__main__`` is main.py."""
_FILES = ("fsspec", "os", "pathlib", "shutil", "csv")
"""Packages that a logger writes its files with."""
_PACKAGES = {"comet_ml": "comet-ml", "neptune": "neptune", "tensorboard": "tensorboard", "tensorboardx": "tensorboard", "bitsandbytes": "bitsandbytes"}
"""What to install for a module whose package has another name, or of which Lightning names several."""
_LOGGERS = {
    "CometLogger": "comet_ml",
    "LitLogger": "litlogger",
    "MLFlowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
}
"""The module that each of Lightning's loggers imports."""


class ConfigurationRefused(UserError):
    """What Lightning, or a package that it uses, says of the configuration.

    Args:
        said: its words.
        fix: an imperative clause; None where the words say what to do.
    """

    def __init__(self, said: str, fix: str | None = None) -> None:
        ValueError.__init__(self, said if fix is None else f"{said.rstrip('.')}. Fix: {fix}.")
        self.field, self.value, self.problem, self.fix, self.shown = "trainer", None, said, fix or "", ""

    def __reduce__(self) -> tuple[type[ConfigurationRefused], tuple[str, str | None]]:
        return type(self), (self.problem, self.fix or None)


def mendable(error: BaseException) -> ConfigurationRefused | None:
    """The same in one line, where an error is about what the user configured; None for any other."""
    frames = _frames(error.__traceback__)
    if isinstance(error, OSError) and (refused := _unwritable(error, frames)) is not None:
        return refused
    if not frames or not all(_package(frame) in _NO_USERS_CODE for frame in frames):
        return None
    if error.__cause__ is not None and _package(frames[-1]) == "jsonargparse":
        return mendable(error.__cause__)  # what a class said that the command line was making
    package, kind = _package(frames[-1]), type(error)
    if kind.__module__.startswith("wandb.") and isinstance(error, Exception):
        return ConfigurationRefused(f"W&B: {reason_of(error)}", "log in (wandb login), set WANDB_MODE=offline, or use another trainer.logger")
    module = str(frames[-1].tb_frame.f_globals.get("__name__"))
    if module.startswith("torch.optim") and (kind is ZeroDivisionError or (kind in (ValueError, TypeError, RuntimeError) and _raised(frames[-1]))):
        whose = "trainer.callbacks" if module.endswith(".swa_utils") else "model.optimizer or model.lr_scheduler"
        return ConfigurationRefused(f"{whose}: {reason_of(error)}")
    if package not in _LIGHTNING or not _raised(frames[-1]):
        return None
    if isinstance(error, ImportError):
        return _missing(error)
    if kind.__name__ == "MisconfigurationException" or kind in (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, AttributeError):
        return ConfigurationRefused(f"Lightning: {reason_of(error)}")
    return None


def _unwritable(error: OSError, frames: list[TracebackType]) -> ConfigurationRefused | None:
    """Of a logger or profiler of Lightning's whose folder takes no files."""
    if error.filename is None or not all(_package(frame) in (*_NO_USERS_CODE, *_FILES) for frame in frames):
        return None
    last = next((frame for frame in reversed(frames) if _package(frame) in _LIGHTNING), None)
    kind = None if last is None else next((kind for kind in ("logger", "profiler") if f".{kind}s." in str(last.tb_frame.f_globals.get("__name__"))), None)
    if kind is None:
        return None
    return ConfigurationRefused(f"trainer.{kind}: {error.filename} cannot be written ({error.strerror})", f"give the {kind} another folder")


def missing_logger(said: str) -> ConfigurationRefused | None:
    """The same for an error of the command line that only says that it cannot make a logger of Lightning's.

    Args:
        said: by the command line.
    """
    for name, module in _LOGGERS.items():
        if f"lightning.pytorch.loggers.{name}" in said and importlib.util.find_spec(module) is None:
            return _install(_PACKAGES.get(module, module), there=False)
    return None


def _missing(error: ImportError) -> ConfigurationRefused:
    """With the line that installs it."""
    said = " ".join(str(error).split())
    quoted = re.search(r"pip install (?:-U )?['\"]?([A-Za-z0-9_.-]+)", said) or re.search(r"[`'\"]([A-Za-z][A-Za-z0-9_.-]*)", said)
    name = missing_package(error) or (quoted.group(1) if quoted is not None else None)
    if name is None:
        return ConfigurationRefused(f"Lightning: {said}")
    module = name.lower().replace("-", "_")
    package = _PACKAGES.get(module, name)
    return _install(package, there=module.isidentifier() and importlib.util.find_spec(module) is not None)


def _install(package: str, *, there: bool) -> ConfigurationRefused:
    what = f"the package {package} is {'too old' if there else 'not installed'}"
    return ConfigurationRefused(f"{what}, which this configuration needs", f"pip install {'-U ' if there else ''}{package}, or choose another in trainer")


def _frames(traceback: TracebackType | None) -> list[TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _package(at: TracebackType) -> str:
    return str(at.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _raised(at: TracebackType) -> bool:
    """Whether a frame ended in a ``raise`` of its own, and not in a call that failed."""
    return dis.opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"
