"""Ranks of one run stop together, and none outlives the run.

*Stop.* Lightning tells other ranks of a SIGTERM by a broadcast inside the signal handler, and by another before every batch. NCCL matches collectives by their
order, and a handler runs at another place on every rank; and the second one makes every batch wait for the device. Here the handler only takes note
(and tells the rank that started this one), and ranks agree in the loader (``agreement.py``).

*Death.* Ranks that rank 0 started die with it; at its own end rank 0 waits for them. Where ranks do not leave together (one has failed, the others are inside
a collective with it), nothing more is asked of the device or of NCCL, which would wait for the others for ever: the process ends without either's good-bye.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from torchspec.engines.parent_death import die_with

_LAUNCHER = "TORCHSPEC_LAUNCHER"
"""Process id of the rank that starts others, in their environment."""

log = logging.getLogger(__name__)

leave_at_once = False
"""Set where this rank leaves alone: the command line then ends the process without the interpreter's exit handlers."""


class SignalConnector(_SignalConnector):
    """Lightning's signal handlers, without collectives in them."""

    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        log.info("rank %d received signal %d", self.trainer.global_rank, signum)
        launcher, first = self.trainer.strategy.launcher, not self.received_sigterm
        self.received_sigterm = True
        if first:
            tell_launcher(signum)
            if launcher is not None:
                launcher.kill(signum)


def take_over(trainer: pl.Trainer) -> None:
    """Put this module's way of stopping in the place of Lightning's."""
    if not isinstance(trainer._signal_connector, SignalConnector):
        trainer._signal_connector = SignalConnector(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    """Ranks agree in the loader instead."""


def told_to_end(trainer: pl.Trainer) -> bool:
    """True when this rank has received SIGTERM, whatever the others know."""
    return bool(trainer._signal_connector.received_sigterm)


# -- processes


def bind_to_launcher() -> None:
    """A rank that rank 0 started dies with it; any other may become the one that starts ranks."""
    if _launched():
        die_with(os.getppid())
    else:
        os.environ[_LAUNCHER] = str(os.getpid())


def tell_launcher(number: int) -> None:
    """Pass a signal on to the rank that started this one, which tells all others: a signal to one rank is one to the run."""
    if _launched():
        os.kill(os.getppid(), number)


def _launched() -> bool:
    """Whether rank 0 started this process as another rank. A run that a script starts after a fit of its own inherits the variable, and is none."""
    return os.environ.get(_LAUNCHER) == str(os.getppid()) and int(os.environ.get("LOCAL_RANK", "0")) > 0


def _children(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    return list(getattr(trainer.strategy.launcher, "procs", []))


def part() -> None:
    """End the process groups, as every rank does at the same time. NCCL waits for the others here; at interpreter exit it would wait for rank 0, which waits
    for this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_children_alone(trainer: pl.Trainer) -> None:
    """Rank 0 is ending: Lightning's watcher, which kills it when another rank ends with an error, no longer looks."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and _children(trainer):
            thread._child_processes = []  # type: ignore[attr-defined]


def wait_for_children(trainer: pl.Trainer, *, seconds: float) -> None:
    """Wait for the ranks that this one started; kill those that are still there after ``seconds``."""
    deadline = time.monotonic() + seconds
    for child in _children(trainer):
        try:
            child.wait(timeout=max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            log.warning("rank process %d did not end by itself", child.pid)
            child.send_signal(signal.SIGKILL)
            child.wait()
