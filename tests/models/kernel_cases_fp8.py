"""Checks of the kernels that write 8 bits, beside those of ``kernel_cases.py``."""

from __future__ import annotations

import torch

from tests.models.kernel_cases import DEVICE, make, same
from torchspec.models.ops.fp8 import SMALLEST, Rounded
from torchspec.models.ops.fp8 import quantise as quantise_in_torch


def faint(x: torch.Tensor) -> torch.Tensor:
    """``x`` with a first row of zeros and two whose scales would leave fp32 (in fp16 zeros as well)."""
    x[:1] = 0
    x[1:2] = 1e-40
    x[2:3] *= 1e-33
    return x


def same_rounding(ours: Rounded, exact: Rounded) -> None:
    """Bit by bit in the interpreter; on a GPU, whose division is not the correctly rounded one, a neighbour here and there."""
    torch.testing.assert_close(ours.top, exact.top, rtol=0.0 if DEVICE.type == "cpu" else 1e-2, atol=0.0)
    torch.testing.assert_close(ours.scale, exact.scale, rtol=0.0 if DEVICE.type == "cpu" else 1e-2, atol=0.0)
    differ = ours.data.view(torch.uint8) != exact.data.view(torch.uint8)
    if DEVICE.type == "cpu":
        assert not differ.any()
    elif differ.any():
        assert differ.float().mean() < 1e-3
        torch.testing.assert_close(ours.data.float()[differ], exact.data.float()[differ], rtol=0.15, atol=2.0**-9)


def quantise(rows: int, width: int, dtype: torch.dtype, *, factor: bool) -> None:
    from torchspec.models.ops.kernels import fp8 as kernel

    x = faint(make(rows, width, dtype=dtype, seed=1))
    by = make(width, dtype=torch.float32, seed=2) if factor else None
    ours = kernel.quantise(x, by)
    exact = x.double() if by is None else x.double() * by.double()
    assert torch.isfinite(ours.data.float()).all() and (ours.scale > 0).all()
    step = exact.abs() / 16 + ours.scale.double() / 512  # half a step of three mantissa bits, or of the smallest number
    assert ((ours.data.double() * ours.scale.double() - exact).abs() <= step * 1.01).all()
    assert ours.data[:3].float().eq(0).all() and ours.data[3:].float().abs().amax(-1).eq(448).all()
    if DEVICE.type == "cpu":
        same_rounding(ours, quantise_in_torch(x, by))


