"""How long a device computes, and how long it stands still between two batches for want of data.

On a GPU the host runs ahead: while its loop waits for a batch, the device may still compute the one before, and nothing is lost. So the times are taken
on the device, by events that are read once they have passed; nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch


@dataclass
class Times:
    """Of the batches that the device is done with. Seconds."""

    tokens: int = 0
    busy_s: float = 0.0
    """In batches, from their first to their last operation."""
    between_s: float = 0.0
    """Between them, whatever the reason."""
    starved_s: float = 0.0
    """That part of ``between_s`` in which the loop waited for data."""


@dataclass(frozen=True)
class _Batch:
    before: Any
    """Mark at the end of the batch before it; None where the time since then does not count."""
    begin: Any
    end: Any
    waited_s: float
    tokens: int


class BatchClock:
    """Told about every batch; adds up in ``times``.

    Args:
        device: that computes; on a CPU the host's clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._passed: deque[_Batch] = deque()
        self._previous: Any = None
        self._begin: Any = None
        self._waited = 0.0
        self._share = 0.0
        self.times = Times()

    def begin(self, waited_s: float) -> None:
        """A batch is there and its work begins.

        Args:
            waited_s: how long the loop has waited for batches since the loader was made.
        """
        self._share, self._waited = waited_s - self._waited, waited_s
        self._begin = self._mark()

    def end(self, tokens: int) -> None:
        """All work of the batch was given to the device."""
        if self._begin is None:
            return
        mark = self._mark()
        self._passed.append(_Batch(self._previous, self._begin, mark, self._share, tokens))
        self._previous, self._begin = mark, None

    def pause(self) -> None:
        """Something else follows (validation): the time until the next batch does not count."""
        self._previous = None

    def reset(self) -> None:
        """Count from now on."""
        self.settle(wait=True)
        self.times = Times()
        self._previous = self._mark()

    def settle(self, *, wait: bool = False) -> Times:
        """Add what the device is done with; ``wait`` for the rest of it too."""
        if wait and self._cuda and self._passed:
            self._passed[-1].end.synchronize()
        while self._passed and (not self._cuda or self._passed[0].end.query()):
            batch = self._passed.popleft()
            between = 0.0 if batch.before is None else self._seconds(batch.before, batch.begin)
            self.times.tokens += batch.tokens
            self.times.busy_s += self._seconds(batch.begin, batch.end)
            self.times.between_s += between
            self.times.starved_s += min(between, batch.waited_s)
        return self.times

    def _mark(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._cuda else end - begin


class Clocked(pl.Callback):
    """Base of callbacks that measure a training: tells a clock about every batch. Hooks that a subclass has as well call these first.

    Args:
        skip: optimizer steps of this run, at least one, after whose end the times begin.
    """

    def __init__(self, *, skip: int) -> None:
        self._skip = skip
        self._first_step = 0
        self._clock: BatchClock | None = None
        self._counting = False

    @property
    def clock(self) -> BatchClock:
        """From the start of the training on."""
        assert self._clock is not None
        return self._clock

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._first_step = trainer.global_step
        self._clock = BatchClock(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.begin(trainer.datamodule.loader_stats("train").wait_s)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.end(batch.num_tokens)
        if not self._counting and trainer.global_step == self._first_step + self._skip:
            self._counting = True
            self.clock.reset()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._clock is not None:
            self._clock.pause()
