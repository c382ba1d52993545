"""A callback whose kernel ends the device for good, as a wrong address in one of ours would; for
``test_dead_device.py``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from lightning.pytorch.callbacks import Callback


@triton.jit
def _trap(x):  # type: ignore[no-untyped-def]
    """The instruction that CUDA reports as "unspecified launch failure"."""
    value = tl.load(x)
    tl.store(x, tl.inline_asm_elementwise("trap; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1))


@triton.jit
def _write_far_away(x, distance):  # type: ignore[no-untyped-def]
    """A write outside all memory of the process: "an illegal memory access"."""
    tl.store(x + distance, 1)


def end_device(how: str) -> None:
    """Start a kernel that never ends well; returns before the device has found out.

    Args:
        how: ``trap``, ``far`` or ``assert``.
    """
    x = torch.zeros(8, dtype=torch.int32, device="cuda")
    if how == "trap":
        _trap[(1,)](x)
    elif how == "far":
        _write_far_away[(1,)](x, 2**45)
    else:
        x[torch.full((4,), 1 << 20, device="cuda")]  # torch's own check of an index: "device-side assert triggered"


class EndDevice(Callback):
    """Ends the device at the beginning of the batch after ``at`` optimizer steps.

    Args:
        at: optimizer steps.
        how: see :func:`end_device`.
    """

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            end_device(self.how)
