"""``python main.py fit`` from end to end on a tiny target: real coordinator, real engine process, real store, export, resume, signals, faults."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.e2e.runs import descendants, engine_workers, make, metrics, run, save_world, start, store_files, wait_for
from tests.engines.parts import still_running
from tests.forks import cold

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=120, validate=12)


@pytest.fixture(scope="module")
def whole(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run as a user starts it, which other tests compare with."""
    folder = tmp_path_factory.mktemp("whole")
    with cold():
        code, output = run("fit", "--config", str(make(folder, world)))
    assert code == 0, output
    assert store_files(folder) == []
    return folder


def test_a_run_trains_logs_saves_and_exports(whole: Path) -> None:
    losses = metrics(whole, "train/loss")
    assert len(losses) >= 8
    assert sum(losses[-3:]) < sum(losses[:3])
    assert len(metrics(whole, "val/acceptance_length")) == 1
    assert (whole / "checkpoints" / "last.ckpt").is_file() and (whole / "config.yaml").is_file()
    tensors = load_file(whole / "draft" / "model.safetensors")
    described = json.loads((whole / "draft" / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLMEagle3"] and described["draft_vocab_size"] == 128
    assert tensors["lm_head.weight"].shape[0] == 128 and tensors["d2t"].shape == (128,) and not any(name.startswith("model.") for name in tensors)
    assert (whole / "logs" / "coordinator.log").is_file() and (whole / "logs" / "worker-0.log").is_file()
    pipeline = json.loads((whole / "pipeline.json").read_text())
    assert pipeline["tokens_per_s"] > 0 and pipeline["store"] == "shm" and pipeline["steps"] == len(losses)
    origin = json.loads((whole / "provenance.json").read_text())
    assert origin["target"]["num_layers"] == 8 and "fit" in origin["command"] and origin["packages"].keys() >= {"torch", "lightning"} and origin["torchspec"]
    assert origin["config"]["data"]["max_length"] == 128 and origin["config"]["model"]["unroll_steps"] == 3 and set(origin["data"]) == {"train", "validate"}
    assert torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Provenance"]["record"] == origin
    assert not (whole / "failed_samples.jsonl").exists()
    card = (whole / "draft" / "README.md").read_text()
    assert "| data | train.jsonl, 120 conversations |" in card and "| loss | forward_kl 1 |" in card and "| optimizer | " in card


def test_each_rank_has_a_log(whole: Path) -> None:
    assert "rank 0 of 1" in (whole / "logs" / "rank-0.log").read_text()


def test_a_worker_by_hand_and_the_draft_served_after_training(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``workers: 0`` waits for ``main.py worker``; AcceptanceLength behind ExportDraft serves the draft in real vLLM when training is over."""
    pytest.importorskip("vllm")
    config = make(tmp_path, world, trainer__max_steps=3)
    described = yaml.safe_load(config.read_text())
    callbacks = described["trainer"]["callbacks"]
    (acceptance,) = [c for c in callbacks if c["class_path"].endswith("AcceptanceLength")]
    callbacks.remove(acceptance)
    acceptance["init_args"] |= {"serve_prompts": str(world["validate"]), "serve_limit": 4, "serve_max_new_tokens": 8}
    callbacks.append(acceptance)
    config.write_text(yaml.safe_dump(described))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("TORCHSPEC_TOKEN", "a shared secret")
    process = start("fit", "--config", str(config), "--data.engines.workers", "0", "--data.engines.listen", address)
    log = tmp_path / "logs" / "coordinator.log"
    wait_for(lambda: log.is_file() and "listening" in log.read_text(), timeout=60, what="the coordinator", process=process)
    worker = start("worker", "--coordinator", address, "--device", "cpu")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "joined (host " in output and " left " not in output and set(metrics(tmp_path, "engines/alive")) == {1.0}, output
    said, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, said
    served = json.loads((tmp_path / "vllm_acceptance.json").read_text())
    assert served["prompts"] == 4 and served["acceptance_length"] >= 1.0


def test_fsdp2_on_two_processes_equals_one_with_accumulation(world: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    code, output = run("fit", "--config", str(make(tmp_path, world)), "--trainer.strategy", "fsdp2", "--trainer.devices", "2")
    assert code == 0, output
    assert metrics(tmp_path, "train/loss") == pytest.approx(metrics(whole, "train/loss"), rel=2e-4)
    assert metrics(tmp_path, "val/acceptance_length") == pytest.approx(metrics(whole, "val/acceptance_length"), abs=0.02)
    ours, theirs = (load_file(folder / "draft" / "model.safetensors") for folder in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    assert (ours["fc.weight"].float() - theirs["fc.weight"].float()).abs().max() < 2e-3


def test_fast_dev_run_steps_inside_an_accumulation_under_fsdp2(world: dict[str, Path], tmp_path: Path) -> None:
    one = ("--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--data.packs_per_step", "2", "--trainer.fast_dev_run", "true")
    code, output = run("fit", "--config", str(make(tmp_path, world)), *one)
    assert code == 0, output


def test_muon_under_fsdp2_equals_one_process_and_resumes(world: dict[str, Path], tmp_path: Path) -> None:
    """With everything that sharding could miss: decay, fc among the matrices, and a head that is sharded and not trained."""
    settings = {"lr": 0.002, "muon_lr": 0.02, "weight_decay": 0.1, "muon_weight_decay": 2.0, "matrices": "layers_and_fc", "adjust_lr": "match_rms_adamw"}
    made = {"model__optimizer": {"class_path": "torchspec.models.optim.muon.MuonAdamW", "init_args": settings}, "model__train_head": False}
    code, output = run("fit", "--config", str(make(tmp_path / "one", world, **made)), "--trainer.max_steps", "4")
    assert code == 0, output
    sharded = ("fit", "--config", str(make(tmp_path / "two", world, **made)), "--trainer.strategy", "fsdp2", "--trainer.devices", "2")
    length = ("--model.lr_scheduler.total_steps", "4")
    code, output = run(*sharded, "--trainer.max_steps", "2", *length)
    assert code == 0, output
    losses = metrics(tmp_path / "two", "train/loss")
    code, output = run(*sharded, "--trainer.max_steps", "4", *length, "--ckpt_path", "last")
    assert code == 0, output
    losses += metrics(tmp_path / "two", "train/loss")
    assert losses == pytest.approx(metrics(tmp_path / "one", "train/loss"), rel=2e-4)
    heads = [load_file(tmp_path / name / "draft" / "model.safetensors")["lm_head.weight"] for name in ("one", "two")]
    assert torch.equal(*heads) and bool((heads[0] != 0).any())


@pytest.mark.cold_start
def test_ddp_on_two_processes_equals_one_with_accumulation(world: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    code, output = run("fit", "--config", str(make(tmp_path, world)), "--trainer.strategy", "ddp", "--trainer.devices", "2")
    assert code == 0, output
    assert metrics(tmp_path, "train/loss") == pytest.approx(metrics(whole, "train/loss"), rel=2e-4)


def test_killed_worker_is_replaced_and_nothing_is_lost(world: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    process = start("fit", "--config", str(make(tmp_path, world)))
    worker: list[psutil.Process] = []

    def working() -> bool:
        worker[:] = engine_workers(process.pid)
        return bool(worker) and (tmp_path / "metrics" / "csv" / "metrics.csv").exists()

    wait_for(working, timeout=120, what="the first training step", process=process)
    worker[0].kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert metrics(tmp_path, "train/loss") == pytest.approx(metrics(whole, "train/loss"), rel=1e-5)
    assert not (tmp_path / "failed_samples.jsonl").exists()
    assert "restart" in (tmp_path / "logs" / "coordinator.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", [pytest.param("engine start", marks=pytest.mark.cold_start), "mid-step", "waiting for data"])
def test_a_signal_leaves_nothing_behind(world: dict[str, Path], tmp_path: Path, number: signal.Signals, moment: str) -> None:
    process = start("fit", "--config", str(make(tmp_path, world, trainer__max_epochs=50)))
    seen: set[psutil.Process] = set()

    def engines() -> list[psutil.Process]:
        seen.update(descendants(process.pid))
        return engine_workers(process.pid)

    wait_for(lambda: bool(engines()), timeout=120, what="an engine worker", process=process)
    if moment != "engine start":
        wait_for(lambda: (tmp_path / "metrics" / "csv" / "metrics.csv").exists(), timeout=120, what="the first steps", process=process)
        engines()
    if moment == "waiting for data":
        stopped = engines()[0]
        stopped.suspend()
        csv = tmp_path / "metrics" / "csv" / "metrics.csv"
        sizes = [csv.stat().st_size]

        def quiet() -> bool:
            sizes.append(csv.stat().st_size)
            return len(sizes) > 60 and len(set(sizes[-40:])) == 1

        wait_for(quiet, timeout=120, what="the trainer to run out of data", process=process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    left = still_running(list(seen), timeout=10)
    assert not left, left
    assert store_files(tmp_path) == []
    if moment != "engine start":
        last = tmp_path / "checkpoints" / "last.ckpt"
        assert last.exists(), output
        code, output = run("fit", "--config", str(make(tmp_path, world)), "--ckpt_path", "last", "--trainer.max_steps", "1000")
        assert code == 0, output


def test_resume_is_exact(world: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    """The losses after a resume are those of the unbroken run, bit for bit."""
    unbroken = metrics(whole, "train/loss")
    file = str(make(tmp_path, world))
    code, output = run("fit", "--config", file, "--trainer.max_steps", "4", "--model.lr_scheduler.total_steps", str(len(unbroken)))
    assert code == 0, output
    assert metrics(tmp_path, "train/loss") == unbroken[:4]
    code, output = run("fit", "--config", file, "--ckpt_path", "last")
    assert code == 0, output
    assert "Restored all states" in output
    assert metrics(tmp_path, "train/loss") == unbroken[4:]
