"""SwiGLU's elementwise part, forward and backward; twin: ``models/ops/mlp.py``.

act = silu(gate) up          silu(z) = z s,  s = 1 / (1 + exp(-z))
d_gate = d_act up s (1 + gate (1 - s))         d_up = d_act silu(gate)

Results can be rounded to 8 bits here, row by row, as ``fp8.quantise`` does it: from the numbers that are, or would be, written in the inputs' type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.fp8 import Rounded
from torchspec.models.ops.kernels.rounding import factor_of, scale_of

_BLOCK = 1024
_ROW_BLOCK, _GRADIENT_BLOCK = 4096, 2048
"""Where a program does a whole row, since its largest number comes first: of the activation, of its gradients."""
_ROWS, _COLUMNS = 128, 32
"""A tile that is turned: three of them are made at once, and more than 32 numbers of each a thread are too many."""


@triton.jit
def _activation(gate_up, row, column, width, seen):
    gate = tl.load(gate_up + row * 2 * width + column, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=seen, other=0.0).to(tl.float32)
    return (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)


@triton.jit
def _gradients(gate_up, d_act, row, column, width, seen):
    gate = tl.load(gate_up + row * 2 * width + column, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=seen, other=0.0).to(tl.float32)
    grad = tl.load(d_act + row * width + column, mask=seen, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    kind = gate_up.dtype.element_ty
    return (silu * up).to(kind), (grad * up * s * (1 + gate * (1 - s))).to(kind), (grad * silu).to(kind)


@triton.jit
def _forward(gate_up, act, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    tl.store(act + row * width + column, _activation(gate_up, row, column, width, seen), mask=seen)


@triton.jit
def _backward(gate_up, d_act, act, d_gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < width
    again, d_gate, d_up = _gradients(gate_up, d_act, row, column, width, seen)
    tl.store(act + row * width + column, again, mask=seen)
    tl.store(d_gate_up + row * 2 * width + column, d_gate, mask=seen)
    tl.store(d_gate_up + row * 2 * width + width + column, d_up, mask=seen)


@triton.jit
def _forward_rounded(gate_up, y, scale, top, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    highest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        highest = tl.maximum(highest, tl.abs(_activation(gate_up, row, column, width, column < width).to(tl.float32)))
    largest = tl.max(highest, axis=0)
    by = scale_of(largest)
    inverse = 1.0 / by
    tl.store(scale + row, by)
    tl.store(top + row, largest)
    for first in range(0, width, BLOCK):
        column = first + lane
        values = _activation(gate_up, row, column, width, column < width).to(tl.float32)
        tl.store(y + row * width + column, (values * inverse).to(y.dtype.element_ty), mask=column < width)


@triton.jit
def _backward_rounded(gate_up, d_act, act, d_gate_up, factor, y, scale, top, act_top, width, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    act_high, plain, highest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        seen = column < width
        again, d_gate, d_up = _gradients(gate_up, d_act, row, column, width, seen)
        if PLAIN:
            tl.store(act + row * width + column, again, mask=seen)
            tl.store(d_gate_up + row * 2 * width + column, d_gate, mask=seen)
            tl.store(d_gate_up + row * 2 * width + width + column, d_up, mask=seen)
        left, right = tl.abs(d_gate.to(tl.float32)), tl.abs(d_up.to(tl.float32))
        act_high, plain = tl.maximum(act_high, tl.abs(again.to(tl.float32))), tl.maximum(plain, tl.maximum(left, right))
        left *= tl.load(factor + column, mask=seen, other=0.0)
        right *= tl.load(factor + width + column, mask=seen, other=0.0)
        highest = tl.maximum(highest, tl.maximum(left, right))
    largest = tl.max(highest, axis=0)
    by = scale_of(largest)
    inverse = 1.0 / by
    tl.store(scale + row, by)
    tl.store(top + row, tl.max(plain, axis=0))
    tl.store(act_top + row, tl.max(act_high, axis=0))
    for first in range(0, width, BLOCK):
        column = first + lane
        seen = column < width
        _, d_gate, d_up = _gradients(gate_up, d_act, row, column, width, seen)
        left = d_gate.to(tl.float32) * tl.load(factor + column, mask=seen, other=0.0)
        right = d_up.to(tl.float32) * tl.load(factor + width + column, mask=seen, other=0.0)
        tl.store(y + row * 2 * width + column, (left * inverse).to(y.dtype.element_ty), mask=seen)
        tl.store(y + row * 2 * width + width + column, (right * inverse).to(y.dtype.element_ty), mask=seen)


@triton.jit
def _store_turned(values, top, out, row, column, line, rows, padded, width, stride, most):
    largest = tl.load(top + row, mask=row < rows, other=0.0)
    by = factor_of(largest, most)
    values = values.to(tl.float32) * by[:, None]
    values = tl.where(values > most, most, tl.where(values < -most, -most, values))
    turned = tl.trans(values.to(out.dtype.element_ty))
    tl.store(out + line.to(tl.int64)[:, None] * stride + row[None, :], turned, mask=(column < width)[:, None] & (row < padded)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _backward_turned(
    gate_up, d_act, top, act_top, d_out, act_out, rows, padded, width, d_stride, act_stride, d_most, act_most, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = (row < rows)[:, None] & (column < width)[None, :]
    again, d_gate, d_up = _gradients(gate_up, d_act, row.to(tl.int64)[:, None], column[None, :], width, seen)
    _store_turned(again, act_top, act_out, row, column, column, rows, padded, width, act_stride, act_most)
    _store_turned(d_gate, top, d_out, row, column, column, rows, padded, width, d_stride, d_most)
    _store_turned(d_up, top, d_out, row, column, column + width, rows, padded, width, d_stride, d_most)


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


def forward_rounded(gate_up: Tensor) -> Rounded:
    """[R, 2I] to [R, I] in 8 bits."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = Rounded.empty(rows, width, gate_up.device)
    if rows:
        block = min(_ROW_BLOCK, triton.next_power_of_2(width))
        _forward_rounded[(rows,)](gate_up, act.data, act.scale, act.top, width, BLOCK=block, num_warps=8 if block >= 2048 else 4)
    return act


