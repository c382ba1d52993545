"""A draft that learns at drawn blocks, through the data side and the Trainer: packed by its rows, the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.trainer.world import data, equal, trainer, weights
from torchspec.errors import UserError
from torchspec.models.module import DraftModule
from torchspec.target import TargetConfig


def module(world: dict[str, str], **changes: Any) -> DraftModule:
    """A small DFlash draft on the layers of the records, the same one each time."""
    torch.manual_seed(0)
    options = {"anchors": 3, **changes}
    target = TargetConfig(world["target"])
    return DraftModule(target, family="dflash", aux_layers=[2, 4, 5], options=options, compute_dtype="fp32")


@pytest.mark.slow
def test_blocks_are_drawn_the_same_after_a_resume(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("torchspec.data.datamodule.rank_zero_info", said.append)
    whole = trainer(tmp_path / "whole", callbacks=[], max_epochs=2)
    whole.fit(module(world), datamodule=data(world, max_rows=100))
    (line,) = [line for line in said if "draft rows" in line]
    assert "packs of at most 96 tokens and 100 draft rows (data.max_rows)" in line
    kept = ModelCheckpoint(dirpath=str(tmp_path / "first"), save_last=True)
    half = whole.global_step // 2 - 1
    first = trainer(tmp_path / "first", callbacks=[kept], max_epochs=2, max_steps=half)
    first.fit(module(world), datamodule=data(world, max_rows=100))
    rest = trainer(tmp_path / "rest", callbacks=[], max_epochs=2)
    checkpoint = str(tmp_path / "first" / "last.ckpt")
    rest.fit(module(world), datamodule=data(world, max_rows=100), ckpt_path=checkpoint)
    assert rest.global_step == whole.global_step and equal(weights(rest), weights(whole))
    other = trainer(tmp_path / "other", callbacks=[], max_epochs=2)
    with pytest.raises(UserError, match=r"ckpt_path"):
        other.fit(module(world, anchors=2), datamodule=data(world, max_rows=100), ckpt_path=checkpoint)
