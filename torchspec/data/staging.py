"""Batches on their way from page-locked memory to the device: on a stream of their own, one pack ahead of the trainer.

The copy of pack i+1 is issued when pack i is handed out, so it runs beside the computation of pack i; the device holds two packs at most. Nothing waits on
the host: the trainer's stream waits for the event behind the copy. The memory belongs to the copying stream, hence ``record_stream``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from torchspec.batch import PackedBatch


@dataclass(frozen=True)
class Staged:
    """A batch whose copy was issued."""

    batch: PackedBatch
    copied: torch.cuda.Event | None


class Stage(Protocol):
    """What brings batches to the trainer's device."""

    def start(self, batch: PackedBatch) -> Staged:
        """Begin to copy; returns at once."""
        ...

    def finish(self, staged: Staged) -> PackedBatch:
        """The batch, ready for what the caller's stream runs from now on."""
        ...


class CudaStage:
    """See the module.

    Args:
        device: of the trainer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: PackedBatch) -> Staged:
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        return Staged(moved, self._stream.record_event())

    def finish(self, staged: Staged) -> PackedBatch:
        assert staged.copied is not None
        here = torch.cuda.current_stream(self._device)
        here.wait_event(staged.copied)
        staged.batch.map(lambda t: _used(t, here))
        return staged.batch


def _used(t: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    t.record_stream(stream)
    return t
