"""Processes for tests of the store: scripts that say a line when they are somewhere, Mooncake's, and waiting for what another process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchspec.transfer import StoreConfig, make_server
from torchspec.transfer.mooncake_server import MooncakeServer

ROOT = Path(__file__).resolve().parents[2]


class Script:
    """A Python process that talks in JSON lines."""

    def __init__(self, code: str, *args: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks.code", code, *map(json.dumps, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def hear(self) -> Any:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process ended with code {self.process.wait()}"
        return json.loads(line)

    def tell(self) -> None:
        """Let it go on from ``input()``."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return self.process.wait(timeout=60)


@contextmanager
def script(code: str, *args: Any) -> Iterator[Script]:
    """Run ``code`` with ``args`` as JSON in ``sys.argv[1:]``; killed at the end if it still runs."""
    one = Script("import json, sys\nargs = [json.loads(a) for a in sys.argv[1:]]\ndef say(x): print(json.dumps(x), flush=True)\n" + code, *args)
    try:
        yield one
    finally:
        one.kill()
        one.end()


def mooncake_of(*, run: str = "r", budget: int = 1 << 20, log_dir: Path | None = None, **config: str) -> MooncakeServer:
    """The owner of a Mooncake store, not started."""
    made = make_server(StoreConfig(kind="mooncake", **config), run=run, budget=budget, log_dir=log_dir)  # type: ignore[arg-type]
    assert isinstance(made, MooncakeServer)
    return made


def eventually(condition: Callable[[], bool], *, seconds: float = 20.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """No such process, or one that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
