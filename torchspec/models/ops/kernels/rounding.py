"""Scales of rows in 8 bits, for the kernels that write them; twins in ``models/ops/fp8.py``, where the smallest number is explained."""

from __future__ import annotations

import triton
import triton.language as tl

from torchspec.models.ops.fp8 import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
LOG2E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(x LOG2E), of which the product joins a sum before it in one instruction."""


@triton.jit
def scale_of(largest):
    """What a row with this largest magnitude is divided by."""
    return tl.where(largest > _SMALLEST, largest / 448.0, 1.0)


@triton.jit
def factor_of(largest, limit):
    """What it is multiplied by, so that it reaches the limit."""
    return tl.where(largest > _SMALLEST, limit / tl.where(largest > _SMALLEST, largest, 1.0), 0.0)
