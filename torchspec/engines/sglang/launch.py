"""SGLang's processes as children of a worker: they end with it, and find stand-ins for what a CPU lacks.

This module is imported in each child before anything of SGLang's: the functions below are what the child is started with. It must not import SGLang itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import FrameType
from typing import Any

from torchspec.engines.parent_death import die_with
from torchspec.engines.sglang.stand_ins import install

ON_CPU = "SGLANG_USE_CPU_ENGINE"
"""SGLang's own variable: 1 for an engine on a CPU."""

if os.environ.get(ON_CPU) == "1":
    install()


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """A scheduler process of SGLang's; its arguments."""
    _die_with_worker()
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, **kwargs: Any) -> None:
    """SGLang's detokenizer process (it is started also where nothing is detokenised); its arguments."""
    _die_with_worker()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    run_detokenizer_process(*args, **kwargs)


def child_failed(signum: int, frame: FrameType | None) -> None:
    """What this process does at SGLang's word that a child has failed: nothing. SGLang's own answer is to kill the process tree, whose root is our worker; the
    worker sees itself that a child is gone (``engine.py``) and ends in order, so that its leases go back."""


def start_engine(arguments: dict[str, Any]) -> Any:
    """An ``sglang.Engine`` whose children are started by the functions above. In the main thread: the children die with the thread that started them.

    Args:
        arguments: of SGLang's ``ServerArgs``.
    """
    from sglang.srt.entrypoints.engine import Engine

    class ChildEngine(Engine):  # type: ignore[misc, unused-ignore]
        run_scheduler_process_func = staticmethod(run_scheduler)
        run_detokenizer_process_func = staticmethod(run_detokenizer)

    return ChildEngine(**arguments, custom_sigquit_handler=child_failed)


def _die_with_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker's to answer
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with(parent.pid)
