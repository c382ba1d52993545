"""What a killed run goes on with: the losses of an unbroken run, bit for bit on as many ranks, the same packs on another number of them. And two nodes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, STARTED, descendants, make, metrics, run, save_world, start, store_files, wait_for
from tests.engines.parts import still_running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TWO_EPOCHS = {"trainer__max_epochs": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=60, validate=8)


@pytest.fixture(scope="module")
def whole(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of an unbroken run over two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = run("fit", "--config", str(make(folder, world, **TWO_EPOCHS)))
    assert code == 0, output
    return metrics(folder, "train/loss")


def kill_at(folder: Path, world: dict[str, Path], *words: str, steps: int, more: float) -> None:
    """Start a run and SIGKILL all of its processes at once, ``more`` seconds after so many steps."""
    process = start("fit", "--config", str(make(folder, world, **TWO_EPOCHS)), *words)
    log = folder / "metrics" / "csv" / "metrics.csv"
    saved = folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > steps and saved.exists(), timeout=120, what=f"{steps} steps", process=process)
    time.sleep(more)
    below = descendants(process.pid)
    for one in [process, *below]:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    left = still_running(below, timeout=15)
    assert not left


def test_kill_9_of_everything_then_last_goes_on_bit_for_bit(world: dict[str, Path], whole: list[float], tmp_path: Path) -> None:
    """Killed at a random moment: inside an accumulation, a validation or a save, in either epoch. On one rank the same bits, on two the same packs."""
    generator = random.Random(os.getpid())
    killed, two = tmp_path / "killed", tmp_path / "two"
    kill_at(killed, world, steps=generator.randint(2, len(whole) - 6), more=generator.uniform(0.0, 0.3))
    shutil.copytree(killed, two, ignore=shutil.ignore_patterns("shm"))
    code, output = run("fit", "--config", str(make(killed, world, **TWO_EPOCHS)), "--ckpt_path", "last")
    assert code == 0, output
    losses = metrics(killed, "train/loss")
    assert 0 < len(losses) < len(whole) and losses == whole[-len(losses) :]
    assert store_files(killed) == []
    words = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--ckpt_path", "last")
    code, output = run("fit", "--config", str(make(two, world, **TWO_EPOCHS)), *words)
    assert code == 0, output
    assert metrics(two, "train/loss") == pytest.approx(losses, rel=2e-4)


def test_from_two_ranks_to_one(world: dict[str, Path], whole: list[float], tmp_path: Path) -> None:
    kill_at(tmp_path, world, "--trainer.devices", "2", "--trainer.strategy", "ddp", steps=len(whole) // 2, more=0.1)
    code, output = run("fit", "--config", str(make(tmp_path, world, **TWO_EPOCHS)), "--ckpt_path", "last")
    assert code == 0, output
    losses = metrics(tmp_path, "train/loss")
    assert 0 < len(losses) < len(whole) and losses == pytest.approx(whole[-len(losses) :], rel=2e-4)


def test_a_killed_rank_ends_the_run_and_everything_of_it(world: dict[str, Path], tmp_path: Path) -> None:
    """Rank 1 dies with SIGKILL: rank 0 waits in a collective that will never end, and must not."""
    words = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "50")
    process = start("fit", "--config", str(make(tmp_path, world)), *words)
    log = tmp_path / "metrics" / "csv" / "metrics.csv"
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 3, timeout=120, what="three steps", process=process)
    below = descendants(process.pid)
    ranks = [p for p in below if "main.py" in " ".join(p.cmdline()) and p.environ().get("LOCAL_RANK") == "1"]
    assert len(ranks) == 1
    ranks[0].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    left = still_running(below, timeout=15)
    assert not left and store_files(tmp_path) == []


def test_two_nodes_one_coordinator_over_tcp_with_a_token(world: dict[str, Path], whole: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two torchrun agents on loopback: the coordinator is on the first, ranks of both stream from it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("TORCHSPEC_TOKEN", "a secret that both nodes know")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = make(tmp_path, world, **TWO_EPOCHS)
    nodes = []
    for node in (0, 1):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
        agent += ["--master_addr", "127.0.0.1", "--master_port", str(port), str(ROOT / "main.py"), "fit", "--config", str(config)]
        agent += ["--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
        nodes.append(subprocess.Popen(agent, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True))
    STARTED.extend(nodes)
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "rank 1 of 2" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert metrics(tmp_path, "train/loss") == pytest.approx(whole, rel=2e-4)
    assert store_files(tmp_path) == []
    coordinator = (tmp_path / "logs" / "coordinator.log").read_text()
    assert coordinator.count("listening on") == 1 and "a secret that both" not in coordinator
