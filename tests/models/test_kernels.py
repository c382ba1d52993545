"""Runs ``kernel_grid.py`` and ``kernel_compile.py`` in processes of their own: Triton decides at its first import whether it interprets, and other tests
import it before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
GRID = Path(__file__).with_name("kernel_grid.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "pytest", str(GRID), "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=0"]
    done = subprocess.run(command, cwd=GRID.parents[2], capture_output=True, text=True, timeout=840, check=False)
    passed = re.search(r"^(\d+) passed\b", done.stdout, re.MULTILINE)  # warnings or minutes may follow
    assert done.returncode == 0 and passed is not None, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed[1]) > 50


def test_kernels_compile_for_an_h100() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.models.kernel_compile"]
    done = subprocess.run(command, cwd=GRID.parents[2], env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    names = {line.split()[0] for line in done.stdout.splitlines()}
    both_ways = {f"{file}.{way}" for file in ("layer_input", "merge", "norm", "swiglu") for way in ("_forward", "_backward")}
    others = {"heads._split", "heads._join", "loss._losses", "target._ask"}
    assert both_ways | others | {f"rows.{name}" for name in ("_spread", "_beside", "_add", "_gather", "_scale")} <= names
    assert {f"block_attention.{name}" for name in ("_forward", "_backward_rows", "_backward_context")} <= names
    narrow = {f"fp8.{name}" for name in ("_quantise", "_round_both", "_transpose", "_turn")}
    assert narrow | {f"swiglu.{name}" for name in ("_forward_rounded", "_backward_rounded", "_backward_turned")} <= names
