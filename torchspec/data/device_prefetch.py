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
class Prefetched:
    """A batch whose copy was issued."""

    batch: PackedBatch
    copied: torch.cuda.Event | None


class DevicePrefetch(Protocol):
    """What brings batches to the trainer's device."""

    def start(self, batch: PackedBatch) -> Prefetched:
        """Begin to copy; returns at once."""
        ...

    def finish(self, begun: Prefetched) -> PackedBatch:
        """The batch, ready for what the caller's stream runs from now on."""
        ...


class CudaPrefetch:
    """See the module.

    Args:
        device: of the trainer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, batch: PackedBatch) -> Prefetched:
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        return Prefetched(moved, self._stream.record_event())

    def finish(self, begun: Prefetched) -> PackedBatch:
        assert begun.copied is not None
        here = torch.cuda.current_stream(self._device)
        here.wait_event(begun.copied)
        begun.batch.map(lambda t: _used(t, here))
        return begun.batch


def _used(t: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    t.record_stream(stream)
    return t
