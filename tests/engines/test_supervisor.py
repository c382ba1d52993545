"""Worker processes: ending a group leaves none of its shared memory behind, and what a log says last is said without bars and older runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torchspec.engines.supervisor import WorkerProcess
from torchspec.logs import keep_one_before

PARENT = """
import multiprocessing, sys, time
from multiprocessing.shared_memory import SharedMemory

def hold(names):
    names.put(SharedMemory(create=True, size=4096).name)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    mine = SharedMemory(create=True, size=4096)
    child = context.Process(target=hold, args=(names,))
    child.start()
    print(mine.name, names.get(), flush=True)
    if sys.argv[1:] == ["killed"]:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""


@pytest.mark.parametrize("ended", ["killed", "running"])
def test_shared_memory_of_a_group_that_is_ended_is_gone(ended: str, tmp_path: Path) -> None:
    """As vLLM does: segments of the worker and of a process that it spawned, whether the worker was killed before or is killed with the rest."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen([sys.executable, str(script), ended], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    files = [Path("/dev/shm") / name for name in process.stdout.readline().decode().split()]
    assert len(files) == 2 and all(file.exists() for file in files)
    if ended == "killed":
        process.wait(10)
    worker = WorkerProcess("worker-0", "cpu", tmp_path / "log", process=process)
    worker.kill()
    worker.reap()
    assert not [file for file in files if file.exists()]
    process.stdout.close()


def test_why_a_process_ended_is_of_that_process_alone(tmp_path: Path) -> None:
    """The error by name; of one that was killed the last lines. No bars, nothing of the process before."""
    log = tmp_path / "worker-0.log"
    older = "ValueError: of the process before\n"
    lines = "Loading:  50%|##   | 1/2\rLoading: 100%|####| 2/2\n" + "".join(f"line {i}\n" for i in range(20))
    log.write_text(older + "Traceback (most recent call last):\n  File x\nAssertionError: no CUDA\n" + lines)
    worker = WorkerProcess("worker-0", "cpu", log, log_from=len(older))
    assert worker.why(1) == f"AssertionError: no CUDA; see {log}"
    assert worker.why(-9) == "its log ends: " + " | ".join(f"line {i}" for i in range(8, 20))
    log.write_text(older + lines)
    assert worker.why(1) == worker.why(-9)
    log.write_text(older)
    assert worker.why(1) == "its log ends: (log is empty)"
    assert WorkerProcess("worker-0", "cpu", tmp_path / "none").why(1) == "it has no log"


def test_a_run_begins_its_log_and_keeps_the_one_before(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    for words in ("first", "second", "third"):
        keep_one_before(log)
        assert not log.exists()
        log.write_text(words)
    assert (tmp_path / "worker-0.log.before").read_text() == "second" and len(list(tmp_path.iterdir())) == 2