def backward_rounded(gate_up: Tensor, d_act: Tensor, factor: Tensor, *, plain: bool) -> tuple[Tensor | None, Tensor, Tensor | None, Rounded]:
    """:func:`backward`, and what a product with ``gate_up``'s weight wants.

    Args:
        gate_up: [R, 2I], contiguous.
        d_act: [R, I], contiguous.
        factor: [2I] fp32, above 0, by which columns of the gradient are multiplied before they are rounded.
        plain: also what :func:`backward` returns.

    Returns:
        the activation [R, I], its largest magnitudes [R], the gradient [R, 2I], the gradient in 8 bits.
    """
    rows, width = d_act.shape
    act, d_gate_up = (torch.empty_like(d_act), torch.empty_like(gate_up)) if plain else (None, None)
    act_top = torch.empty(rows, dtype=torch.float32, device=d_act.device)
    y = Rounded.empty(rows, 2 * width, d_act.device)
    if rows:
        block = min(_GRADIENT_BLOCK, triton.next_power_of_2(width))
        _backward_rounded[(rows,)](
            gate_up, d_act, act, d_gate_up, factor, y.data, y.scale, y.top, act_top, width, PLAIN=plain, BLOCK=block, num_warps=8 if block >= 2048 else 4
        )
    return act, act_top, d_gate_up, y


def backward_turned(gate_up: Tensor, d_act: Tensor, top: Tensor, act_top: Tensor, d_out: Tensor, act_out: Tensor) -> None:
    """What :func:`backward` returns, in 8 bits and turned, as ``fp8.round_transposed`` does it with the largest numbers of the types as limits.

    Args:
        gate_up, d_act: [R, 2I] and [R, I], contiguous.
        top, act_top: [R] the largest magnitude of each row of the gradient and of the activation.
        d_out, act_out: [2I, R or more] and [I, as many], rows contiguous; written here.
    """
    rows, width = d_act.shape
    padded = d_out.shape[1]
    if padded:
        _backward_turned[(triton.cdiv(padded, _ROWS), triton.cdiv(width, _COLUMNS))](
            gate_up, d_act, top, act_top, d_out, act_out, rows, padded, width, d_out.stride(0), act_out.stride(0),
            torch.finfo(d_out.dtype).max, torch.finfo(act_out.dtype).max, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
