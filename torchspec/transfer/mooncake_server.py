"""Owner of a Mooncake store: one child process (``segment.py``) that holds the memory, and the master unless one is given.

Engines and trainers contribute no memory, so no crash of theirs loses a record. Room: the offset allocator of Mooncake fragments. With
sizes spread over three decades and records deleted out of order, puts were refused from 0.76 of the segment in use upwards (2 of
12000 with the budget at 0.80 of the segment, 39 at 0.85, none at 0.76 or below; 8 seeds each). The segment is therefore 1.5 times the
byte budget (0.67). Eviction is off and every record is hard-pinned: what does not fit is refused, nothing is evicted.
Memory is touched when it is first used (TCP); RDMA registers, and so locks, all of it at start.

Mooncake's TCP moves 3 to 4 GB a second through one thread of a client, what is read and what is written together, so the process holds the memory
in several parts with a client each, where machine and budget are large enough.

Mooncake has no authentication, and its data port listens on every interface even when the address given is loopback: run it on a
machine or network whose users are trusted. P2PHANDSHAKE replaces the HTTP metadata server, which was seen to ignore its host flag
and listen on every interface.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torchspec
from torchspec.errors import UserError
from torchspec.logs import keep_one_before
from torchspec.network import own_address
from torchspec.reasons import last_error_in, without_bars
from torchspec.transfer import mooncake
from torchspec.transfer.segment import START_SECONDS, SegmentJob
from torchspec.transfer.store import Address, StoreConfig

ROOM = 1.5
"""Segment bytes for each byte of budget."""
_PARTS = 4
"""Parts of the memory, at most."""
_CORES = 4
"""Of the machine, for each of them."""
_PART = 1536 << 20
"""Bytes of each of them, at least."""
_RECORDS = 10
"""Largest records in each of them, at least: of 4,900 puts at a full budget none was refused with records of up to a tenth of a part; of 2,100 with up to a
quarter, 19 were."""
_UNIT = 16 << 20
"""What Mooncake takes memory in."""
_LOG_NAME = "mooncake.log"


class MooncakeServer:
    """See the module.

    Args:
        config: protocol, RDMA devices, given master and metadata, host.
        run: id of the run; its keys start with it.
        budget: bytes of records alive at once.
        largest: bytes of the largest record, which has to fit into a part with room to spare; 0 where nobody knows.
        reason: why this kind of store, for the log.
        host: address under which other hosts reach this one.
        log_dir: folder for ``mooncake.log``, the output of holder and master; None keeps it in a nameless file until :meth:`close`.
    """

    kind = "mooncake"

    def __init__(
        self, config: StoreConfig, *, run: str, budget: int, largest: int, reason: str, host: str = "127.0.0.1", log_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.reason = reason
        self._config = config
        self._run = run
        part = max(_PART, _RECORDS * largest)
        self._parts = max(1, min(mooncake.lanes(_PARTS, protocol=config.protocol, cores=_CORES), int(budget * ROOM) // part))
        self._part_nbytes = -(-int(budget * ROOM) // self._parts // _UNIT) * _UNIT + _UNIT
        self._host = host
        self._log_dir = Path(log_dir) if log_dir is not None else None
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._master: str | None = config.master
        self.pids: tuple[int, ...] = ()
        """Processes that this server started: the segment holder, and the master when it is ours."""

    @property
    def address(self) -> Address:
        config = self._config
        return {
            "kind": "mooncake",
            "master": self._master,
            "metadata": config.metadata or "P2PHANDSHAKE",
            "protocol": config.protocol,
            "rdma_devices": config.rdma_devices,
        }

    def start(self) -> None:
        if self._process is not None:
            return
        config = self._config
        host = own_address(self._host, field="data.store.host", fix="give an address of this host under which the others reach it")
        job = SegmentJob(
            host=host,
            nbytes=self._part_nbytes,
            parts=self._parts,
            protocol=config.protocol,
            rdma_devices=config.rdma_devices,
            master=config.master,
            metadata=config.metadata or "P2PHANDSHAKE",
            run=self._run,
        )
        self._log = self._open_log()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchspec.transfer.segment"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self._process.stdin.flush()
            answer = _read_line(self._process.stdout, seconds=2 * START_SECONDS)
            self._understand(answer)
        except BaseException:
            self.close()
            raise

    def _understand(self, answer: bytes) -> None:
        try:
            words: dict[str, Any] = json.loads(answer)
        except ValueError:
            words = {"error": "it said nothing"}
        if "user_error" in words:
            raise UserError(*words["user_error"])
        if "error" in words:
            field, value = ("data.store.master", self._config.master) if self._config.master else ("data.store.kind", self._config.kind)
            where = f"read {self._log_dir / _LOG_NAME}" if self._log_dir else f"its log ends: {self._log_tail()}"
            raise UserError(field, value, f"did not come up: {words['error']}", f"{where}; on one host data.store.kind=shm works without Mooncake")
        self._master = words["master"]
        assert self._process is not None
        self.pids = (self._process.pid, *([words["master_pid"]] if words["master_pid"] else []))

    def alive(self) -> bool:
        """Whether holder and master live: the holder exits at once when its own master dies, and within seconds of losing a given one."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End the holder, which ends the master; kill it when it does not within 5 s and one for each part (the master then dies with it)."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
            try:
                process.wait(timeout=5 + self._parts)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _open_log(self) -> IO[bytes]:
        if self._log_dir is None:
            return tempfile.TemporaryFile()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        keep_one_before(self._log_dir / _LOG_NAME)
        return (self._log_dir / _LOG_NAME).open("a+b")

    def _log_tail(self) -> str:
        """The error that ended it, else its last lines; read without moving the offset, which the children share."""
        if self._log is None:
            return ""
        number = self._log.fileno()
        text = os.pread(number, 4096, max(0, os.fstat(number).st_size - 4096)).decode(errors="replace")
        lines = without_bars(text)
        return last_error_in(lines) or " | ".join(lines[-3:])


def _environment() -> dict[str, str]:
    """Ours, with this package importable, and Mooncake's log lines on stderr, which is a file there."""
    root = str(Path(torchspec.__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + before if before else ""), "GLOG_logtostderr": "1"}


def _read_line(pipe: IO[bytes], *, seconds: float) -> bytes:
    """One line, or what came before the end of file or of the time."""
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n") and select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(pipe.fileno(), 65536)
        if not part:
            break
        line += part
    return line
