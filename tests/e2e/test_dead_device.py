"""A kernel that really traps: the run ends in one line with exit code 1, the last good checkpoint is what it was, and
``--ckpt_path last`` goes on."""

from __future__ import annotations

import hashlib
import json
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.runs import descendants, make, run, save_world, start, store_files
from torchspec.models.training.checkpoint import read_entries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WORDS = {"trap": "unspecified launch failure", "far": "illegal memory access", "assert": "device-side assert"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=40, validate=6)


def settings(folder: Path, world: dict[str, Path], *, steps: int) -> Path:
    return make(folder, world, trainer__accelerator="gpu", trainer__max_steps=steps, trainer__max_epochs=-1, model__compute_dtype="bf16")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", sorted(WORDS))
def test_a_kernel_that_traps_ends_the_run_in_one_line(how: str, world: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    file = settings(tmp_path, world, steps=4)
    code, output = run("fit", "--config", str(file))
    assert code == 0, output[-4000:]
    kept = hashlib.sha256(checkpoint.read_bytes()).hexdigest()

    dies = json.dumps({"class_path": "tests.e2e.traps.EndDevice", "init_args": {"at": 5, "how": how}})
    file = settings(tmp_path, world, steps=8)
    dying = start("fit", "--config", str(file), "--ckpt_path", "last", "--trainer.callbacks+", dies)
    below, output = {}, None
    while output is None:
        below |= {process.pid: process for process in descendants(dying.pid)}
        with suppress(subprocess.TimeoutExpired):
            output, _ = dying.communicate(timeout=0.2)
    assert dying.returncode == 1, output[-4000:]
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and WORDS[how] in said[0] and "optimizer steps" in said[0], output[-4000:]
    assert f"{checkpoint} is whole: go on with --ckpt_path last" in said[0]
    assert "Traceback" not in output
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == kept
    assert [path.name for path in checkpoint.parent.iterdir() if "partial" in path.name or "previous" in path.name] == []
    _, left = psutil.wait_procs(below.values(), timeout=30)
    assert left == [] and store_files(tmp_path) == []

    code, output = run("fit", "--config", str(file), "--ckpt_path", "last")
    assert code == 0, output[-4000:]
    assert read_entries(checkpoint)["global_step"] == 8
