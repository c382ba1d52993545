"""What a user can mend is one line and exit code 2, whoever raised it; mistakes in somebody's own code keep their
traceback; the run's record never ends it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.e2e.runs import config
from tests.trainer.broken import FailsAtStepTwo, FailsAtTheEnd, Shade, WandbLogger
from tests.trainer.world import fit
from torchspec import cli
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.run_record import or_without, plain

CALLBACKS = "lightning.pytorch.callbacks."
LOGGERS = "lightning.pytorch.loggers."


@pytest.fixture
def file(world: dict[str, str], tmp_path: Path) -> Path:
    """A configuration on records."""
    made = config(tmp_path, world["target"], world["train"], world["validate"], data__engine="replay", data__records=world["records"])
    described = yaml.safe_load(made.read_text())
    described["data"] |= {"max_length": 64, "max_tokens": 96, "cache_dir": str(Path(world["folder"]) / "cache")}
    described["model"]["unroll_steps"] = 2
    described["trainer"] |= {"limit_train_batches": 2, "limit_val_batches": 1, "logger": False}
    described["trainer"]["callbacks"] = [
        {"class_path": "torchspec.callbacks.provenance.Provenance"},
        {"class_path": "torchspec.callbacks.last.LastCheckpoint"},
        {"class_path": "torchspec.callbacks.vocabulary.VocabularyPruning", "init_args": {"size": 128}},
    ]
    made.write_text(yaml.safe_dump(described))
    return made


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1, (ended.value.code, lines)
    return lines[0]


def add(name: str, **arguments: Any) -> list[str]:
    return [f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': arguments})}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing=False contradicts LastCheckpoint"),
        (add(CALLBACKS + "GradientAccumulationScheduler", scheduling={0: 4}), "contradicts data.packs_per_step=2 on 1 ranks"),
        (add(CALLBACKS + "ModelCheckpoint", save_top_k=3), "save_top_k=3"),
        (add(CALLBACKS + "EarlyStopping", monitor="val/none"), "val/none"),
        (add(CALLBACKS + "LearningRateMonitor"), "LearningRateMonitor"),
        (add(CALLBACKS + "Timer", duration="an hour"), "an hour"),
        (["--trainer.accelerator", "tpu"], "pip install torch_xla"),
        (["--trainer.accelerator", "mps"], "MPS"),
        (["--trainer.strategy", "deepspeed"], "pip install -U deepspeed"),
        (["--trainer.strategy", "none"], "none"),
        (["--trainer.gradient_clip_algorithm", "none"], "gradient_clip_algorithm"),
        (["--trainer.val_check_interval", "1000"], "val_check_interval"),
        (["--trainer.barebones", "true", "--trainer.log_every_n_steps", "3", "--trainer.callbacks", "[]"], "barebones"),
        (["--trainer.profiler", "xla"], "xla"),
        (["--trainer.no_such_flag", "1"], "no_such_flag"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1"),
        (["--model.optimizer", "torch.optim.SparseAdam"], "does not support dense gradients"),
        (["--model.optimizer", "torch.optim.LBFGS"], "model.optimizer='LBFGS' evaluates a step many times over"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR", "--model.lr_scheduler.T_max", "0"], "model.lr_scheduler: "),
        (add(CALLBACKS + "EMAWeightAveraging", decay=2.0), "trainer.callbacks: Invalid decay value 2.0"),
        (["--trainer.logger", LOGGERS + "CSVLogger", "--trainer.logger.save_dir", "/dev/null/logs"], "trainer.logger: /dev/null"),
        (add(CALLBACKS + "NoSuchCallback"), "NoSuchCallback"),
        (["--trainer.logger", LOGGERS + "CometLogger"], "pip install comet-ml"),
        (["--trainer.logger", LOGGERS + "MLFlowLogger"], "pip install mlflow"),
        (["--trainer.logger", LOGGERS + "TensorBoardLogger", "--trainer.logger.save_dir", "logs"], "pip install tensorboard"),
        (["--trainer.logger", LOGGERS + "LitLogger"], "pip install litlogger"),
    ],
    ids=lambda one: None if isinstance(one, str) else " ".join(one)[-40:],
)
def test_what_a_user_can_mend_is_one_line(file: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    line = refused(capsys, "--config", str(file), *words)
    assert said.lower() in line.lower() and len(line) < 1000


@pytest.mark.parametrize(
    ("name", "error", "said"), [("ProgrammingError", ValueError, "a mistake of mine"), ("WrongSignature", TypeError, "positional argument")]
)
def test_a_mistake_in_somebodys_own_code_keeps_its_traceback(file: Path, name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        cli.main(["fit", "--config", str(file), *add(f"tests.trainer.broken.{name}")])
    assert "Traceback" in next((file.parent / "logs").glob("rank-*.log")).read_text()


def test_a_configuration_that_yaml_cannot_say_is_written_as_text_and_read_again(file: Path) -> None:
    """Timer's enum, a device, an enum and objects of somebody's own callback; config.yaml starts the same run again."""
    odd = [*add(CALLBACKS + "Timer", duration="00:01:00:00"), *add(CALLBACKS + "StochasticWeightAveraging", swa_lrs=0.1)]
    cli.main(["fit", "--config", str(file), *odd])
    written = file.parent / "config.yaml"
    classes = {entry["class_path"].rsplit(".")[-1]: entry.get("init_args") for entry in yaml.safe_load(written.read_text())["trainer"]["callbacks"]}
    assert classes["Timer"]["interval"] == "step" and classes["StochasticWeightAveraging"]["device"] == "cpu"
    record = json.loads((file.parent / "provenance.json").read_text())
    assert [c["init_args"]["interval"] for c in record["config"]["trainer"]["callbacks"] if c["class_path"].endswith("Timer")] == ["step"]
    before = written.read_text()
    cli.main(["fit", "--config", str(written)])
    assert written.read_text() == before
    cli.main(["fit", "--config", str(file), *add("tests.trainer.broken.Odd")])
    assert "DARK" in written.read_text() and "builtins.len" in written.read_text()


def test_plain_values() -> None:
    given = {"shade": Shade.DARK, "device": torch.device("cpu"), "after": timedelta(minutes=5), "at": Path("x"), 3: (1, {2}), "how": len, "what": object()}
    said = {"shade": "DARK", "device": "cpu", "after": "0:05:00", "at": "x", 3: [1, [2]], "how": "builtins.len", "what": "builtins.object"}
    assert plain(given) == said


def test_a_record_that_the_disk_refuses_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "pipeline.json"
    path.mkdir()
    with or_without(path):
        path.write_text("no")
    assert "pipeline.json is not written" in caplog.text


def test_a_logger_that_fails_at_the_end_costs_nothing(world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(world, tmp_path, LastCheckpoint(100), ExportDraft(), logger=FailsAtTheEnd(tmp_path), max_steps=2)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file() and (tmp_path / "draft" / "config.json").is_file()
    assert "FailsAtTheEnd failed while closing" in caplog.text


def test_a_logger_that_fails_while_training_loses_no_step(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="the server is gone"):
        fit(world, tmp_path, LastCheckpoint(100), logger=FailsAtStepTwo(tmp_path))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_an_artifact_that_is_not_taken_leaves_the_draft(world: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(world, tmp_path, LastCheckpoint(100), ExportDraft(), logger=WandbLogger(tmp_path), max_steps=1)
    assert (tmp_path / "draft" / "config.json").is_file()
    assert "is not logged as an artifact" in caplog.text
