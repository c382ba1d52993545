"""A device that fails for good ends a run in one line with exit code 1, and leaves the last good checkpoint as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.defects.fits import fit, module, weights
from tests.models.exports import save_plain_target
from torchspec import cli, ranks
from torchspec.callbacks.last import LastCheckpoint
from torchspec.device_lost import device_failure
from torchspec.errors import DeviceLost
from torchspec.models.training.checkpoint import read_draft_weights
from torchspec.target import Target
from torchspec.trainer import Trainer

WORDS = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


class Dies(Callback):
    """From ``at`` optimizer steps on everything that asks the device fails: the step, a save, and this callback's own way out."""

    def __init__(self, at: int, patch: pytest.MonkeyPatch) -> None:
        self.at, self.patch = at, patch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.patch.setattr(type(trainer.strategy), "save_checkpoint", self._fail)
            self.patch.setattr(type(trainer.strategy), "teardown", self._fail)
            self._fail()

    def on_exception(self, *_: Any) -> None:
        self._fail()

    @staticmethod
    def _fail(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError(WORDS)


def test_one_line_and_the_last_good_checkpoint_stays(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "leave_at_once", False)
    with pytest.raises(DeviceLost) as told, monkeypatch.context() as dying:
        fit(tmp_path, module(target), steps=6, enable_checkpointing=True, callbacks=[LastCheckpoint(2), Dies(3, dying)])
    assert ranks.leave_at_once  # the process ends without another call on the device
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert "\n" not in str(told.value) and "after 3 optimizer steps" in str(told.value) and "unspecified launch failure" in str(told.value)
    assert f"{last} is whole" in str(told.value) and not list(last.parent.glob(".*.partial"))
    assert torch.load(last, weights_only=True)["global_step"] == 2
    two = module(target)
    fit(tmp_path / "two", two, steps=2)
    saved = read_draft_weights(last)
    assert all(torch.equal(value, saved[name]) for name, value in weights(two).items())
    assert fit(tmp_path, module(target), steps=4, ckpt_path=str(last)).global_step > 2


def test_the_command_line_says_it_in_one_line_with_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    lost = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)._lost("CUDA error: device-side assert triggered")
    with pytest.raises(SystemExit) as ended:
        cli._leave_at_once(lost)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: the device failed after 0 optimizer steps (CUDA error: device-side assert triggered); nothing was saved")


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (torch.AcceleratorError(WORDS), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), False),
        (ValueError("an illegal memory access"), False),
    ],
)
def test_which_errors_are_the_end_of_a_device(error: BaseException, gone: bool) -> None:
    assert (device_failure(error) is not None) == gone
    wrapped = RuntimeError("while saving")
    wrapped.__context__ = error
    assert (device_failure(wrapped) is not None) == gone
