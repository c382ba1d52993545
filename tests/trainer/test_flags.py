"""Every flag of Lightning's Trainer: it works, is refused by name before anything starts, or changes nothing
(docs/lightning.md)."""

from __future__ import annotations

import inspect
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO, TorchSyncBatchNorm
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from tests.trainer.world import data, equal, fit, module, trainer, weights
from torchspec.callbacks.acceptance import AcceptanceLength
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.callbacks.pipeline import PipelineMetrics
from torchspec.callbacks.provenance import Provenance
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plain(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """An epoch without any of it."""
    return weights(fit(world, tmp_path_factory.mktemp("plain")))


def validations(folder: Path) -> int:
    return len((folder / "acceptance.jsonl").read_text().splitlines())


def ours() -> list[Callback]:
    return [Provenance(), VocabularyPruning(128), AcceptanceLength(2), PipelineMetrics(), ExportDraft()]


def test_every_flag_is_in_the_table() -> None:
    table = (ROOT / "docs" / "lightning.md").read_text()
    flags = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
    assert [name for name in flags if f"`{name}`" not in table] == []


def test_steps_without_logs(world: dict[str, str], tmp_path: Path) -> None:
    """0 is Lightning's way to log none; the summary of the run, the export and the check for NaN stay."""
    logged = fit(world, tmp_path / "logged", *ours(), LastCheckpoint(2), logger=CSVLogger(tmp_path / "logged"))
    silent = fit(world, tmp_path / "silent", *ours(), LastCheckpoint(2), logger=CSVLogger(tmp_path / "silent"), log_every_n_steps=0)
    assert equal(weights(logged), weights(silent))
    assert json.loads((tmp_path / "silent" / "pipeline.json").read_text())["steps"] == silent.global_step
    assert (tmp_path / "silent" / "draft" / "config.json").is_file()
    assert "train/loss" in next((tmp_path / "logged").rglob("metrics.csv")).read_text()
    assert "train/loss" not in "".join(file.read_text() for file in (tmp_path / "silent").rglob("metrics.csv"))
    with pytest.raises(UserError, match="train/loss=nan at step 2 is not a number"):
        fit(world, tmp_path / "nan", log_every_n_steps=0, draft__lr=1e30)


def test_the_log_interval_is_a_divisor_in_one_place_alone() -> None:
    """``logs_now`` knows that 0 means none."""
    files = [file for file in (ROOT / "torchspec").rglob("*.py") if "% trainer.log_every" in file.read_text() or "% self.trainer.log_every" in file.read_text()]
    assert files == []


def test_barebones(world: dict[str, str], tmp_path: Path) -> None:
    assert equal(weights(fit(world, tmp_path, *ours(), barebones=True)), weights(fit(world, tmp_path / "plain", *ours(), enable_checkpointing=False)))
    assert (tmp_path / "draft" / "config.json").is_file()
    with pytest.raises(UserError, match=r"trainer\.barebones=True contradicts LastCheckpoint in trainer\.callbacks"):
        fit(world, tmp_path, LastCheckpoint(), barebones=True)


@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run(world: dict[str, str], tmp_path: Path, batches: bool | int) -> None:
    made = fit(world, tmp_path, *ours(), LastCheckpoint(1), fast_dev_run=batches)
    assert made.global_step == (1 if batches is True else 2) and not (tmp_path / "draft").exists()


def test_flags_that_change_no_number(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    one = {"detect_anomaly": True, "benchmark": True, "enable_autolog_hparams": False, "use_distributed_sampler": False, "model_registry": "name"}
    shown = {"enable_progress_bar": True, "enable_model_summary": True, "num_sanity_val_steps": 2, "limit_test_batches": 1, "limit_predict_batches": 0.5}
    assert equal(weights(fit(world, tmp_path, **one, **shown, enable_checkpointing=True)), plain)
    two = {"deterministic": True, "inference_mode": False, "sync_batchnorm": True, "accumulate_grad_batches": 2, "precision": 32, "num_nodes": 1}
    assert equal(weights(fit(world, tmp_path, **two, max_time={"hours": 1}, min_epochs=1, min_steps=1, max_steps=100, devices="1")), plain)


def test_deterministic_may_only_warn(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    assert equal(weights(fit(world, tmp_path, deterministic="warn", strategy="auto")), plain)


@pytest.mark.parametrize(
    ("interval", "every", "passes"),
    [(0.5, 1, 2), (5, 1, 2), (1.0, 2, 0), (4, None, 3), (timedelta(0), 1, 12), ("00:10:00:00", 1, 0), ({"hours": 1}, None, 0)],
)
def test_validation_intervals(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor], interval: Any, every: int | None, passes: int) -> None:
    """Also inside an optimizer step (5 micro-batches of 2 a step), and by time."""
    made = fit(world, tmp_path, AcceptanceLength(2), enable_checkpointing=False, val_check_interval=interval, check_val_every_n_epoch=every)
    assert equal(weights(made), plain)
    assert (validations(tmp_path) if passes else 0) == passes


def test_limits(world: dict[str, str], tmp_path: Path) -> None:
    assert fit(world, tmp_path, limit_train_batches=4, limit_val_batches=1).global_step == 2
    assert fit(world, tmp_path, limit_train_batches=0.5, limit_val_batches=0.5).global_step == 3
    assert fit(world, tmp_path, limit_train_batches=0).global_step == 0
    assert fit(world, tmp_path, AcceptanceLength(2), enable_checkpointing=False, limit_val_batches=0).global_step == 6
    assert fit(world, tmp_path, max_time=timedelta(0)).global_step <= 1
    odd = {"val_check_interval": 0, "check_val_every_n_epoch": 0, "gradient_clip_val": float("nan")}
    for field, value in {**odd, "overfit_batches": 2, "reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 3, "accumulate_grad_batches": 3}.items():  # type: ignore[assignment]
        with pytest.raises(UserError, match=rf"trainer\.{field}={value}"):
            fit(world, tmp_path / field, **{field: value})


def test_minimum_lengths_hold_against_a_callback_that_stops(world: dict[str, str], tmp_path: Path) -> None:
    def stops() -> Callback:
        return EarlyStopping("val/loss", stopping_threshold=1e9)

    assert fit(world, tmp_path, stops(), max_epochs=4, enable_checkpointing=False).global_step == 6
    assert fit(world, tmp_path, stops(), max_epochs=4, min_epochs=2, enable_checkpointing=False).global_step == 12
    assert fit(world, tmp_path, stops(), max_epochs=4, min_steps=14, enable_checkpointing=False).global_step >= 14


def test_clipping(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    """Neither way of clipping is the other, or none."""
    clipped = [weights(fit(world, tmp_path, gradient_clip_val=1e-3, gradient_clip_algorithm=how, max_steps=2)) for how in ("norm", "value")]
    assert not equal(*clipped) and not equal(clipped[0], weights(fit(world, tmp_path, max_steps=2)))
    assert equal(clipped[0], weights(fit(world, tmp_path, gradient_clip_val=1e-3, max_steps=2)))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_precision_is_refused(world: dict[str, str], tmp_path: Path, precision: Any) -> None:
    with pytest.raises(UserError, match=rf"trainer\.precision='{precision}' .* model\.compute_dtype"):
        fit(world, tmp_path, precision=precision)


@pytest.mark.parametrize(
    "profiler",
    ["simple", "advanced", "pytorch", PassThroughProfiler, SimpleProfiler, AdvancedProfiler, PyTorchProfiler],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_profilers(world: dict[str, str], tmp_path: Path, profiler: Any) -> None:
    made = profiler if isinstance(profiler, str) else profiler(**({} if profiler is PassThroughProfiler else {"dirpath": tmp_path, "filename": "profile"}))
    assert fit(world, tmp_path, profiler=made, max_steps=1).global_step == 1
    assert isinstance(profiler, str) or profiler is PassThroughProfiler or list(tmp_path.glob("*profile*"))


@pytest.mark.parametrize("plugin", [TorchCheckpointIO, LightningEnvironment, TorchSyncBatchNorm])
def test_plugins_that_work(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor], plugin: Any) -> None:
    made = fit(world, tmp_path, LastCheckpoint(1), plugins=[plugin()])
    assert equal(weights(made), plain)
    assert fit(world, tmp_path, LastCheckpoint(1), plugins=[plugin()], resume="last")._began_at == made.global_step


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plugins": [AsyncCheckpointIO()]}, r"trainer\.plugins='AsyncCheckpointIO' says that a checkpoint is saved before it is"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, r"trainer\.precision='bf16-mixed'"),
        ({"strategy": "fsdp"}, r"trainer\.strategy='fsdp' is FSDP1.* use fsdp2"),
        ({"strategy": "ddp_spawn"}, r"trainer\.strategy='spawn' forks or spawns .* use ddp"),
        ({"strategy": "ddp_fork"}, r"trainer\.strategy='fork' forks or spawns"),
        ({"strategy": ModelParallelStrategy()}, r"trainer\.strategy='ModelParallelStrategy' .* use fsdp2"),
        ({"default_root_dir": "s3://bucket/run"}, r"trainer\.default_root_dir='s3://bucket/run' is no folder of this host"),
    ],
)
def test_what_would_lose_checkpoints_or_ranks_is_refused(world: dict[str, str], tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer(tmp_path, callbacks=[LastCheckpoint()], **changes).fit(module(world), datamodule=data(world))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "ddp_find_unused_parameters_true", DDPStrategy, SingleDeviceStrategy])
def test_strategies_on_one_device(world: dict[str, str], tmp_path: Path, plain: dict[str, torch.Tensor], strategy: Any) -> None:
    """By their names without the command line, too."""
    made = fit(world, tmp_path, strategy=strategy if isinstance(strategy, str) else strategy(**({"device": "cpu"} if strategy is SingleDeviceStrategy else {})))
    for name, value in weights(made).items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.allclose(whole, plain[name], atol=1e-5), name
