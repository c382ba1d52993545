"""SwiGLU's elementwise part, forward and backward; twin: ``models/mlp.py``.

act = silu(gate) up          silu(z) = z s,  s = 1 / (1 + exp(-z))
d_gate = d_act up s (1 + gate (1 - s))         d_up = d_act silu(gate)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(gate_up, act, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=seen, other=0.0).to(tl.float32)
    tl.store(act + row * width + column, (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty), mask=seen)


@triton.jit
def _backward(gate_up, d_act, act, d_gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=seen, other=0.0).to(tl.float32)
    grad = tl.load(d_act + row * width + column, mask=seen, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    kind = act.dtype.element_ty
    tl.store(act + row * width + column, (silu * up).to(kind), mask=seen)
    tl.store(d_gate_up + row * 2 * width + column, (grad * up * s * (1 + gate * (1 - s))).to(kind), mask=seen)
    tl.store(d_gate_up + row * 2 * width + width + column, (grad * silu).to(kind), mask=seen)


def forward(gate_up: Tensor) -> Tensor:
    """[R, 2I] (gate, then up) to [R, I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = gate_up.new_empty(rows, width)
    if rows:
        _forward[(rows, triton.cdiv(width, _BLOCK))](gate_up, act, width, BLOCK=_BLOCK, num_warps=4)
    return act


def backward(gate_up: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """Given the forward's input [R, 2I] and the gradient of its result [R, I]: the result once more [R, I], and the gradient of the input [R, 2I]."""
    rows, width = d_act.shape
    act, d_gate_up = torch.empty_like(d_act), torch.empty_like(gate_up)
    if rows:
        _backward[(rows, triton.cdiv(width, _BLOCK))](gate_up, d_act, act, d_gate_up, width, BLOCK=_BLOCK, num_warps=4)
    return act, d_gate_up
