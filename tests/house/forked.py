"""What a process of tests sees of itself. ``python -m tests.house.forked WORD...``"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any

import psutil
import torch


def seen() -> dict[str, Any]:
    """By the interpreter, and by /proc."""
    me = psutil.Process()
    return {
        "argv": sys.argv[1:],
        "main": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
        "paths": sys.path[:2],
        "command": [word for word in me.cmdline() if word],
        "environment": [dict(os.environ) == me.environ(), os.environ.get("GIVEN"), os.environ.get("NOT_GIVEN")],
        "parent": os.getppid(),
        "group": os.getpgid(0) == os.getpid(),
        "folder": os.getcwd(),
        "input": sys.stdin.read(),
        "files": sorted(file for file in map(int, os.listdir("/proc/self/fd")) if file < 700 and os.path.exists(f"/proc/self/fd/{file}")),
        "size": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        "signals": [signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["another"]:
        done = subprocess.run([sys.executable, "-m", "tests.house.forked"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        print(json.dumps([os.getpid(), done.returncode, json.loads(done.stdout)["parent"]]), flush=True)
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1:] == ["fails"]:
        raise ValueError("on purpose")
    print(json.dumps(seen()))
    sys.exit(7)
