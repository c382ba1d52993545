"""Lightning's weight averaging: with pruning in any order, resumed exactly, and what is validated, saved and exported
is the average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from safetensors.torch import load_file

from tests.trainer.world import data, equal, fit, module, trainer, weights
from torchspec.callbacks.average import Average
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.errors import UserError
from torchspec.models.training.checkpoint import read_draft_weights

STEPS = 6
"""Of an epoch."""


def ema(**changes: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5, **changes)


class Trajectory(Callback):
    """The draft's weights after each optimizer step, and those that validations measure."""

    def __init__(self) -> None:
        self.steps: dict[int, torch.Tensor] = {}
        self.validated: dict[int, torch.Tensor] = {}
        self.tables: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps[trainer.global_step] = pl_module.task.draft.fc.weight.detach().clone()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated[trainer.global_step] = pl_module.task.draft.fc.weight.detach().clone()
        self.tables = [buffer.clone() for buffer in pl_module.buffers()]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_pruned_draft_stays_pruned_wherever_averaging_stands(world: dict[str, str], tmp_path: Path, place: int) -> None:
    """Lightning's callback builds the draft in its ``setup``; the target's frozen tables, integer ones among them, are
    no part of the average."""
    seen = Trajectory()
    callbacks: list[Callback] = [VocabularyPruning(128), ExportDraft(), seen]
    callbacks.insert(place, ema())
    made = fit(world, tmp_path, *callbacks)
    assert made.lightning_module.draft_config.draft_vocab_size == 128
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["draft_vocab_size"] == 128
    steps = [seen.steps[step] for step in sorted(seen.steps) if step]
    average = steps[0]
    for weight in steps[1:]:
        average = 0.5 * average + 0.5 * weight
    last = max(seen.validated)
    assert torch.allclose(seen.validated[last], average, atol=1e-6) and not torch.allclose(average, steps[-1], atol=1e-6)
    assert torch.equal(weights(made)["task.draft.fc.weight"], seen.validated[last])
    exported = load_file(tmp_path / "draft" / "model.safetensors")
    assert torch.allclose(exported["fc.weight"].float(), average, atol=1e-6)
    fresh = fit(world, tmp_path / "plain", VocabularyPruning(128), max_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(seen.tables, fresh.lightning_module.buffers(), strict=True))


@pytest.mark.parametrize("stop", ["max_steps", "error", "error in validation"])
def test_an_averaged_run_is_resumed_exactly(world: dict[str, str], tmp_path: Path, stop: str) -> None:
    """From the last checkpoint of an end, of an error between steps, and of one while the average stands in the draft's
    place."""

    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if stop == "error" and trainer.global_step == 3:
                raise RuntimeError("broken off")

        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            if stop == "error in validation":
                raise RuntimeError("broken off")

    def callbacks() -> list[Callback]:
        return [LastCheckpoint(100), ema(), VocabularyPruning(128)]

    limits: dict[str, Any] = {"max_epochs": 2, "draft__schedule": True}
    whole = weights(fit(world, tmp_path / "whole", *callbacks(), **limits))
    first = tmp_path / "first"
    if stop == "max_steps":
        fit(world, first, *callbacks(), **limits, max_steps=3)
    else:
        with pytest.raises(RuntimeError, match="broken off"):
            fit(world, first, *callbacks(), Fails(), **limits)
    saved = first / "checkpoints" / "last.ckpt"
    entries = torch.load(saved, weights_only=True)
    assert not equal(entries["state_dict"], entries["current_model_state"])
    rest = fit(world, tmp_path / "rest", *callbacks(), **limits, resume=str(saved))
    assert rest._began_at > 0 and equal(weights(rest), whole)


def test_an_average_is_not_taken_for_the_weights_in_training(world: dict[str, str], tmp_path: Path) -> None:
    fit(world, tmp_path, LastCheckpoint(100), ema(), max_steps=2)
    saved = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"last\.ckpt' holds the average of weights beside .* model\.start_from"):
        fit(world, tmp_path / "rest", LastCheckpoint(100), resume=str(saved))
    fit(world, tmp_path / "next", draft__start_from=str(saved), max_steps=1)


def test_an_average_that_never_began_leaves_the_trained_weights(world: dict[str, str], tmp_path: Path) -> None:
    """Lightning would put the untrained start in their place: in validations, in checkpoints and at the end."""
    plain = weights(fit(world, tmp_path / "plain"))
    made = fit(world, tmp_path, ema(update_starting_at_step=1000), LastCheckpoint(100), ExportDraft())
    assert equal(weights(made), plain)
    saved = read_draft_weights(tmp_path / "checkpoints" / "last.ckpt")
    assert equal({f"task.draft.{name}": value for name, value in saved.items()}, plain)


