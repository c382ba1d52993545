"""The process that holds a host's share of a Mooncake store: ``python -m torchspec.transfer.segment``.

It runs no model, so no crash of an engine or trainer takes records along. Its first line on stdin is a :class:`SegmentJob` in
JSON; it starts the master when none is given, mounts the memory, prints one JSON line, and then lives exactly as long as its
stdin: end of file, by a close or by the death of the parent (``kill -9`` included), ends it and the master. A pipe does that
rather than a parent-death signal, because that signal fires when the *thread* that started the process ends. The master, started
from this process's only thread, does carry one, so it dies with us too. If the master dies, we exit: one process tells the health of both.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torchspec.errors import UserError
from torchspec.network import free_port, host_port
from torchspec.transfer import mooncake

START_SECONDS = 30.0
"""A master that does not listen by then will not."""
_PR_SET_PDEATHSIG = 1
_TRIES = 5


@dataclass(frozen=True)
class SegmentJob:
    """What to hold, and where."""

    host: str
    """Address under which others reach this host."""
    nbytes: int
    """Memory of each part."""
    parts: int
    """Clients of Mooncake's, each of which holds as much memory and moves what comes and goes there in a thread of its own."""
    protocol: str
    rdma_devices: str
    master: str | None
    """host:port of a running master, or None to start one."""
    metadata: str
    """Metadata server URL or P2PHANDSHAKE."""
    run: str
    """Run id: keys that start with it are removed from a given master at the end."""


def main() -> NoReturn:
    job = SegmentJob(**json.loads(sys.stdin.buffer.readline()))
    wake, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole foreground group; the owner decides when we end
    status = 1
    master: subprocess.Popen[bytes] | None = None
    clients: list[Any] = []
    try:
        mooncake.load(job.host)
        address = job.master
        if address is None:
            master, port = start_master(job.host)
            address = host_port(job.host, port)
        for _ in range(job.parts):
            clients.append(
                mooncake.connect(host=job.host, master=address, metadata=job.metadata, protocol=job.protocol, rdma_devices=job.rdma_devices, segment=job.nbytes)
            )
        _say(master=address, master_pid=master.pid if master else None)
        status = _watch(master, address, wake)
    except UserError as error:
        _say(user_error=[error.field, error.value, error.problem, error.fix])
    except Exception as error:
        traceback.print_exc()
        _say(error=str(error) or type(error).__name__)
    if clients and job.master is not None and status == 0:  # else nobody answers
        clients[0].remove_by_regex(f"^{re.escape(job.run)}/.*", True)
        for client in clients:
            client.close()
    if master is not None:
        master.kill()  # it keeps nothing: no need to ask
        master.wait()
    sys.stderr.flush()
    os._exit(status)  # while ``clients`` are referenced: their destructors would wait seconds for a master that is gone


def _say(**words: Any) -> None:
    """One JSON line for the parent."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _watch(master: subprocess.Popen[bytes] | None, address: str, wake: int) -> int:
    """Wait for the end of stdin (0), a signal to end (0), or the death of the master (1)."""
    stdin = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([stdin, wake], [], [], None if master else 2.0)
        if stdin in ready and not os.read(stdin, 4096):
            return 0
        if wake in ready and signal.SIGTERM in os.read(wake, 64):
            return 0
        if master is None and not ready:
            try:
                with socket.create_connection(mooncake.split_host_port(address, field="data.store.master"), timeout=5):
                    pass
            except OSError as error:
                print(f"master {address} is gone: {error}", file=sys.stderr)
                return 1
        if master is not None and master.poll() is not None:
            print(f"master exited with code {master.returncode}", file=sys.stderr)
            return 1


def start_master(host: str, *, pick_port: Callable[[str], int] = free_port, abandon_seconds: int = 30) -> tuple[subprocess.Popen[bytes], int]:
    """Start ``mooncake_master`` on free ports, its output on our stderr; returns it and its port once it listens.

    Eviction is off (a watermark of 1, and a ratio of 0): a full store refuses. That also makes the master's clean-up thread run, which
    with eviction at work was seen never to give back the space of a hard-pinned put whose writer was killed; now it does.

    Args:
        host: address it binds to. It asks for no credentials, so this must be loopback or a private interface.
        pick_port: gives a port that looks free on a host; one that is taken after all costs another try.
        abandon_seconds: age of an unfinished put at which its key may be put again; its space comes back at two to four times that age.

    Raises:
        UserError: the binary is missing.
        RuntimeError: it did not come up.
    """
    file = Path(mooncake.load().__file__ or "")  # mooncake/store.*.so, or mooncake/store/__init__.py in the CUDA 13 wheel
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    binary = folder / "mooncake_master"
    if not binary.is_file():
        raise UserError("data.store.kind", "mooncake", f"needs {binary}, which is missing", mooncake.INSTALL_WHEEL)
    if not os.access(binary, os.X_OK):
        binary.chmod(binary.stat().st_mode | 0o111)
    deadline = time.monotonic() + START_SECONDS
    for _ in range(_TRIES):
        port, metrics = pick_port(host), pick_port("127.0.0.1")
        command = [
            str(binary),
            f"--rpc_address={host}",
            f"--rpc_port={port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={metrics}",
            "--enable_metric_reporting=false",
            "--eviction_high_watermark_ratio=1",
            "--eviction_ratio=0",
            f"--put_start_discard_timeout_sec={abandon_seconds}",
            f"--put_start_release_timeout_sec={2 * abandon_seconds}",
            "--logtostderr",
        ]
        master = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=_die_with_parent)
        while master.poll() is None:
            if listens(master.pid, port):
                return master, port
            if time.monotonic() > deadline:
                master.kill()
                master.wait()
                raise RuntimeError(f"mooncake_master did not listen within {START_SECONDS:.0f} s")
            time.sleep(0.01)
    raise RuntimeError(f"mooncake_master ended at once, {_TRIES} times; the last exit code was {master.returncode}")


def _die_with_parent() -> None:
    """In the child, before exec: get SIGKILL when the parent's thread ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def listens(pid: int, port: int) -> bool:
    """Whether this very process listens on the port; connecting would also succeed on a stranger that won the race for it."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            column = row.split()
            if column[3] == "0A" and int(column[1].rpartition(":")[2], 16) == port:  # 0A is LISTEN
                sockets.add(f"socket:[{column[9]}]")
    try:
        opened = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in opened:
        try:
            if os.readlink(f"/proc/{pid}/fd/{number}") in sockets:
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    main()
