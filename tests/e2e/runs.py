"""Start ``main.py`` as a user does, on a tiny target, and look at what it leaves behind."""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.tiny import save_conversations, save_target

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


STARTED: list[subprocess.Popen[str]] = []
"""Every run of the test that is going on; ``conftest.py`` ends those that it left behind."""


def config(folder: Path, target: Path | str, train: Path | str, validate: Path | str | dict[str, str] | None, **changes: Any) -> Path:
    """A small run's YAML under ``folder``; ``changes`` are dotted keys with ``__`` for dots."""
    described: dict[str, Any] = {
        "seed_everything": 1,
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": "metrics", "version": "csv"}},
            "callbacks": [
                {"class_path": "torchspec.callbacks.provenance.Provenance"},
                {"class_path": "torchspec.callbacks.vocabulary.VocabularyPruning", "init_args": {"size": 128}},
                {"class_path": "torchspec.callbacks.acceptance.AcceptanceLength", "init_args": {"num_speculative_tokens": 3}},
                {"class_path": "torchspec.callbacks.pipeline.PipelineMetrics"},
                {"class_path": "torchspec.callbacks.export.ExportDraft"},
                {"class_path": "torchspec.callbacks.last.LastCheckpoint", "init_args": {"every_n_train_steps": 2}},
            ],
        },
        "data": {
            "target": {"path": str(target)},
            "train": str(train),
            "validate": validate if isinstance(validate, dict) or validate is None else str(validate),
            "max_length": 128,
            "max_tokens": 256,
            "packs_per_step": 2,
            "cache_dir": str(folder / "cache"),
            "engine": "transformers",
            "engines": {"deterministic": True, "threads": 1},
            "store": {"kind": "shm", "budget": "32MiB", "shm_dir": str(folder / "shm")},
        },
        "model": {
            "unroll_steps": 3,
            "compute_dtype": "fp32",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
            "lr_scheduler": {"class_path": "torchspec.models.optim.schedules.Cosine", "init_args": {"warmup_steps": 0.1}},
        },
    }
    for dotted, value in changes.items():
        at = described
        *parents, last = dotted.split("__")
        for name in parents:
            at = at[name]
        at[last] = value
    (folder / "shm").mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(described))
    return file


def save_world(folder: Path, *, train: int, validate: int) -> dict[str, Path]:
    """A tiny target and so many rows of training and validation data, by the names that :func:`make` takes."""
    return {
        "target": save_target(folder / "target"),
        "train": save_conversations(folder / "train.jsonl", train),
        "validate": save_conversations(folder / "validate.jsonl", validate, seed=1),
    }


def make(folder: Path, world: dict[str, Path], **changes: Any) -> Path:
    """:func:`config` in a world."""
    return config(folder, world["target"], world["train"], world["validate"], **changes)


def start(*words: str, file_size: int | None = None) -> subprocess.Popen[str]:
    """``python main.py WORDS``, in its own session so that a test can signal it as a terminal would.

    Args:
        words: of the command line.
        file_size: bytes beyond which a write fails, as on a disk without room.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before if file_size is None else file_size, most))  # which a new process inherits
    try:
        process = subprocess.Popen(
            [PYTHON, str(ROOT / "main.py"), *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    STARTED.append(process)
    return process


def run(*words: str, timeout: float = 240, file_size: int | None = None) -> tuple[int, str]:
    """Exit code and output of a whole run; arguments are those of :func:`start`, and seconds that it has."""
    process = start(*words, file_size=file_size)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout} s:\n{output[-4000:]}") from None
    return process.returncode, output


def wait_for(condition: Any, *, timeout: float, what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Poll a condition of the outside world (files, processes)."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(
                f"the run ended with {process.returncode} while waiting for {what}:\n{(process.stdout.read() if process.stdout else '')[-4000:]}"
            )
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout} s")
        time.sleep(0.05)


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below ``pid``, also those in sessions of their own."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def engine_workers(pid: int) -> list[psutil.Process]:
    """Engine workers below ``pid`` that run now (a process may end while it is looked at)."""
    found = []
    for process in descendants(pid):
        try:
            if "torchspec.engines.worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def store_files(folder: Path) -> list[str]:
    """What the run's store has left."""
    return sorted(path.name for path in (folder / "shm").iterdir())


def metrics(folder: Path, column: str) -> list[float]:
    """A column of the run's CSV log, in order."""
    with (folder / "metrics" / "csv" / "metrics.csv").open() as handle:
        return [float(row[column]) for row in csv.DictReader(handle) if row.get(column)]
