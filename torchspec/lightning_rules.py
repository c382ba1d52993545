"""What of Lightning's a training of a draft refuses, by name, before anything is started (docs/lightning.md has the
whole table).

Each would train another draft than asked for, or lose a checkpoint, without a word: the message says what to use
instead.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from torchspec.errors import UserError
from torchspec.models.training.parallelize import FSDP2Strategy, refuse_fsdp1

_OURS = "torchspec.callbacks.average.Average"
_REFUSED: dict[type[pl.Callback], tuple[str, str]] = {
    BackboneFinetuning: ("needs a module with a backbone, which a draft has not", "take it out"),
    BatchSizeFinder: ("sets a batch size, which the plan has not", "choose data.max_tokens, the tokens of a pack"),
    LearningRateFinder: ("trains on batches out of the plan's order and starts again", "compare short runs (trainer.max_steps) instead"),
    ThroughputMonitor: (
        "wants a count that grows with every batch, and an epoch's last packs may be empty; it also waits for the device",
        "use torchspec.callbacks.pipeline.PipelineMetrics",
    ),
    ModelPruning: (
        "hangs masks on parameters, which the draft's kernels and checkpoints do not know",
        "make the draft smaller by model.draft or torchspec.callbacks.vocabulary.VocabularyPruning",
    ),
    OnExceptionCheckpoint: (
        "saves in the middle of a step, and has the next run go on from what is there without being asked",
        "use torchspec.callbacks.last.LastCheckpoint",
    ),
    SpikeDetection: (
        "compares micro-batches by their share of a step's loss, which differs with their tokens, and ends the run",
        "use trainer.gradient_clip_val, or watch train/loss",
    ),
}


def check_arguments(
    *,
    callbacks: Any,
    enable_checkpointing: bool | None,
    barebones: bool | None,
    default_root_dir: Any,
    strategy: Any,
    precision: Any,
    gradient_clip_val: Any,
    val_check_interval: Any,
    check_val_every_n_epoch: Any,
) -> None:
    """Before the Trainer is made: arguments that contradict each other in a way of which Lightning says something else.

    Raises:
        UserError: by name.
    """
    if strategy is not None:
        refuse_fsdp1(strategy)
    if precision is not None:
        _check_precision(precision)
    if isinstance(gradient_clip_val, int | float) and not gradient_clip_val >= 0:  # Lightning would clip nothing, or make every weight NaN
        raise UserError("trainer.gradient_clip_val", gradient_clip_val, "is no limit of a norm", "use a number above 0, or leave it out")
    for field, value in {"val_check_interval": val_check_interval, "check_val_every_n_epoch": check_val_every_n_epoch}.items():
        if value is not None and value == 0:
            raise UserError(f"trainer.{field}", value, "is no interval", "give 1 or more; trainer.limit_val_batches: 0 validates nothing")
    listed = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    keeps = next((type(callback).__name__ for callback in listed if isinstance(callback, Checkpoint)), None)
    if keeps is not None and (barebones or enable_checkpointing is False):
        field, value = ("trainer.barebones", True) if barebones else ("trainer.enable_checkpointing", False)
        raise UserError(field, value, f"contradicts {keeps} in trainer.callbacks", f"take {keeps} out, or leave {field} out")
    if default_root_dir is not None and "://" in str(default_root_dir):
        problem = "is no folder of this host: logs, tokenised data and drafts are written with plain files"
        raise UserError("trainer.default_root_dir", str(default_root_dir), problem, "give a folder; dirpath of a ModelCheckpoint may be remote")


def check_trainer(trainer: pl.Trainer) -> None:
    """At the start of ``fit`` and ``validate``, before engines are.

    Raises:
        UserError: what is refused, and what to use instead.
    """
    _check_precision(trainer.precision)  # a plugin's
    _check_strategy(trainer.strategy)
    _check_checkpoint_io(trainer.strategy.checkpoint_io)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for kind, (problem, fix) in _REFUSED.items():
            if isinstance(callback, kind):
                raise UserError("trainer.callbacks", type(callback).__name__, problem, fix)
        if isinstance(callback, BaseFinetuning) and trainer.world_size > 1:
            problem = "frees weights while training, whose gradients several ranks would not share: they share those trained from the start"
            raise UserError("trainer.callbacks", type(callback).__name__, problem, "use one device, or two runs with model.start_from")
    _check_averaging(trainer, callbacks)


def _check_precision(precision: Any) -> None:
    if precision not in (32, "32", "32-true"):
        problem = "is not what decides here: masters are fp32 in any case"
        raise UserError("trainer.precision", precision, problem, "leave it out and set model.compute_dtype")


def _check_strategy(strategy: Strategy) -> None:
    name = getattr(strategy, "strategy_name", None) or type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        problem = "would spread one draft's layers over all devices of a node (tensor parallel)"
        raise UserError("trainer.strategy", type(strategy).__name__, problem, "use fsdp2: all devices are data parallel")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        raise UserError("trainer.strategy", name, "is none that checkpoints and the ends of ranks are made for", "use auto, ddp or fsdp2")
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        problem = "forks or spawns its ranks out of this process, which owns the engines"
        raise UserError("trainer.strategy", getattr(strategy, "_start_method", name), problem, "use ddp, which starts each rank as a program")


def _check_checkpoint_io(plugin: Any) -> None:
    while plugin is not None:
        if isinstance(plugin, AsyncCheckpointIO):
            problem = "says that a checkpoint is saved before it is: none could be put in place whole"
            raise UserError("trainer.plugins", type(plugin).__name__, problem, "take it out; a draft's checkpoint is written in seconds")
        plugin = getattr(plugin, "_checkpoint_io", None)  # of a wrapping one


def _check_averaging(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """One average at a time, of whole weights, and for Lightning's older one only where whole epochs decide."""
    found = [callback for callback in callbacks if isinstance(callback, WeightAveraging | StochasticWeightAveraging)]
    averages = [*found, *(callback for callback in callbacks if callback not in found and getattr(callback, "averages_weights", False))]
    if len(averages) > 1:
        names = ", ".join(type(callback).__name__ for callback in averages)
        raise UserError("trainer.callbacks", names, "would each put its own average in the draft's place", "keep one")
    if not found:
        return
    name = type(found[0]).__name__
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError("trainer.callbacks", name, "does not average sharded weights (trainer.strategy: fsdp2)", f"use {_OURS}, or strategy ddp")
    if isinstance(found[0], StochasticWeightAveraging) and (trainer.max_steps != -1 or not (trainer.max_epochs or 0) > 0):
        problem = f"counts whole epochs up to trainer.max_epochs, and the run has max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
        raise UserError("trainer.callbacks", name, problem, "set max_epochs alone, or use lightning.pytorch.callbacks.EMAWeightAveraging")
