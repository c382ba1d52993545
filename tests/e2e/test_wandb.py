"""W&B offline: a run logs there, the draft is its artifact, and a resume goes on in the same run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.runs import config, run
from tests.tiny import save_conversations, save_target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    target = save_target(tmp_path / "target")
    train, validate = save_conversations(tmp_path / "train.jsonl", 40), save_conversations(tmp_path / "validate.jsonl", 6, seed=1)
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "drafts", "save_dir": str(tmp_path / "run"), "offline": True}}
    file = str(config(tmp_path / "run", target, train, validate, trainer__logger=logger))
    code, output = run("fit", "--config", file, "--trainer.max_steps", "2", "--model.lr_scheduler.total_steps", "10")
    assert code == 0, output
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    code, output = run("fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, output
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identifier = first.name.rsplit("-", 1)[1]
    assert all(found.name.endswith(identifier) for found in runs), runs
    logged = b"".join(path.read_bytes() for found in runs for path in found.glob("*.wandb"))
    assert f"draft-{identifier}".encode() in logged and b"val/acceptance_length" in logged
    assert "WANDB_API_KEY" not in (tmp_path / "run" / "run.yaml").read_text()
