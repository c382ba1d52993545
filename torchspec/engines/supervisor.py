"""Engine worker processes of this host: start, log file, watch, restart with back-off, kill. Used by the coordinator, in its main thread
(the parent-death signal of a child follows the thread that started it)."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torchspec
from torchspec.engines.client import Endpoint
from torchspec.engines.engine import EngineConfig
from torchspec.engines.handshake import SECRET_VARIABLE
from torchspec.errors import UserError
from torchspec.logs import keep_one_before
from torchspec.network import host_port
from torchspec.processes import kill_group
from torchspec.reasons import last_error_in, without_bars

log = logging.getLogger("torchspec.supervisor")
_LAST_LINES = 12
_LAST_WORDS = 2.0
"""Seconds for a worker that lost its connection to end by itself."""


@dataclass
class WorkerProcess:
    """One worker and what is known of it."""

    name: str
    device: str
    """cpu, or CUDA indices such as "0" or "0,1"."""
    log_file: Path
    answers: bool = False
    """It only answers prompts (``data.on_policy.answer_workers``)."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ready: bool = False
    was_ready: bool = False
    restarts: int = 0
    next_start: float = 0.0
    kill_at: float | None = None
    given_up: bool = False
    """It is not started again."""
    refused: str = ""
    """Why what this process would do is of no use to the run: another one would be no better."""
    killed: str = ""
    """Why it was killed, where it was."""
    late: str = ""
    """Why it was killed before it was ready."""
    user: list[str] = field(default_factory=list)
    """``UserError.words`` of why it cannot serve, where it said so."""
    seen_dead: bool = False
    log_from: int = 0
    """Where in the log the process that was started last begins."""
    secret: str = ""
    """Of the process that was started last, random: it proves its name with it (``handshake.py``)."""

    def start(self, endpoint: Endpoint, *, now: float) -> None:
        """Start a fresh interpreter in a session of its own."""
        self.secret = secrets.token_hex(16)
        environment = {**os.environ, "TORCHSPEC_TOKEN": endpoint.token, SECRET_VARIABLE: self.secret, "PYTHONUNBUFFERED": "1"}
        environment["TORCHSPEC_PARENT"] = str(os.getpid())
        root = str(Path(torchspec.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        on_cpu = self.device == "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else self.device
        module = [sys.executable, "-m", "torchspec.engines.worker"]
        options = ["--coordinator", host_port(endpoint.host, endpoint.port), "--name", self.name, "--device", "cpu" if on_cpu else "cuda:0"]
        if not self.restarts:
            keep_one_before(self.log_file)
        with self.log_file.open("ab") as output:
            self.log_from = output.tell()
            self.process = subprocess.Popen(
                [*module, *options], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.started = now
        self.ready, self.kill_at, self.seen_dead, self.refused, self.late, self.killed, self.user = False, None, False, "", "", "", []
        log.info("%s started: pid %d, device %s, log %s", self.name, self.process.pid, self.device, self.log_file)

    def kill(self) -> None:
        """End the whole process group now."""
        if self.process is not None:
            kill_group(self.process.pid)

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

    def why(self, code: int) -> str:
        """What its log says of the end of its process: the error by name where one ended it, else the last lines, on one line and without progress bars."""
        try:
            with self.log_file.open("rb") as handle:
                handle.seek(0, os.SEEK_END)
                handle.seek(max(self.log_from, handle.tell() - 65536))
                lines = without_bars(handle.read().decode(errors="replace"))
        except OSError:
            return "it has no log"
        error = last_error_in(lines) if code > 0 else None
        if error is not None:
            return f"{error[:500]}; see {self.log_file}"
        return f"its log ends: {' | '.join(lines[-_LAST_LINES:]) or '(log is empty)'}"


class Supervisor:
    """Keeps the workers of this host alive.

    Args:
        processes: one a worker, not started.
        limits: ``start_timeout``, ``silence_timeout`` and ``max_restarts`` of it.
        on_end: called with a worker's name, and how, when its process has ended (and is reaped: it can write nothing more).
        on_given_up: called then with the name of one that will not be started again, the reason, and the words of a ``UserError`` where it is one.
    """

    def __init__(
        self,
        processes: list[WorkerProcess],
        *,
        limits: EngineConfig,
        on_end: Callable[[str, str], None],
        on_given_up: Callable[[str, str, list[str] | None], None],
    ) -> None:
        self.processes = processes
        self.restarts = 0
        self._limits = limits
        self._on_end = on_end
        self._on_given_up = on_given_up
        self._endpoint: Endpoint | None = None

    def start(self, endpoint: Endpoint, *, now: float) -> None:
        """Start every worker; from now on :meth:`watch` restarts them."""
        self._endpoint = endpoint
        for process in self.processes:
            process.start(endpoint, now=now)

    def owns(self, name: str) -> bool:
        """Whether a worker was started here, by name."""
        return any(process.name == name for process in self.processes)

    def answers(self, name: str) -> bool:
        """Whether the worker was started to answer prompts, and no more."""
        return any(process.name == name and process.answers for process in self.processes)

    def secret(self, name: str) -> str:
        """What the process that was started under this name knows beside the run token; "" where none was."""
        return next((process.secret for process in self.processes if process.name == name), "")

    def ready(self, name: str) -> None:
        """The worker has said so."""
        for process in self.processes:
            if process.name == name:
                process.ready = process.was_ready = True

    def unfit(self, name: str, words: list[str]) -> None:
        """The worker has said why it cannot serve, and ends."""
        for process in self.processes:
            if process.name == name:
                process.user = words

    def refuse(self, name: str, why: str) -> None:
        """What the worker would do is of no use: end it, and start no other in its place."""
        for process in self.processes:
            if process.name == name:
                process.refused = why
        self.kill(name, f"refused, {why}: killed")

    def disconnected(self, name: str, *, now: float) -> None:
        """The worker's connection ended. It is ending, we hope, and has a moment to write down why."""
        for process in self.processes:
            if process.name == name and process.kill_at is None:
                process.kill_at = now + _LAST_WORDS

    def kill(self, name: str, why: str) -> None:
        """End a worker; :meth:`watch` sees it."""
        for process in self.processes:
            if process.name == name and process.process is not None and process.process.poll() is None:
                log.error("%s: %s", name, why)
                process.killed = process.killed or why
                process.kill()

    def watch(self, now: float, beats: Mapping[str, float]) -> None:
        """Look at every worker once.

        Args:
            now: monotonic seconds.
            beats: time of the last heartbeat of each connected worker.
        """
        for process in self.processes:
            if process.given_up:
                continue
            if process.process is None:
                if self._endpoint is not None and now >= process.next_start:
                    process.start(self._endpoint, now=now)
                continue
            code = process.process.poll()
            if code is not None:
                if process.seen_dead:  # by now its last words, which it sent over its connection, have been read
                    self._ended(process, code, now)
                process.seen_dead = True
            elif process.kill_at is not None and now >= process.kill_at:
                self.kill(process.name, "connection lost: killed")
            elif process.ready and now - beats.get(process.name, now) > self._limits.silence_timeout:
                self.kill(process.name, f"silent for more than {self._limits.silence_timeout:.0f} s (data.engines.silence_timeout): killed")
            elif not process.ready and now - process.started > self._limits.start_timeout:
                process.late = f"{process.name} was not ready after data.engines.start_timeout={self._limits.start_timeout:g} s"
                self.kill(process.name, f"{process.late}: killed")

    def close(self) -> None:
        """Kill and reap every worker."""
        started = time.monotonic()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.reap()
        log.info("%d workers ended in %.2f s", len(self.processes), time.monotonic() - started)

    def _ended(self, process: WorkerProcess, code: int, now: float) -> None:
        process.kill()  # what is left of its group
        how = f"signal {-code}" if code < 0 else f"code {code}"
        self._on_end(process.name, process.killed or f"ended with {how}")
        ending = process.late or f"{process.name} ended with {how}"
        if process.refused or not process.was_ready or process.restarts >= self._limits.max_restarts:
            process.given_up = True
            if process.refused:
                reason = process.refused
            elif process.was_ready:
                reason = f"{ending} after {process.restarts} restarts (data.engines.max_restarts): {process.why(code)}"
            else:
                reason = f"{ending}{'' if process.late else ' before it was ready'}: {process.why(code)}"
            user = process.user if not process.refused and process.user else None
            log.error("%s is not started again: %s", process.name, reason)
            self._on_given_up(process.name, str(UserError.of(user)) if user else reason, user)
        else:
            delay = process.back_off(now)
            self.restarts += 1
            log.warning("%s ended with %s: restart %d in %.1f s", process.name, how, process.restarts, delay)
