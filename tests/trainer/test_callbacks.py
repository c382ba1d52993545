"""Every callback of Lightning's: it works beside ours, or is refused by name before anything starts
(docs/lightning.md)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as known
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger

from tests.trainer.world import equal, fit, weights
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_callback_is_in_the_table() -> None:
    table = (ROOT / "docs" / "lightning.md").read_text()
    assert [name for name in [*known.__all__, "SpikeDetection"] if f"`{name}`" not in table] == []


def test_callbacks_that_work_beside_ours(world: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    theirs = [
        DeviceStatsMonitor(),
        EarlyStopping("val/loss"),
        LambdaCallback(on_train_start=lambda *_: said.append("start")),
        LearningRateMonitor(),
        ModelCheckpoint(monitor="val/loss"),
        ModelSummary(),
        BasePredictionWriter(),
        Timer("00:01:00:00"),
        TQDMProgressBar(),
    ]
    changes: dict[str, Any] = {"logger": CSVLogger(tmp_path), "enable_progress_bar": True}
    made = fit(world, tmp_path, *theirs, VocabularyPruning(128), ExportDraft(which="best"), LastCheckpoint(2), **changes)
    assert equal(weights(made), weights(fit(world, tmp_path / "plain", VocabularyPruning(128))))
    assert said == ["start"] and (tmp_path / "draft" / "config.json").is_file()
    logged = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "lr-AdamW" in logged
    again = fit(world, tmp_path, *theirs[1:2], Timer("00:01:00:00"), VocabularyPruning(128), LastCheckpoint(2), resume="last", max_epochs=2)
    assert again._began_at == 6 and again.global_step == 12


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
def test_rich_callbacks(world: dict[str, str], tmp_path: Path) -> None:
    assert fit(world, tmp_path, RichModelSummary(), RichProgressBar(), enable_progress_bar=True, enable_checkpointing=False, max_steps=1).global_step == 1


class FirstTheRest(BaseFinetuning):
    """Trains fc from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.task.draft.fc)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.task.draft.fc, optimizer, lr=1e-2)


class Watch(Callback):
    def __init__(self) -> None:
        self.fc: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.fc.append(pl_module.task.draft.fc.weight.detach().clone())


def test_finetuning_finds_the_draft_in_its_setup(world: dict[str, str], tmp_path: Path) -> None:
    """The kind of a callback that works on the module's parameters before Lightning has the module built."""
    start = weights(fit(world, tmp_path / "start", limit_train_batches=0))["task.draft.fc.weight"]
    seen = Watch()
    whole = fit(world, tmp_path, FirstTheRest(), seen, LastCheckpoint(100), max_epochs=2)
    assert torch.equal(seen.fc[0], start) and not torch.equal(seen.fc[1], start)
    fit(world, tmp_path / "first", FirstTheRest(), LastCheckpoint(100), max_epochs=2, max_steps=9)
    saved = str(tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert equal(weights(fit(world, tmp_path / "rest", FirstTheRest(), LastCheckpoint(100), max_epochs=2, resume=saved)), weights(whole))


@pytest.mark.parametrize(
    "refused",
    [
        BackboneFinetuning(),
        BatchSizeFinder(),
        LearningRateFinder(),
        ModelPruning("l1_unstructured"),
        OnExceptionCheckpoint("."),
        ThroughputMonitor(len),
        pytest.param(SpikeDetection, marks=pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="needs torchmetrics")),
    ],
    ids=lambda one: type(one).__name__,
)
def test_callbacks_that_cannot_be_right_are_refused_by_name(world: dict[str, str], tmp_path: Path, refused: Any) -> None:
    made = refused() if isinstance(refused, type) else refused
    with pytest.raises(UserError, match=rf"trainer\.callbacks='{type(made).__name__}' .*Fix: "):
        fit(world, tmp_path, VocabularyPruning(128), made)
    assert not (tmp_path / "logs").exists()


class Scheduler(GradientAccumulationScheduler):
    """Somebody's own."""


@pytest.mark.parametrize("scheduling", [{0: 3}, {0: 2, 4: 4}, {1: 2}])
@pytest.mark.parametrize("kind", [GradientAccumulationScheduler, Scheduler])
def test_accumulation_is_refused_as_a_callback_as_it_is_as_an_option(world: dict[str, str], tmp_path: Path, kind: Any, scheduling: dict[int, int]) -> None:
    with pytest.raises(UserError, match=rf"trainer\.callbacks='{kind.__name__}' .* contradicts data\.packs_per_step=2 on 1 ranks, which means 2"):
        fit(world, tmp_path, kind(scheduling))


def test_accumulation_that_agrees_is_no_contradiction(world: dict[str, str], tmp_path: Path) -> None:
    """Lightning's own check would say that the user has set ``accumulate_grad_batches``."""
    made = fit(world, tmp_path, GradientAccumulationScheduler({0: 2}), VocabularyPruning(128))
    assert equal(weights(made), weights(fit(world, tmp_path / "plain", VocabularyPruning(128))))


def test_accumulation_that_a_callback_sets_while_training_ends_the_run(world: dict[str, str], tmp_path: Path) -> None:
    class Sets(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = 3

    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches=3 was set by a callback while training, and data\.packs_per_step means 2"):
        fit(world, tmp_path, Sets())


def test_a_state_that_no_checkpoint_is_read_back_with_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    """Not found by a resume, when the training is done."""

    class Keeps(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"best": [Path("somewhere")]}

    with pytest.raises(UserError, match=r"trainer\.callbacks='Keeps' returns from state_dict\(\) what no checkpoint is read back with"):
        fit(world, tmp_path, Keeps(), LastCheckpoint(1))


def test_pruning_after_the_draft_was_built_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    """Where a module is used for a second run, with another vocabulary than its draft has."""
    from tests.trainer.world import data, module, trainer

    one = module(world)
    trainer(tmp_path, callbacks=[VocabularyPruning(128)], enable_checkpointing=False, max_steps=1).fit(one, datamodule=data(world))
    with pytest.raises(UserError, match=r"VocabularyPruning\.size=64 differs from the 128 tokens of the draft that was built before"):
        trainer(tmp_path, callbacks=[VocabularyPruning(64)], enable_checkpointing=False, max_steps=1).fit(one, datamodule=data(world))
