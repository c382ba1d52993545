"""Runs ``kernel_grid.py`` in a process of its own: Triton decides at its first import whether it interprets, and other tests import it before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
GRID = Path(__file__).with_name("kernel_grid.py")


def test_kernels_equal_their_twins() -> None:
    command = [sys.executable, "-m", "pytest", str(GRID), "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=0"]
    done = subprocess.run(command, cwd=GRID.parents[2], capture_output=True, text=True, timeout=280, check=False)
    passed = re.search(r"^(\d+) passed in ", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed is not None, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed[1]) > 50
