"""Triton kernels of the training step; each file states its mathematics and shapes, and has a torch twin elsewhere that it is tested against.

Nothing here is imported before a CUDA tensor asks for it, so Triton is no requirement: without it, or on a CPU, the torch twins run. Kernels compute in
fp32 whatever the type of their inputs; sizes may be any, and blocks are padded to powers of two inside.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(t: Tensor) -> bool:
    """Whether kernels serve a tensor: on CUDA, not fp64, and Triton is installed."""
    return t.is_cuda and t.dtype != torch.float64 and _triton()


def power_of_two(size: int) -> int:
    """The smallest one that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()
