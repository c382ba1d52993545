"""Engine worker processes of this host: start, log file, restart with back-off, kill. Used by the coordinator, in its main thread."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torchspec

log = logging.getLogger(__name__)
_LAST_LINES = 12


@dataclass
class WorkerProcess:
    """One worker and what is known of it."""

    name: str
    device: str
    """cpu, or CUDA indices such as "0" or "0,1"."""
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ready: bool = False
    was_ready: bool = False
    restarts: int = 0
    next_start: float = 0.0
    last_beat: float = 0.0

    def start(self, *, host: str, port: int, token: str, now: float) -> None:
        """Start a fresh interpreter in a session of its own."""
        environment = {**os.environ, "TORCHSPEC_TOKEN": token, "TORCHSPEC_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        root = str(Path(torchspec.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        if self.device != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = self.device
        command = [sys.executable, "-m", "torchspec.engines.worker", "--coordinator", f"{host}:{port}", "--name", self.name, "--device", "cpu" if self.device == "cpu" else "cuda:0"]
        with self.log_file.open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
        self.started = self.last_beat = now
        self.ready = False
        log.info("%s started: pid %d, device %s, log %s", self.name, self.process.pid, self.device, self.log_file)

    def exit_code(self) -> int | None:
        """None while it runs or was never started."""
        return None if self.process is None else self.process.poll()

    def kill(self) -> None:
        """End the whole process group now."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def reap(self, timeout: float = 5.0) -> None:
        """Collect the exit code after :meth:`kill`."""
        if self.process is not None:
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                log.error("%s (pid %d) does not die", self.name, self.process.pid)

    def back_off(self, now: float) -> float:
        """Count a restart and set its time: 0.5 s, doubling, at most 30 s."""
        delay = min(0.5 * 2**self.restarts, 30.0)
        self.restarts += 1
        self.process, self.ready, self.next_start = None, False, now + delay
        return delay

    def last_lines(self) -> str:
        """The end of its log, on one line."""
        try:
            with self.log_file.open("rb") as handle:
                handle.seek(0, os.SEEK_END)
                handle.seek(max(0, handle.tell() - 8192))
                lines = handle.read().decode(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return " | ".join(line.strip() for line in lines[-_LAST_LINES:] if line.strip()) or "(log is empty)"


def end_all(workers: list[WorkerProcess]) -> None:
    """Kill and reap every worker."""
    started = time.monotonic()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.reap()
    log.info("%d workers ended in %.2f s", len(workers), time.monotonic() - started)
