"""The engine group as its owner (global rank 0's datamodule) sees it: start, watch, close.

The coordinator is a fresh interpreter in a session of its own, so that a Ctrl-C in the terminal reaches it through its owner only. The pipe to
its stdin is the lifeline: when this process goes, however it goes, the coordinator ends everything. ``close`` is idempotent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torchspec
from torchspec.engines.client import Endpoint, GroupStopped
from torchspec.engines.engine import EngineConfig, OnPolicy
from torchspec.engines.group_config import CoordinatorConfig
from torchspec.engines.table import find_engine
from torchspec.errors import UserError
from torchspec.network import is_loopback
from torchspec.target import TargetConfig
from torchspec.transfer import remove_leftovers
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import StoreConfig

__all__ = ["Endpoint", "EngineGroup", "GroupConfig", "GroupStopped"]

log = logging.getLogger(__name__)
_LISTENS = 60.0
"""Seconds for the coordinator to listen; it imports little."""
_ENDS = 20.0
_DEVICES = re.compile(r"\d+(,\d+)*|(GPU|MIG)-[\w/-]+(,(GPU|MIG)-[\w/-]+)*")
"""CUDA devices as CUDA_VISIBLE_DEVICES names them."""


@dataclass(frozen=True)
class GroupConfig:
    """Everything a group needs."""

    target: TargetConfig
    spec: RecordSpec
    """What the trainer expects of every record."""
    store: StoreConfig
    engine: str
    """As ``data.engine`` names it."""
    engines: EngineConfig
    budget: int
    """Bytes of records alive at once."""
    reserve: int
    """Bytes of it that only validation may use."""
    max_length: int
    """Longest sample, tokens."""
    log_dir: Path
    on_policy: OnPolicy | None = None
    """How prompts are answered, where there are any."""
    images: bool = False
    """Samples may hold images."""
    run: str = field(default_factory=lambda: secrets.token_hex(6))
    incarnation: int = 0
    listen_host: str = "127.0.0.1"
    """Address of this host to bind and to tell others; anything else than loopback lets other hosts connect (they need the token)."""
    listen_port: int = 0
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    local_ranks: int = 1
    """Trainer processes on this host that compute on its CPU."""

    def resolved(self) -> CoordinatorConfig:
        """With everything decided that is left to this host: devices, threads, who owns the group.

        Raises:
            UserError: devices that do not fit the number of workers.
        """
        policy, kind = self.on_policy, find_engine(self.engine)
        answers = 0 if policy is None else policy.answer_workers
        devices = worker_devices(self.engines.workers, self.engines.devices, field="data.engines.devices", remote=kind.remote)
        answer_devices = worker_devices(answers, None if policy is None else policy.answer_devices, field="data.on_policy.answer_devices")
        engines = self.engines
        if engines.threads is None and "cpu" in (*devices, *answer_devices):
            engines = replace(engines, threads=cpu_share(engines.workers + answers + self.local_ranks))
        return CoordinatorConfig(
            run=self.run,
            incarnation=self.incarnation,
            token=self.token,
            owner=os.getpid(),
            listen_host=self.listen_host,
            listen_port=self.listen_port,
            expected_host=None if is_loopback(self.listen_host) else self.listen_host,
            log_dir=str(self.log_dir.resolve()),
            engine=self.engine,
            engines=engines,
            devices=devices,
            answer_devices=answer_devices,
            target=self.target,
            spec=self.spec,
            store=self.store,
            budget=self.budget,
            reserve=self.reserve,
            max_length=self.max_length,
            on_policy=policy,
            images=self.images,
        )


def cpu_share(processes: int) -> int:
    """CPU threads for each of so many processes of this host."""
    return max(1, len(os.sched_getaffinity(0)) // max(processes, 1))


def worker_devices(workers: int, devices: list[str] | None, *, field: str, remote: bool = False) -> list[str]:
    """The device of each worker: as configured, else the CUDA devices in turn, else cpu.

    Args:
        workers: how many.
        devices: as configured.
        field: its name.
        remote: the target runs elsewhere, so that a worker takes no device here unless one is configured.

    Raises:
        UserError: when the list does not fit the number of workers.
    """
    if workers < 0:
        raise UserError("data.engines.workers", workers, "is negative", "use 0 or more (0 waits for workers started by hand)")
    if devices is not None:
        if len(devices) != workers:
            raise UserError(field, devices, f"names {len(devices)} devices for {workers} workers", "give one entry a worker")
        for device in devices:
            if device != "cpu" and not _DEVICES.fullmatch(device):
                raise UserError(field, device, "is not a device", 'use cpu, a CUDA index such as "0", or several such as "0,1"')
        if (first := next((device for device in devices if device != "cpu"), None)) is not None and not _cuda_devices():
            raise UserError(field, first, "is a CUDA device, and torch sees none here", "use cpu, or see main.py doctor")
        return list(devices)
    if remote or not (count := _cuda_devices()):
        return ["cpu"] * workers
    # a worker sees what its CUDA_VISIBLE_DEVICES names: indices of this process's own list would be other devices there
    seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()] or [str(i) for i in range(count)]
    return [seen[i % min(count, len(seen))] for i in range(workers)]


def _cuda_devices() -> int:
    """Visible CUDA devices, without creating a context in this process."""
    import torch

    return torch.cuda.device_count()


class EngineGroup:
    """See the module.

    Args:
        config: of the group.
        say: takes a line for the user, in a thread of the group's: workers that join and leave.
    """

    def __init__(self, config: GroupConfig, *, say: Callable[[str], object] = log.info) -> None:
        self.config = config
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._port: int | None = None
        self._error: GroupStopped | UserError | None = None
        self._news = threading.Event()
        """Set when it listens, or has ended."""

    def start(self) -> Endpoint:
        """Start the coordinator; returns as soon as it listens (store and engines go on loading).

        Raises:
            GroupStopped: it ended or did not listen in time.
            UserError: it ended for a reason that the user can mend.
        """
        line = self.config.resolved().to_json()
        root = str(Path(torchspec.__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchspec.engines.coordinator"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), name="coordinator's words", daemon=True)
        self._listener.start()
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            self._news.wait(_LISTENS)
            if self._port is None:
                self.check()
                raise GroupStopped(f"the coordinator did not listen within {_LISTENS:.0f} s; see {self.config.log_dir / 'coordinator.log'}")
        except BaseException:
            self.close()
            raise
        return Endpoint(self.config.listen_host, self._port, self.config.token)

    def _listen(self, output: IO[bytes]) -> None:
        """Take what it says, JSON lines, until it ends; a thread of its own, so that the coordinator never waits for a trainer that computes."""
        for line in output:
            if not line.startswith(b"{"):
                continue
            said = json.loads(line)
            if "note" in said:
                self._say(said["note"])
            if "port" in said:
                self._port = said["port"]
            if "error" in said and self._error is None:
                self._error = UserError.of(said["user"]) if said.get("user") else GroupStopped(said["error"])
            self._news.set()
        self._news.set()

    def check(self) -> None:
        """Raise when the group has ended.

        Raises:
            GroupStopped: with the coordinator's last words.
            UserError: the same, where the user can mend it.
        """
        process = self._process
        if process is None:
            raise GroupStopped("the engine group is closed")
        code = process.poll()
        if self._error is None and code is not None:
            assert self._listener is not None
            self._listener.join(0.5)  # its last words
            ended = GroupStopped(f"the coordinator ended with code {code}; see {self.config.log_dir / 'coordinator.log'}")
            self._error = self._error or ended
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the group and whatever it left. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
        except OSError:
            pass
        process.terminate()  # a child of ours may hold the pipe open too
        try:
            process.wait(_ENDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert self._listener is not None
        self._listener.join(1.0)
        if not self._listener.is_alive():  # else a child of its holds the pipe open, and this thread would wait for it
            process.stdout.close()
        remove_leftovers(self.config.store, run=self.config.run)
