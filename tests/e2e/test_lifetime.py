"""How a run ends when something of it dies or is told to: within seconds, with one clear line, nothing left, and a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.e2e.runs import descendants, make, metrics, run, save_world, start, store_files, wait_for
from tests.engines.parts import still_running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=60, validate=16)


def begin(folder: Path, world: dict[str, Path], *words: str, moment: str = "never", at: int = 0, rank: int = 0, number: int = 9) -> subprocess.Popen[str]:
    """A run of many epochs with a witness in it."""
    witness = ["--trainer.callbacks+=tests.e2e.moments.Witness", f"--trainer.callbacks.folder={folder}", f"--trainer.callbacks.moment={moment}"]
    witness += [f"--trainer.callbacks.at={at}", f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.number={number}"]
    return start("fit", "--config", str(make(folder, world, trainer__max_epochs=50)), *witness, *words)


def trains(folder: Path, process: subprocess.Popen[str], *, steps: int = 3) -> list[psutil.Process]:
    """Waits for optimizer steps and a checkpoint; what runs then."""
    log, saved = folder / "metrics" / "csv" / "metrics.csv", folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > steps and saved.exists(), timeout=120, what=f"{steps} steps", process=process)
    return descendants(process.pid)


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ended(folder: Path, process: subprocess.Popen[str], below: list[psutil.Process], *, timeout: float) -> str:
    """The output, once nothing of the run is left."""
    output, _ = process.communicate(timeout=timeout)
    left = still_running(below, timeout=10)
    assert not left, (left, output)
    assert store_files(folder) == []
    return output


def resumes(folder: Path, world: dict[str, Path], *words: str) -> None:
    """Two steps more than the last checkpoint has."""
    steps = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    words = ("--ckpt_path", "last", "--trainer.max_steps", str(steps + 2), *words)
    code, output = run("fit", "--config", str(make(folder, world, trainer__max_epochs=50)), *words)
    assert code == 0 and steps > 0, output
    assert len(metrics(folder, "train/loss")) == 2


@pytest.mark.parametrize(
    ("what", "store", "says"),
    [
        ("torchspec.engines.coordinator", "shm", "coordinator"),
        ("mooncake_master", "mooncake", "store"),
        ("torchspec.transfer.segment", "mooncake", "store"),
    ],
    ids=["coordinator", "master", "segment holder"],
)
def test_a_part_that_dies_ends_the_run_at_once_with_one_line(world: dict[str, Path], tmp_path: Path, what: str, store: str, says: str) -> None:
    if store == "mooncake":
        pytest.importorskip("mooncake.store")
    process = begin(tmp_path, world, "--data.store.kind", store)
    below = trains(tmp_path, process)
    (victim,) = [p for p in below if what in words_of(p)]
    victim.kill()
    killed = time.monotonic()
    output = ended(tmp_path, process, below, timeout=60)
    took = time.monotonic() - killed
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1 and says in lines[0] and "Traceback" not in output, output
    assert took < 20.0, f"{took:.1f} s"  # to the end of the process; to the error see tests/lifecycle
    if store == "shm":
        resumes(tmp_path, world)


@pytest.mark.parametrize(("rank", "moment", "at"), [(0, "validation", 3), (1, "validation", 3), (1, "epoch", 1)])
def test_sigterm_to_one_rank_of_two_ends_both(world: dict[str, Path], tmp_path: Path, rank: int, moment: str, at: int) -> None:
    process = begin(tmp_path, world, *TWO_RANKS, moment=moment, at=at, rank=rank, number=signal.SIGTERM)
    below = trains(tmp_path, process)
    output = ended(tmp_path, process, below, timeout=60)
    assert (tmp_path / "signalled").exists() and process.returncode == 128 + signal.SIGTERM, output
    resumes(tmp_path, world, *TWO_RANKS)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_two_ranks_wait_for_data_ends_them(world: dict[str, Path], tmp_path: Path, rank: int) -> None:
    process = begin(tmp_path, world, *TWO_RANKS, "--data.engines.silence_timeout", "600")
    below = trains(tmp_path, process)
    (worker,) = [p for p in below if "torchspec.engines.worker" in words_of(p)]
    worker.suspend()
    time.sleep(5)  # longer than what is prefetched lasts
    (other,) = [p for p in below if "main.py" in words_of(p) and p.environ().get("LOCAL_RANK") == "1"]
    (process if rank == 0 else other).terminate()
    output = ended(tmp_path, process, below, timeout=45)
    assert process.returncode == 128 + signal.SIGTERM, output


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_of_two_before_the_first_step(world: dict[str, Path], tmp_path: Path, rank: int) -> None:
    process = begin(tmp_path, world, *TWO_RANKS, moment="setup", rank=rank, number=signal.SIGTERM)
    below: set[psutil.Process] = set()
    while process.poll() is None:
        below.update(descendants(process.pid))
        time.sleep(0.1)
    output = ended(tmp_path, process, list(below), timeout=10)
    assert process.returncode == 128 + signal.SIGTERM, output


def test_a_killed_rank_0_takes_the_other_rank_and_the_engines_along(world: dict[str, Path], tmp_path: Path) -> None:
    process = begin(tmp_path, world, *TWO_RANKS)
    below = trains(tmp_path, process)
    process.kill()
    ended(tmp_path, process, below, timeout=60)


@pytest.mark.parametrize("moment", ["validation", "save"])
def test_sigterm_inside_a_validation_or_a_save_leaves_a_whole_checkpoint(world: dict[str, Path], tmp_path: Path, moment: str) -> None:
    process = begin(tmp_path, world, moment=moment, at=3, number=signal.SIGTERM)
    below = trains(tmp_path, process, steps=2)
    output = ended(tmp_path, process, below, timeout=120)
    assert (tmp_path / "signalled").exists() and process.returncode == 128 + signal.SIGTERM, output
    resumes(tmp_path, world)


def test_a_second_ctrl_c_ends_a_run_that_hangs(world: dict[str, Path], tmp_path: Path) -> None:
    """The first one waits for the end of the step, which never comes: the rank sits in a call that nothing wakes."""
    process = begin(tmp_path, world)
    below = trains(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    output = ended(tmp_path, process, below, timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output


def test_engines_that_hang_are_replaced_and_training_goes_on(world: dict[str, Path], tmp_path: Path) -> None:
    process = begin(tmp_path, world, "--data.engines.silence_timeout", "2", "--trainer.max_steps", "24")
    below = trains(tmp_path, process)
    (worker,) = [p for p in below if "torchspec.engines.worker" in words_of(p)]
    worker.suspend()
    output = ended(tmp_path, process, below, timeout=120)
    assert process.returncode == 0, output
    log: Any = (tmp_path / "logs" / "coordinator.log").read_text()
    assert "silent for more than 2 s" in log and "restart 1" in log and len(metrics(tmp_path, "train/loss")) == 24
