"""Rows of a matrix to 8-bit floats (e4m3), each with a scale of its own; twin: ``models/fp8.py:quantise``.

s_r = max_c |x_rc f_c| / 448        y_rc = round(x_rc f_c / s_r)        (f: optional factors by column; s_r = 1 for a row of zeros)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _quantise(x, factor, y, scale, width, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        if FACTOR:
            values *= tl.load(factor + column, mask=column < width, other=0.0)
        top = tl.maximum(top, tl.abs(values))
    highest = tl.max(top, axis=0)
    by = tl.where(highest > 0, highest / 448.0, 1.0)
    tl.store(scale + row, by)
    for first in range(0, width, BLOCK):
        column = first + lane
        values = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        if FACTOR:
            values *= tl.load(factor + column, mask=column < width, other=0.0)
        tl.store(y + row * width + column, (values / by).to(y.dtype.element_ty), mask=column < width)


def quantise(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [R, C], factor [C] fp32 or None: y [R, C] e4m3, s [R, 1] fp32."""
    x = x.contiguous()
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(width))
        _quantise[(rows,)](x, factor, y, scale, width, FACTOR=factor is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4)
    return y, scale
