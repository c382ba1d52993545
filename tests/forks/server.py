"""The side that waits: imports once, with a single thread, and forks what it is asked for. ``python -m tests.forks.server FD``.

For a request two processes start: one that ends at once, whose child thereby becomes the child of the process that asked (a subreaper at that moment). That
child first forks the process that waits for what it will start itself, then becomes the program.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import os
import resource
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tests.forks.client import COLD, LIMITS, Server, at_import, install, program, receive, send

MODULES = (
    "lightning.pytorch.cli",
    "torchspec.cli",
    *(
        f"torchspec.commands.{name}"
        for name in ("acceptance", "doctor", "export", "extract", "import_draft", "regenerate", "show_data", "vocabulary", "worker")
    ),
    "torchspec.trainer",
    "torchspec.ranks",
    "torchspec.data.datamodule",
    "torchspec.models.module",
    "torchspec.models.training.parallelize",
    "torchspec.engines.group",
    "torchspec.engines.transformers.engine",
)
_HIGH = 700
"""File descriptors from here on are ours: no program counts on them."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAITS = "tests.forks.server: waits"


def prepare() -> None:
    """Import, and see that a fork of this process will be whole."""
    atexit.register(_say_no_more)  # first, so that it runs last
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    import torch

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"the imports started {threads - 1} threads, which a fork would not have"
    assert torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    gc.collect()
    gc.freeze()
    gc.enable()


def _say_no_more() -> None:
    """Frozen objects outlive the interpreter, of which libraries would complain where the program's errors are read."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def wait(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks for every request. Returns in the processes that are to become programs; the one that waits ends with the process that it waits beside."""
    while True:
        try:
            request, files = receive(link)
        except (EOFError, ConnectionError):
            os._exit(0)
        files = [_up(file) for file in files]
        told, tell = os.pipe()
        ends, gone = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child:
                os.write(tell, str(child).encode())
                os._exit(0)
            for file in (told, tell, gone):
                os.close(file)
            os.read(ends, 1)  # returns when the parent has ended: the other parent is ours only then
            os.close(ends)
            link.close()
            return request, files
        for file in (tell, ends, gone, *files):
            os.close(file)
        os.waitpid(middle, 0)
        send(link, {"pid": int(os.read(told, 32))})
        os.close(told)


def main() -> tuple[str, str]:
    """Wait; what the process that returns has to run."""
    link = socket.socket(fileno=_up(int(sys.argv[1])))
    variables = dict(os.environ)
    os.environ.clear()  # copies, as the memory behind them is written over
    os.environ.update({name: value for name, value in variables.items() if name not in ("TORCHSPEC_TESTS_ROOM", COLD)})
    prepare()
    show([_WAITS], {})
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # they are for the program beside this process
    send(link, {"ready": True})
    while True:
        request, files = wait(link)
        if request["session"]:
            os.setsid()
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            break
        ours.close()
        for file in files:
            os.close(file)
        link = socket.socket(fileno=_up(theirs.detach()))
    become(request, files)
    install(Server(socket.socket(fileno=_up(ours.detach())), at_import(request["environment"])))
    what = program(request["words"])
    assert what is not None
    kind, name, arguments = what
    sys.argv = [name, *arguments]
    sys.orig_argv[:] = request["words"]
    first = os.path.dirname(os.path.abspath(name)) if kind == "script" else request["cwd"]
    given = [part for part in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [first, *given, *sys.path[2:]]
    return kind, name


def become(request: dict[str, Any], files: list[int]) -> None:
    """Directory, environment, files, limits and signals as they were asked for."""
    import numpy as np
    import torch

    os.chdir(request["cwd"])
    environment: dict[str, str] = request["environment"]
    os.environ.clear()
    os.environ.update(environment)
    show(request["words"], environment)
    for number, file in zip(request["files"], files, strict=True):
        os.dup2(file, number)
        os.close(file)
    for limit, values in zip(LIMITS, request["limits"], strict=True):
        if resource.getrlimit(limit) != tuple(values):
            resource.setrlimit(limit, tuple(values))
    for number in _SIGNALS:
        usual: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED")) or "-u" in request["words"][1:2]
    raw = io.FileIO(1, "w", closefd=False)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
        line_buffering=os.isatty(1),
        write_through=unbuffered,
    )
    threads = environment.get("OMP_NUM_THREADS")
    if threads != "1":
        torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    np.random.seed()


def show(words: list[str], environment: dict[str, str]) -> None:
    """Let /proc show this command line and environment, as tests look there: the memory that ``exec`` filled is written over."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end, first, last = map(int, fields[45:49])
    for begin, stop, parts in ((start, end, words), (first, last, [f"{name}={value}" for name, value in environment.items()])):
        text = "".join(f"{part}\0" for part in parts).encode()
        assert len(text) < stop - begin
        ctypes.memmove(begin, text.ljust(stop - begin, b"\0"), stop - begin)


def _up(file: int) -> int:
    """The same file under a number of ours."""
    high = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(file)
    return high


if __name__ == "__main__":
    kind, name = main()
    if kind == "module":
        sys.modules.pop(name, None)  # it runs as __main__
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
