"""A process that tests fork (``tests/forks``) is, but for the time of its imports, the process that it would be."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.forks import client, cold

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tests.house.forked"]

pytestmark = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="every process starts cold beside a GPU")


def start(*words: str, **popen: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GIVEN": "a b=c", "OMP_NUM_THREADS": "2", **popen.pop("env", {})}
    return subprocess.Popen([*COMMAND, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, **popen)


def seen(*words: str, **popen: Any) -> dict[str, Any]:
    process = start(*words, **popen)
    output, errors = process.communicate("said\n", timeout=60)
    assert process.returncode == 7 and not errors, errors
    found: dict[str, Any] = json.loads(output)
    assert found.pop("parent") == os.getpid()
    return found


def test_a_fork_and_a_fresh_interpreter_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOT_GIVEN", "then taken away")
    monkeypatch.delenv("NOT_GIVEN")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    read, write = os.pipe()
    words, given = ("one", "two words", ""), {"cwd": tmp_path, "start_new_session": True, "pass_fds": (write,)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, before[1]))
        forked = seen(*words, **given)
        with cold():
            fresh = seen(*words, **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.close(read)
        os.close(write)
    for found in (forked, fresh):
        assert found.pop("environment")[:2] == [True, "a b=c"]
    assert forked == fresh
    assert forked["input"] == "said\n" and forked["group"] and forked["size"] == 1 << 40 and write in forked["files"]


def test_a_fork_says_how_it_ended_and_its_forks_end_with_it() -> None:
    process = start("fails")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "ValueError: on purpose" in errors
    process = start("another")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == [process.pid, 7, process.pid]
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("waits" in " ".join(one.cmdline()) for one in below)
    process.communicate("go on\n", timeout=60)
    assert process.returncode == -9
    deadline = time.monotonic() + 10
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["/bin/true"], {}),
        ([sys.executable, "-c", "pass"], {}),
        ([sys.executable, "-m", "pip"], {}),
        ([sys.executable, "other/main.py"], {}),
        (COMMAND, {"PYTHONPATH": "/elsewhere"}),
        (COMMAND, {client.COLD: "1"}),
        (COMMAND, {"SOMETHING": "x" * client.VARIABLES}),
    ],
)
def test_what_a_fork_cannot_be_starts_cold(words: list[str], changes: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert client._waiting(words, environment | changes) is None
    assert client._waiting(COMMAND, environment) is not None
