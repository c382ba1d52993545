"""A resume either goes on with everything, or is refused by the name of what is missing; whatever fails, the checkpoint that was good stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.defects.fits import batches, fit, module, weights
from tests.models.exports import save_plain_target
from torchspec.callbacks.last import LastCheckpoint
from torchspec.errors import UserError
from torchspec.models.optim.muon import MuonAdamW
from torchspec.models.optim.schedules import Cosine, Linear
from torchspec.target import Target
from torchspec.trainer import Trainer

Changes = dict[str, Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.002)


def run(folder: Path, target: Target, *, steps: int, resume: Path | str | None = None, callbacks: list[Any] | None = None, **changes: Any) -> Trainer:
    """A fit that saves its newest state under ``folder``."""
    made = module(target, **{"optimizer": adamw, "lr_scheduler": Cosine, **changes})
    given = [*(callbacks or []), LastCheckpoint(every_n_train_steps=100)]
    return fit(folder, made, steps=steps, ckpt_path=None if resume is None else str(resume), enable_checkpointing=True, callbacks=given)


@pytest.fixture(scope="module")
def good(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint after three steps."""
    folder = tmp_path_factory.mktemp("good")
    run(folder, target, steps=3)
    return folder / "checkpoints" / "last.ckpt"


def begun(folder: Path, target: Target) -> Callable[[], bool]:
    """A run of three steps; tells whether its checkpoint is still what it was, and alone."""
    run(folder, target, steps=3)
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    return lambda: last.read_bytes() == before and [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


# -- what is refused


def _other_optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": _other_optimizer}, r"ckpt_path \(optimizer\)='AdamW' differs from this run's SGD"),
        ({"optimizer": MuonAdamW}, r"ckpt_path \(optimizer\)='AdamW' differs from this run's MuonAdamW"),
        ({"lr_scheduler": Linear}, r"ckpt_path \(lr_scheduler\)='Cosine' differs from this run's Linear"),
        ({"lr_scheduler": None}, r"ckpt_path \(lr_scheduler\)='Cosine' differs from this run's None"),
        ({"lr_scheduler": lambda optimizer: Cosine(optimizer, warmup_steps=2)}, r"ckpt_path \(lr_scheduler, warmup_steps\)=0.0 differs from this run's 2"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=0.1)}, r"ckpt_path \(lr_scheduler, base_lrs\)=\[0.002\] differs from this run's \[0.1\]"),
    ],
    ids=["SGD", "Muon", "schedule", "no schedule", "warm-up", "learning rate"],
)
def test_another_optimizer_or_schedule_is_refused_and_the_good_one_stays(target: Target, tmp_path: Path, changes: Changes, words: str) -> None:
    unchanged = begun(tmp_path, target)
    with pytest.raises(UserError, match=words):
        run(tmp_path, target, steps=5, resume="last", **changes)
    assert unchanged()
    assert run(tmp_path, target, steps=5, resume="last").global_step == 5


class _ToldToEnd(Exception):
    """Any end while the optimizer is restored."""


def test_an_end_inside_a_restore_leaves_the_good_checkpoint(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = begun(tmp_path, target)

    def ends(self: Any, state: Any) -> None:
        raise _ToldToEnd

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "load_state_dict", ends)
        with pytest.raises(_ToldToEnd):
            run(tmp_path, target, steps=5, resume="last")
    assert unchanged()


def _drop(name: str) -> Callable[[Changes], None]:
    return lambda entries: entries.pop(name)


def _drop_moments(entries: Changes) -> None:
    entries["optimizer_states"][0]["state"] = {}


def _drop_one_moment(entries: Changes) -> None:
    entries["optimizer_states"][0]["state"][0].pop("exp_avg_sq")


def _drop_a_tensor(entries: Changes) -> None:
    entries["state_dict"].pop("task.draft.norm.weight")


def _drop_a_fact(entries: Changes) -> None:
    entries["torchspec"].pop("target")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop("loops"), "lacks loops"),
        (_drop("callbacks"), "lacks callbacks"),
        (_drop("lr_schedulers"), "lacks lr_schedulers"),
        (_drop("optimizer_states"), "lacks optimizer_states"),
        (_drop("_Data"), "lacks _Data"),
        (_drop("state_dict"), "missing, unknown or misshapen tensors"),
        (lambda entries: entries.update(loops={}), r"lacks loops.fit_loop"),
        (_drop_moments, r"has 0 of the optimizer's \d+ moments"),
        (_drop_one_moment, r"has \d+ of the optimizer's \d+ moments"),
        (_drop_a_tensor, "task.draft.norm.weight"),
        (_drop_a_fact, "lacks torchspec.target"),
        (lambda entries: entries["torchspec"].pop("resume"), "lacks torchspec.resume"),
    ],
    ids=["loops", "callbacks", "schedules", "optimizer", "datamodule", "weights", "loop", "moments", "one moment", "a tensor", "a fact", "description"],
)
def test_a_partial_checkpoint_is_refused_by_what_it_lacks(
    with_data: Path, target: Target, tmp_path: Path, damage: Callable[[Changes], None], words: str
) -> None:
    entries: Changes = torch.load(with_data, weights_only=True)
    damage(entries)
    partial = tmp_path / "partial.ckpt"
    torch.save(entries, partial)
    with pytest.raises(UserError, match=words):
        run_with_data(tmp_path, target, steps=5, resume=partial)


