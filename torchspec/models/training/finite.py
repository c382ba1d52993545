"""NaN and infinity, called by their name wherever they show: weights, optimizer states, losses, hidden states.

A training step is watched without waiting for the device: what its loss, its gradient and the states it was given look like goes to the host beside the
computing, and is read some steps later, the same number on every rank. The gradient is the same on all ranks, so all of them end at the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.batch import PackedBatch
from torchspec.models.ops.not_finite import no_longer_numbers, not_finite

LAG = 4
"""Optimizer steps after which a GPU's step is looked at: it is done by then."""


def unsound(checkpoint: Mapping[str, Any]) -> str:
    """What is wrong with the numbers of a checkpoint (``state_dict``, ``optimizer_states``); "" where nothing is."""
    weights = not_finite((name, value) for name, value in (checkpoint.get("state_dict") or {}).items() if isinstance(value, Tensor))
    if weights:
        return no_longer_numbers([name.removeprefix("task.draft.") for name in weights])
    states = not_finite(_tensors(checkpoint.get("optimizer_states") or [], "optimizer"))
    return no_longer_numbers(states, what="the optimizer's states") if states else ""


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _tensors(entry, f"{name}.{number}")


def totals(batch: PackedBatch) -> Tensor:
    """[S] fp32, a sum over all target states of each conversation: finite where they all are. One pass over them."""
    rows = batch.aux.sum(1, dtype=torch.float32) + batch.last.sum(1, dtype=torch.float32)
    return torch.zeros(len(batch.sample_ids), dtype=torch.float32, device=rows.device).index_add_(0, batch.sequence, rows)


@dataclass(frozen=True)
class Found:
    """A step in which something was no number."""

    step: int
    loss: bool
    gradient: bool
    """Whether these are numbers."""
    samples: tuple[int, ...]
    """Dataset indices of the conversations whose states are none."""


@dataclass(frozen=True)
class _Noted:
    step: int
    flags: Tensor
    """[2 + S] on the host: loss, gradient, states of each conversation."""
    done: Any
    samples: tuple[int, ...]


class StepWatch:
    """See the module's head. One optimizer step after the other: :meth:`add` for each micro-batch, :meth:`end`, :meth:`look`."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._totals: list[Tensor] = []
        self._samples: list[int] = []
        self._noted: deque[_Noted] = deque()

    def add(self, loss: Tensor, batch: PackedBatch) -> None:
        """A micro-batch of the step under way."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._totals.append(totals(batch))
        self._samples += batch.sample_ids

    def end(self, step: int, gradient: Tensor | None) -> None:
        """The step's gradients are there.

        Args:
            step: its number, from 1.
            gradient: of a weight that every loss reaches, reduced over ranks; None where it has none.
        """
        if self._loss is None:
            return
        part = None if gradient is None else getattr(gradient, "_local_tensor", gradient).float().sum()
        values = torch.cat([torch.stack([self._loss, self._loss.new_zeros(()) if part is None else part]), *self._totals])
        flags, done = torch.isfinite(values), None
        if flags.device.type == "cuda":
            flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._noted.append(_Noted(step, flags, done, tuple(self._samples)))
        self._loss, self._totals, self._samples = None, [], []

    def look(self, step: int) -> Found | None:
        """The first of the steps now due that has something wrong.

        Args:
            step: the one just done.
        """
        while self._noted and self._noted[0].step <= step - (LAG if self._noted[0].done is not None else 0):
            noted = self._noted.popleft()
            if noted.done is not None:
                noted.done.synchronize()
            loss, gradient, *states = noted.flags.tolist()
            if not (loss and gradient and all(states)):
                return Found(noted.step, loss, gradient, tuple(i for i, good in zip(noted.samples, states, strict=True) if not good))
        return None