def turn(rows: int, width: int, dtype: torch.dtype) -> None:
    """Both ways of scaling, into both 8-bit types, at a place inside a longer row; more than the type's largest number saturates, NaN is seen."""
    from torchspec.models.ops.kernels import fp8 as kernel

    x = faint(make(rows, width, dtype=dtype, seed=1, scale=3.0))
    top, padded = x.float().abs().amax(1) if rows else x.new_empty(0, dtype=torch.float32), -(-rows // 16) * 16
    other = make(rows, dtype=torch.float32, seed=2).abs() + 0.1
    other[2:3] = 1e-40
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        most = torch.finfo(kind).max
        for common in (None, torch.tensor(float(other.amax()) / most if rows else 1.0, device=DEVICE), torch.tensor(1e-6, device=DEVICE)):
            whole = torch.full((width, 16 + padded + 16), 1.5, device=DEVICE).to(kind)
            kernel.round_transposed(x, top if common is None else other, whole[:, 16 : 16 + padded], limit=most, common=common)
            ours = whole.float()
            assert (ours[:, :16] == 1.5).all() and (ours[:, 16 + padded :] == 1.5).all() and (ours[:, 16 + rows : 16 + padded] == 0).all()
            by = torch.where(top > SMALLEST, most / top, 0.0) if common is None else torch.where(other > SMALLEST, other / most / common, 0.0)
            exact = (x.double() * by.double()[:, None]).clamp(-most, most).t()
            half = 2.0 ** (-4 if kind == torch.float8_e4m3fn else -3)
            tiny = 2.0 ** (-10 if kind == torch.float8_e4m3fn else -17)
            assert ((ours[:, 16 : 16 + rows].double() - exact).abs() <= (exact.abs() * half + tiny) * 1.01).all()
    if rows:
        x[-1, -1] = float("nan")
        kernel.round_transposed(x, other, whole[:, :padded], limit=1.0, common=torch.tensor(1.0, device=DEVICE))
        assert torch.isnan(whole.float()[-1, rows - 1])


def round_both(rows: int, width: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import fp8 as kernel

    x, factor = faint(make(rows, width, dtype=dtype, seed=1)), make(width, dtype=torch.float32, seed=2).abs() + 0.01
    expected = kernel.quantise(x, factor)
    whole = torch.zeros(width, 16 + -(-rows // 16) * 16, device=DEVICE).to(torch.float8_e5m2)
    wanted = whole.clone()
    kernel.round_transposed(x, expected.top, wanted[:, 16:], limit=torch.finfo(whole.dtype).max, common=None)
    same_rounding(kernel.round_both(x, factor, expected.scale, expected.top, whole[:, 16:]), expected)
    assert (whole.view(torch.uint8) != wanted.view(torch.uint8)).float().mean() <= (0.0 if DEVICE.type == "cpu" else 1e-3)
    assert torch.isfinite(whole.float()).all()
    torch.testing.assert_close(whole.float(), wanted.float(), rtol=0.26, atol=2.0**-16)


def transpose(rows: int, width: int) -> None:
    from torchspec.models.ops.kernels import fp8 as kernel

    x = make(rows, width, dtype=torch.float32, seed=1).to(torch.float8_e4m3fn)
    assert torch.equal(kernel.transpose(x).view(torch.uint8), x.view(torch.uint8).t())


def norm_rounded(rows: int, width: int, dtype: torch.dtype, *, placed: bool) -> None:
    from torchspec.models.ops.kernels import fp8 as rounding
    from torchspec.models.ops.kernels import norm as kernel

    x, weight = make(rows + 3, width, dtype=dtype, seed=1), make(width, dtype=torch.float32, seed=2)
    x[:1] = 0
    place = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(3))[:rows].to(DEVICE) if placed else None
    source = x if placed else x[:rows]
    expected, inverse = kernel.forward(source, weight, 1e-5, place=place)
    for plain in (False, True):
        y, ours, rounded = kernel.forward_rounded(source, weight, 1e-5, place=place, plain=plain)
        assert (y is None) == (not plain)
        same(ours, inverse)
        if y is not None:
            same(y, expected)
        same_rounding(rounded, rounding.quantise(expected, None))


def swiglu_rounded(rows: int, width: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import fp8 as rounding
    from torchspec.models.ops.kernels import swiglu as kernel

    gate_up, d_act = make(rows, 2 * width, dtype=dtype, seed=1, scale=2.0), make(rows, width, dtype=dtype, seed=2)
    faint(d_act)
    factor = make(2 * width, dtype=torch.float32, seed=3).abs() + 0.01
    same_rounding(kernel.forward_rounded(gate_up), rounding.quantise(kernel.forward(gate_up), None))
    expected, d_expected = kernel.backward(gate_up, d_act)
    act, top, d_gate_up, rounded = kernel.backward_rounded(gate_up, d_act, factor, plain=True)
    assert act is not None and d_gate_up is not None
    same(act, expected)
    same(d_gate_up, d_expected)
    assert torch.equal(top, rounding.quantise(act, None).top)
    assert torch.isfinite(rounded.data.float()).all()
    same_rounding(rounded, rounding.quantise(d_gate_up, factor))
    nothing, again, neither, rounded_again = kernel.backward_rounded(gate_up, d_act, factor, plain=False)
    assert nothing is None and neither is None
    same(again, top)
    same_rounding(rounded_again, rounded)

    room, kinds = 16 + -(-rows // 16) * 16, (torch.float8_e5m2, torch.float8_e4m3fn)
    whole = [torch.zeros(high, room, device=DEVICE).to(kind) for high, kind in zip((2 * width, width), kinds, strict=True)]
    wanted = [t.clone() for t in whole]
    kernel.backward_turned(gate_up, d_act, rounded.top, top, *(t[:, 16:] for t in whole))
    for values, largest, out in zip((d_gate_up, act), (rounded.top, top), wanted, strict=True):
        rounding.round_transposed(values, largest, out[:, 16:], limit=torch.finfo(out.dtype).max, common=None)
    for ours, exact in zip(whole, wanted, strict=True):
        assert torch.isfinite(ours.float()).all()
        assert (ours.view(torch.uint8) != exact.view(torch.uint8)).float().mean() <= (0.0 if DEVICE.type == "cpu" else 1e-3)
        torch.testing.assert_close(ours.float(), exact.float(), rtol=0.26, atol=2.0**-9)
