"""The pipeline benchmark runs: a real group, store and trainer, a paced source in place of the target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--hidden 128 --intermediate 256 --layers 8 --heads 2 --kv_heads 1 --head_dim 64 --vocab 512 --draft_vocab 256 --unroll_steps 3 "
    "--max_tokens 256 --max_length 128 --median 40 --budget 2MiB --warm 3"
).split()


@pytest.mark.slow
@pytest.mark.alone
def test_it_paces_the_source_and_counts_the_wait(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/pipeline.py"),
        *TINY,
        "--stores",
        "mooncake",
        "--steps",
        "24",
        "--pace",
        "0.25",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    free, paced = (json.loads(line) for line in done.stdout.splitlines())
    assert (free["store"], free["source"], paced["source"]) == ("mooncake", "free", "0.25x")
    assert paced["arrival_tokens_per_s"] == pytest.approx(0.25 * free["trainer_tokens_per_s"], rel=0.01)
    # the store holds a fraction of the data, so the source cannot run ahead: at 0.25 of the trainer's rate it makes the trainer wait more than half of the time
    assert paced["tokens_per_s"] < 0.6 * free["trainer_tokens_per_s"]
    assert paced["wait_fraction"] > 0.3 and paced["wait_fraction"] > free["wait_fraction"]
    assert not list(tmp_path.iterdir())  # nothing is left behind