class _Data(pl.LightningDataModule):
    """Ready batches, and a state."""

    def train_dataloader(self) -> Any:
        return batches(10)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": 1}


def run_with_data(folder: Path, target: Target, *, steps: int, resume: Path | None = None) -> Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=folder, max_steps=steps, callbacks=[LastCheckpoint()], num_sanity_val_steps=0, **quiet)
    made = module(target, optimizer=adamw, lr_scheduler=Cosine)
    trainer.fit(made, datamodule=_Data(), ckpt_path=None if resume is None else str(resume))
    return trainer


@pytest.fixture(scope="module")
def with_data(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run_with_data(folder, target, steps=3)
    return folder / "checkpoints" / "last.ckpt"


def test_what_the_refusals_damage_is_whole(with_data: Path, target: Target, tmp_path: Path) -> None:
    assert run_with_data(tmp_path, target, steps=5, resume=with_data).global_step == 5


class Poison(pl.Callback):
    """Makes a weight NaN before the fifth step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            next(p for p in pl_module.parameters() if p.requires_grad).data.view(-1)[:1] = float("nan")


@pytest.mark.parametrize("every", [0, 1, 50])
def test_weights_that_are_no_numbers_end_the_run_within_a_step_and_are_not_saved(target: Target, tmp_path: Path, every: int) -> None:
    """However seldom it logs."""
    kept = begun(tmp_path, target)
    with pytest.raises(UserError, match=r"train/loss=nan at step 5 is not a number: weights are no longer numbers \(NaN or infinity in "):
        fit(
            tmp_path, module(target, optimizer=adamw, lr_scheduler=Cosine), steps=9, ckpt_path="last", enable_checkpointing=True, log_every_n_steps=every,
            callbacks=[Poison(), LastCheckpoint(every_n_train_steps=100)],
        )  # fmt: skip
    assert kept()


def test_an_optimizer_without_moments_has_none_to_lose(target: Target, tmp_path: Path) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    run(tmp_path, target, steps=3, optimizer=sgd)
    assert run(tmp_path, target, steps=5, resume="last", optimizer=sgd).global_step == 5


# -- what is saved when a run breaks off


class _Breaks(Callback):
    """Raises at a moment of a step."""

    def __init__(self, moment: str, at: int) -> None:
        self.moment, self.at = moment, at

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.moment == "before" and trainer.global_step == self.at:
            raise _ToldToEnd

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.moment == "forward" and trainer.global_step == self.at:
            raise _ToldToEnd


class _Torn(torch.optim.AdamW):
    """Moves the weights and then fails, as an allocation that finds no memory does."""

    at = 2
    done = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.done += 1
        if self.done > self.at:
            raise _ToldToEnd
        return loss


def test_a_step_that_is_cut_in_half_is_not_saved(target: Target, tmp_path: Path) -> None:
    with pytest.raises(_ToldToEnd):
        run(tmp_path, target, steps=5, optimizer=lambda parameters: _Torn(parameters, lr=0.002))
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_an_error_of_a_save_does_not_hide_what_ended_the_run(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *_: Any) -> None:
        raise UserError("checkpoint", "last.ckpt", "cannot be written (No space left on device)", "free space")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(_ToldToEnd):
        run(tmp_path, target, steps=5, callbacks=[_Breaks("before", 2)])


@pytest.mark.parametrize("moment", ["before", "forward"])
def test_a_run_that_breaks_between_two_steps_is_saved_and_goes_on_with_the_same_bits(target: Target, tmp_path: Path, moment: str) -> None:
    whole = run(tmp_path / "whole", target, steps=5)
    with pytest.raises(_ToldToEnd):
        run(tmp_path / "broken", target, steps=5, callbacks=[_Breaks(moment, 2)])
    assert torch.load(tmp_path / "broken" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    resumed = run(tmp_path / "broken", target, steps=5, resume="last")
    made: Any = (whole.lightning_module, resumed.lightning_module)
    ours, theirs = (weights(one) for one in made)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_resumes_and_breaks_before_its_first_step_writes_nothing(target: Target, tmp_path: Path) -> None:
    unchanged = begun(tmp_path, target)
    with pytest.raises(_ToldToEnd):
        run(tmp_path, target, steps=5, resume="last", callbacks=[_Breaks("before", 3)])
    assert unchanged()


# -- another length


class _Rates(Callback):
    """Learning rates of the steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("steps", [4, 6, 10])
def test_a_resume_for_another_number_of_steps_goes_on_along_that_curve(target: Target, good: Path, tmp_path: Path, steps: int) -> None:
    whole, resumed = _Rates(), _Rates()
    run(tmp_path / "whole", target, steps=steps, callbacks=[whole])
    run(tmp_path / "resumed", target, steps=steps, resume=good, callbacks=[resumed])
    assert len(whole.seen) == steps and resumed.seen == pytest.approx(whole.seen[3:]) and all(rate > 0 for rate in resumed.seen)