def test_the_best_checkpoint_holds_what_was_validated(world: dict[str, str], tmp_path: Path) -> None:
    """Also where it is of weights alone, which Lightning saves without asking callbacks."""
    for only in (False, True):
        seen, best = Trajectory(), ModelCheckpoint(monitor="val/loss", save_weights_only=only)
        fit(world, tmp_path / str(only), WeightAveraging(), best, seen)
        assert torch.equal(read_draft_weights(Path(best.best_model_path))["fc.weight"], seen.validated[max(seen.validated)])


def test_swa_averages_exports_and_resumes(world: dict[str, str], tmp_path: Path) -> None:
    """Lightning's older callback copies the draft in its ``setup``, before Lightning has it built; and restores its
    schedule where an epoch begins."""

    class Fails(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 3 and trainer.global_step == 3 * STEPS + 2:
                raise RuntimeError("broken off")

    def callbacks() -> list[Callback]:
        return [StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2), VocabularyPruning(128), LastCheckpoint(100), ExportDraft()]

    seen = Trajectory()
    limits: dict[str, Any] = {"max_epochs": 5, "draft__schedule": True}
    whole = weights(fit(world, tmp_path / "whole", *callbacks(), seen, **limits))
    assert max(seen.steps) == 5 * STEPS
    begins = [seen.steps[STEPS * epoch] for epoch in (1, 2, 3, 4)]  # it averages where epochs begin
    assert torch.allclose(whole["task.draft.fc.weight"], torch.stack(begins).mean(0), atol=1e-6)
    assert torch.equal(read_draft_weights(tmp_path / "whole" / "checkpoints" / "last.ckpt")["fc.weight"], whole["task.draft.fc.weight"])
    assert torch.equal(load_file(tmp_path / "whole" / "draft" / "model.safetensors")["fc.weight"].float(), whole["task.draft.fc.weight"])
    with pytest.raises(RuntimeError, match="broken off"):
        fit(world, tmp_path / "first", *callbacks(), Fails(), **limits)
    saved = str(tmp_path / "first" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"trainer\.max_epochs=6 differs from the 5 of the checkpoint"):
        fit(world, tmp_path / "longer", *callbacks(), **{**limits, "max_epochs": 6}, resume=saved)
    rest = fit(world, tmp_path / "rest", *callbacks(), **limits, resume=saved)
    assert rest._began_at == 3 * STEPS + 2 and equal(weights(rest), whole)


@pytest.mark.parametrize("one_file", [False, True])
def test_validate_reads_the_average_of_a_sharded_checkpoint(world: dict[str, str], tmp_path: Path, one_file: bool) -> None:
    """As the run itself validated with it, and as it does of a checkpoint that is one file."""
    given: list[Callback] = [Average(4.0), LastCheckpoint(STEPS)]
    made = fit(world, tmp_path, *given, strategy="auto" if one_file else "fsdp2")
    assert (tmp_path / "checkpoints" / "last.ckpt").is_dir() != one_file
    seen = Trajectory()
    (found,) = trainer(tmp_path / "again", callbacks=[seen], strategy="fsdp2").validate(
        module(world), datamodule=data(world), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), verbose=False
    )
    average = read_draft_weights(tmp_path / "checkpoints" / "last.ckpt", "average")["fc.weight"]
    assert torch.equal(seen.validated[0], average)  # whole after a forward
    assert not torch.equal(average, read_draft_weights(tmp_path / "checkpoints" / "last.ckpt", "raw")["fc.weight"])
    assert found["val/loss"] == pytest.approx(float(made.callback_metrics["val/loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("made", "changes", "said"),
    [
        (ema, {"strategy": "fsdp2"}, r"trainer\.callbacks='EMAWeightAveraging' does not average sharded weights .*torchspec\.callbacks\.average\.Average"),
        (lambda: StochasticWeightAveraging(1e-3), {"strategy": "fsdp2"}, "'StochasticWeightAveraging' does not average sharded weights"),
        (lambda: StochasticWeightAveraging(1e-3), {"max_steps": 5}, "counts whole epochs up to trainer.max_epochs"),
        (lambda: [ema(), WeightAveraging()], {}, "would each put its own average in the draft's place"),
        (lambda: [Average(), ema()], {}, "'EMAWeightAveraging, Average' would each put its own average"),
    ],
)
def test_averaging_that_cannot_be_right_is_refused_by_name(world: dict[str, str], tmp_path: Path, made: Any, changes: dict[str, Any], said: str) -> None:
    callbacks = made()
    with pytest.raises(UserError, match=said):
        fit(world, tmp_path, *(callbacks if isinstance(callbacks, list) else [callbacks]), **changes)
    assert not (tmp_path / "logs").exists()
