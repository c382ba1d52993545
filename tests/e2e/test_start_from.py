"""``model.start_from``: training that goes on from weights alone, of a checkpoint or of an exported draft, and everything that is refused of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import make, metrics, run, save_world
from torchspec.errors import UserError
from torchspec.models.export.export import export_checkpoint
from torchspec.models.module import DraftModule
from torchspec.target import Target, TargetConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=40, validate=12)


@pytest.fixture(scope="module")
def trained(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    code, output = run("fit", "--config", str(make(folder, world)))
    assert code == 0, output
    return folder


def walks(folder: Path) -> list[dict[str, Any]]:
    """What AcceptanceLength wrote at each validation, the sanity check before training included."""
    return [json.loads(line) for line in (folder / "acceptance.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["checkpoint", "vllm"])
def test_training_starts_where_the_source_ended(form: str, world: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    source = trained / "checkpoints" / "last.ckpt"
    if form != "checkpoint":
        target = Target(TargetConfig(str(world["target"])))
        source = Path(export_checkpoint(source, target, tmp_path / "draft").directory)
    words = ("--model.start_from", str(source), "--trainer.max_steps", "2", "--trainer.num_sanity_val_steps", "-1")
    code, output = run("fit", "--config", str(make(tmp_path / "run", world)), *words)
    assert code == 0, output
    ended, began = (walks(folder) for folder in (trained, tmp_path / "run"))
    assert began[0]["acceptance_length"] == ended[-1]["acceptance_length"]
    assert began[0]["loss"] == pytest.approx(ended[-1]["loss"], rel=1e-6)  # the target of these tests is fp32, so an export rounds nothing
    assert len(metrics(tmp_path / "run", "train/loss")) == 2  # the schedule and the data begin anew


def test_a_resumed_run_goes_on_from_its_checkpoint_not_from_the_source(world: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    config = str(make(tmp_path, world))
    source = ("--model.start_from", str(trained / "checkpoints" / "last.ckpt"), "--model.lr_scheduler.total_steps", "4")
    code, output = run("fit", "--config", config, *source, "--trainer.max_steps", "4")
    assert code == 0, output
    whole = metrics(tmp_path, "train/loss")
    code, output = run("fit", "--config", config, *source, "--trainer.max_steps", "3")
    assert code == 0, output
    code, output = run("fit", "--config", config, *source, "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert code == 0, output
    assert metrics(tmp_path, "train/loss") == whole[3:]  # every second step is saved, and the end of training


def test_what_contradicts_the_source_is_refused(world: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    source = str(trained / "checkpoints" / "last.ckpt")
    target = TargetConfig(str(world["target"]))
    with pytest.raises(UserError, match=r"model\.aux_layers.*set model\.aux_layers to \[2, 4, 5\]"):
        DraftModule(target, start_from=source, aux_layers=[1, 4, 5])
    with pytest.raises(UserError, match=r"model\.draft"):
        DraftModule(target, start_from=source, draft="configs/drafts/eagle3.json")
    with pytest.raises(UserError, match="does not exist"):
        DraftModule(target, start_from=str(tmp_path / "nothing.ckpt"))
    file = make(tmp_path, world)
    file.write_text(file.read_text().replace("size: 128", "size: 64"))
    code, output = run("fit", "--config", str(file), "--model.start_from", source)
    assert code == 2 and "callbacks.VocabularyPruning.size=64 differs" in output.splitlines()[-1], output
