"""A second run in one folder: what a fixed name holds is of the newest run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from tests.trainer.world import fit, weights
from torchspec.callbacks.acceptance import AcceptanceLength
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.models.training.checkpoint import partial_of, publish, read_draft_weights


@pytest.mark.parametrize(
    "kind",
    [
        lambda: LastCheckpoint(2),
        lambda: ModelCheckpoint(save_last=True),
        lambda: ModelCheckpoint(save_last="link", monitor="val/loss"),
        lambda: ModelCheckpoint(save_last=True, every_n_train_steps=2),
    ],
    ids=["ours", "lightning", "link", "steps"],
)
def test_last_is_the_newest_runs(world: dict[str, str], tmp_path: Path, kind: Any) -> None:
    for lr in (1e-3, 5e-2):
        made = fit(world, tmp_path, kind(), draft__lr=lr)
    saved = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.equal(read_draft_weights(saved)["fc.weight"], weights(made)["task.draft.fc.weight"])
    assert [path.name for path in saved.parent.glob("last*")] == ["last.ckpt"]
    assert fit(world, tmp_path, kind(), draft__lr=5e-2, resume="last", max_epochs=2)._began_at == made.global_step


def test_both_kinds_of_last_in_one_run(world: dict[str, str], tmp_path: Path) -> None:
    for lr in (1e-3, 5e-2):
        made = fit(world, tmp_path, LastCheckpoint(100), ModelCheckpoint(save_last=True, monitor="val/loss"), draft__lr=lr)
    assert torch.equal(read_draft_weights(tmp_path / "checkpoints" / "last.ckpt")["fc.weight"], weights(made)["task.draft.fc.weight"])
    assert len(list((tmp_path / "checkpoints").glob("last*"))) == 1


def test_best_and_its_export_are_the_newest_runs(world: dict[str, str], tmp_path: Path) -> None:
    for lr in (1e-2, 1e-5):  # the second one is worse
        best = ModelCheckpoint(monitor="val/loss", filename="best")
        made = fit(world, tmp_path, VocabularyPruning(128), AcceptanceLength(2), best, ExportDraft(which="best"), draft__lr=lr)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.ckpt"]
    saved = read_draft_weights(tmp_path / "checkpoints" / "best.ckpt")["fc.weight"]
    assert torch.equal(saved, weights(made)["task.draft.fc.weight"])
    assert torch.equal(load_file(tmp_path / "draft" / "model.safetensors")["fc.weight"].float(), saved)
    assert [json.loads(line)["step"] for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()] == [6]


def test_a_checkpoint_in_a_file_takes_the_place_of_a_sharded_one(tmp_path: Path) -> None:
    """``auto`` after ``fsdp2`` in one folder; what somebody put into the older folder stays."""
    final = tmp_path / "last.ckpt"
    final.mkdir()
    for name in ("meta.pt", ".metadata", "__0_0.distcp", "notes.txt"):
        (final / name).write_text(name)
    partial_of(final).write_text("new")
    publish(partial_of(final), final)
    assert final.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "last.ckpt.others"}
    assert [path.name for path in (tmp_path / "last.ckpt.others").iterdir()] == ["notes.txt"]
