"""The side that starts a process: asks the waiting process beside it for a fork, or starts cold what a fork cannot be."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLD = "TORCHSPEC_TESTS_COLD"
"""In the environment of a process: it and what it starts start cold."""
LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})
ARGUMENTS, VARIABLES = 16384, 65536
"""Bytes that a waiting process has for the command line and the environment of what it becomes, as /proc shows them."""
_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "PYTHON", "LD_", "KMP_", "MKL_", "OPENBLAS_", "XDG_", "TRITON_", "USE_")
_READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "TORCHSPEC_", "TORCHELASTIC_", "TORCH_NCCL_")
"""A variable that libraries read while they are imported must be the waiting process's own; PYTHONPATH is looked at more closely."""

_execute: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_lock = threading.RLock()


class Server:
    """A process that waits beside this one.

    Args:
        link: to it; its end tells it that this process has ended.
        environment: of what libraries read at their import, as they found it.
    """

    def __init__(self, link: socket.socket, environment: Mapping[str, str]) -> None:
        self.link, self.environment = link, environment

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """A new child of this process; its id."""
        prctl = ctypes.CDLL(None).prctl
        with _lock:
            prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # the child's first parent ends at once; this process gets it then
            try:
                send(self.link, request, files)
                return int(receive(self.link)[0]["pid"])
            finally:
                prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def send(link: socket.socket, message: Any, files: Sequence[int] = ()) -> None:
    """A message as JSON behind its length, with open files."""
    said = json.dumps(message).encode()
    socket.send_fds(link, [len(said).to_bytes(4, "big")], list(files))
    link.sendall(said)


def receive(link: socket.socket) -> tuple[Any, list[int]]:
    """A message and the files that came with it.

    Raises:
        EOFError: the other side has ended.
    """
    size, files, _, _ = socket.recv_fds(link, 4, 64)
    said = b""
    while len(size) == 4 and len(said) < int.from_bytes(size, "big"):
        more = link.recv(int.from_bytes(size, "big") - len(said))
        if not more:
            break
        said += more
    if not said:
        raise EOFError
    return json.loads(said), files


_servers: list[Server] = []
_last = False
"""Whether this process was itself forked: then it takes the one that waits beside it, and starts no more."""
_owner = 0


def install(server: Server | None = None) -> None:
    """From now on TorchSpec's processes that this process starts are forks.

    Args:
        server: that waits beside it; None starts one when it is first needed.
    """
    global _last, _owner
    _servers[:] = [server] if server is not None else []
    _last, _owner = server is not None, os.getpid()
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """A process that was forked otherwise (a data loader's) starts what it starts cold, and keeps nobody waiting."""
    for server in _servers:
        server.link.close()


@contextmanager
def cold() -> Iterator[None]:
    """Processes that start within start cold, with all that they start."""
    before = os.environ.get(COLD)
    os.environ[COLD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[COLD]
        else:
            os.environ[COLD] = before


def _execute_child(
    self: Any,
    args: Any,
    executable: Any,
    preexec_fn: Any,
    close_fds: bool,
    pass_fds: Any,
    cwd: Any,
    env: Any,
    startupinfo: Any,
    creationflags: int,
    shell: bool,
    p2cread: int,
    p2cwrite: int,
    c2pread: int,
    c2pwrite: int,
    errread: int,
    errwrite: int,
    restore_signals: bool,
    gid: Any,
    gids: Any,
    uid: Any,
    umask: int,
    start_new_session: bool,
    process_group: Any,
) -> None:
    """``Popen._execute_child`` of Python 3.11 to 3.13: starts the process and sets ``pid``."""
    pipes = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    environment = {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()}
    words = [os.fsdecode(word) for word in args] if isinstance(args, list | tuple) else []
    usual = preexec_fn is None and close_fds and not shell and (gid, gids, uid, umask, process_group) == (None, None, None, -1, -1)
    server = _waiting(words, environment) if usual and executable in (None, sys.executable) else None
    if server is None:
        rest = (startupinfo, creationflags, shell, *pipes, restore_signals, gid, gids, uid, umask, start_new_session, process_group)
        _execute(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        return
    files = {0: p2cread, 1: c2pwrite, 2: errwrite, **{number: number for number in pass_fds}}
    request = {
        "words": words,
        "cwd": os.path.abspath(os.fsdecode(cwd)) if cwd is not None else os.getcwd(),
        "environment": environment,
        "files": list(files),
        "session": start_new_session,
        "ignored": [int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN],
        "limits": [resource.getrlimit(limit) for limit in LIMITS],
    }
    try:
        self.pid = server.fork(request, [number if given == -1 else given for number, given in files.items()])
        self._child_created = True
    finally:
        self._close_pipe_fds(*pipes)


def program(words: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """What Python would run: ``module`` or ``script``, its name, and its arguments; None for what is not TorchSpec's."""
    rest = list(words[1:])
    while rest[:1] == ["-u"]:
        del rest[0]
    if rest[:1] == ["-m"] and len(rest) > 1 and (rest[1].startswith(("torchspec.", "tests.")) or rest[1] == "torch.distributed.run"):
        return "module", rest[1], rest[2:]
    if rest and rest[0].endswith("main.py") and Path(rest[0]).resolve() == ROOT / "main.py":
        return "script", rest[0], rest[1:]
    return None


def at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that libraries read while they are imported."""
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT) and not name.startswith(_READ_LATER)}


def _waiting(words: Sequence[str], environment: Mapping[str, str]) -> Server | None:
    """The process whose fork this command can be; None where it has to start cold."""
    if COLD in environment or COLD in os.environ or _owner != os.getpid() or words[:1] != [sys.executable] or program(words) is None:
        return None
    if len("\0".join(words)) > ARGUMENTS // 2 or sum(len(k) + len(v) for k, v in environment.items()) > VARIABLES // 2:
        return None
    if not set(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))) <= {str(ROOT)}:
        return None
    with _lock:
        for server in _servers:
            if server.environment == at_import(environment):
                return server
        if _last or len(_servers) > 2:
            return None
        _servers.append(_start(environment))
        return _servers[-1]


def _start(environment: Mapping[str, str]) -> Server:
    """A first waiting process: with one thread, as a fork has only one."""
    ours, theirs = socket.socketpair()
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    room = {"TORCHSPEC_TESTS_ROOM": "x" * VARIABLES, COLD: "1"}
    command = [sys.executable, "-m", "tests.forks.server", str(theirs.fileno()), "x" * ARGUMENTS]
    surroundings = {**environment, "PYTHONPATH": str(ROOT), **one, **room}
    process = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True)
    theirs.close()
    try:
        receive(ours)
    except EOFError:
        raise RuntimeError(f"tests.forks.server ended with code {process.wait()}: see what it said") from None
    process.returncode = 0  # it ends with this process: nobody waits for it
    return Server(ours, at_import(environment))
