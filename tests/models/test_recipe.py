"""What a checkpoint says of how its draft was trained, and the card from it: read from the run itself, without any local path."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.defects.fits import fit, module
from tests.models.exports import save_plain_target
from torchspec.models.export.export import export_checkpoint
from torchspec.models.ops.loss_formulas import FORWARD_KL
from torchspec.models.optim.muon import MuonAdamW
from torchspec.models.optim.schedules import WSD
from torchspec.models.training.checkpoint import read_facts
from torchspec.models.training.recipe import recipe, rows
from torchspec.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def test_a_checkpoint_says_how_it_was_trained(target: Target, tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "loss": {"tv": 0.5, "jsd": 1.0}, "init": "random",
        "optimizer": lambda parameters: MuonAdamW(parameters, lr=2e-3, muon_lr=0.03, betas=(0.8, 0.9)),
        "lr_scheduler": lambda optimizer: WSD(optimizer, warmup_steps=2, decay=0.5),
    }  # fmt: skip
    fit(tmp_path, module(target, **made), steps=3).save_checkpoint(tmp_path / "first.ckpt")
    facts = read_facts(tmp_path / "first.ckpt")["recipe"]
    adam, muon = facts["optimizer"].pop("groups")
    assert adam["kind"] == "adamw" and adam["lr"] == 2e-3 and adam["betas"] == [0.8, 0.9] and adam["weight_decay"] == 0.0
    assert muon["kind"] == "muon" and muon["lr"] == 0.03
    assert facts == {
        "loss": {"jsd": 1.0, "tv": 0.5}, "start": {"init": "random"}, "optimizer": {"name": "MuonAdamW"},
        "schedule": {"name": "WSD", "warmup_steps": 2, "total_steps": 3, "final": 0.0, "decay": 0.5},
    }  # fmt: skip

    fit(tmp_path, module(target, start_from=str(tmp_path / "first.ckpt")), steps=1).save_checkpoint(tmp_path / "second.ckpt")
    export_checkpoint(tmp_path / "second.ckpt", target, tmp_path / "draft")
    training = (tmp_path / "draft" / "README.md").read_text().partition("## Training")[2]
    assert "| started from | weights of first.ckpt |" in training and "| loss | forward_kl 1 |" in training
    assert "| optimizer | AdamW: lr 0.001, betas 0.9 0.999, eps 1e-08, weight_decay 0.01 |" in training and str(tmp_path) not in training


def test_local_data_is_named_without_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.touch()
    described = {"train": [[str(file), 1.0], ["some/chats:train", 0.5]], "conversations": None, "max_length": 64, "tokens_per_step": 128, "on_policy": True}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(described=described))
    facts = recipe(loss=FORWARD_KL, init="target", start_from=None, trainer=trainer)
    assert dict(rows(facts))["data"] == "chats.jsonl, 0.5 x some/chats:train, answered anew by the target"
