"""The draft's MLP with its norm and residual as one function that keeps little.

    out = h + down(silu(gate) up),   [gate; up] = W norm(h)            (SwiGLU: Shazeer, arXiv 2002.05202)

Kept for the backward are h and [gate; up]; norm and activation are made again, which costs reads and no product. With ``recompute`` [gate; up] is made
again too, by one more product, and only h is kept: (H + 2I) / H times fewer bytes a row; rows then pass in slices.

With 8-bit products norm and activation write their results in 8 bits, where those go into a product and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import Rounded, limit_of, quantise, round_transposed
from torchspec.models.ops.norm import rms_backward, rms_forward, rms_forward_rounded
from torchspec.models.ops.shared_weight import Weight

_SLICE = 2**14
"""Rows at a time with ``recompute``, so that inner activations of a few are alive: of 128k rows they are 18 GiB at I = 12288, of these 2.3."""


class MLP(nn.Module):
    """Parameters: gate, up and down, between H and I."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2I] (gate, then up) to [R, I]."""
    if kernels.usable(gate_up):
        from torchspec.models.ops.kernels import swiglu as kernel

        return kernel.forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(gate_up: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """The activation [R, I] once more, and the gradient of ``gate_up`` [R, 2I]."""
    if kernels.usable(gate_up):
        from torchspec.models.ops.kernels import swiglu as kernel

        return kernel.backward(gate_up, d_act)
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    d_gate_up = torch.empty_like(gate_up)
    torch.mul(d_act, silu, out=d_gate_up[:, gate.shape[1] :])
    d_gate_up[:, : gate.shape[1]] = torch.ops.aten.silu_backward(d_act * up, gate)
    return silu.mul_(up), d_gate_up


def swiglu_rounded(gate_up: Tensor) -> Rounded:
    """:func:`swiglu` in 8 bits."""
    if kernels.usable(gate_up):
        from torchspec.models.ops.kernels import swiglu as kernel

        return kernel.forward_rounded(gate_up)
    return quantise(swiglu(gate_up))


def swiglu_backward_rounded(gate_up: Tensor, d_act: Tensor, factor: Tensor, *, plain: bool) -> tuple[Tensor | None, Tensor, Tensor | None, Rounded]:
    """The gradient of ``gate_up`` in 8 bits.

    Args:
        gate_up: [R, 2I], contiguous.
        d_act: [R, I], contiguous.
        factor: [2I] fp32, above 0: the gradient's columns are multiplied by it before they are rounded.
        plain: also what :func:`swiglu_backward` returns.

    Returns:
        the activation, its largest magnitude in each row [R], the gradient, the gradient in 8 bits.
    """
    if kernels.usable(gate_up):
        from torchspec.models.ops.kernels import swiglu as kernel

        return kernel.backward_rounded(gate_up, d_act, factor, plain=plain)
    act, d_gate_up = swiglu_backward(gate_up, d_act)
    return act, quantise(act).top, d_gate_up, quantise(d_gate_up, factor)


def swiglu_backward_turned(gate_up: Tensor, d_act: Tensor, top: Tensor, act_top: Tensor, d_out: Tensor, act_out: Tensor) -> None:
    """What :func:`swiglu_backward` returns, for the sums of weight gradients.

    Args:
        gate_up, d_act: [R, 2I] and [R, I], contiguous.
        top, act_top: [R] the largest magnitude of each row of the gradient and of the activation.
        d_out, act_out: places to write them to (:meth:`~torchspec.models.ops.fp8.Fp8Gradient.place`).
    """
    if kernels.usable(gate_up):
        from torchspec.models.ops.kernels import swiglu as kernel

        kernel.backward_turned(gate_up, d_act, top, act_top, d_out, act_out)
        return
    act, d_gate_up = swiglu_backward(gate_up, d_act)
    round_transposed(d_gate_up, top, d_out, limit=limit_of(d_out.dtype))
    round_transposed(act, act_top, act_out, limit=limit_of(act_out.dtype))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, norm: Tensor, gate_up_token: Tensor, down_token: Tensor, gate_up_weight: Weight, down_weight: Weight, eps: float, recompute: bool
    ) -> Tensor:
        first, last = gate_up_weight.store, down_weight.store
        z_top = None
        if first.narrow is None or last.narrow is None:
            z, inverse = rms_forward(h, norm, eps)
            gate_up = first.forward(z)
            out = torch.addmm(h, swiglu(gate_up), last.data.t())
        else:
            inverse, narrow = rms_forward_rounded(h, norm, eps)
            gate_up, z_top = first.narrow.forward(narrow, h.dtype), narrow.top
            del narrow
            out = last.narrow.forward(swiglu_rounded(gate_up), h.dtype).add_(h)
        for store in (first, last):
            if store.gradient is not None:
                store.gradient.expect(h.shape[0])
        ctx.stores, ctx.eps = (first, last), eps
        ctx.save_for_backward(h, norm, inverse, None if recompute else gate_up, z_top)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, norm, inverse, gate_up, z_top = ctx.saved_tensors
        first, last = ctx.stores
        every, d_out = slice(None), grads[0].contiguous()
        z, _ = rms_forward(h, norm, ctx.eps)
        if gate_up is None:
            gate_up = first.forward(z)
        if first.narrow is None or last.narrow is None:
            act, d_gate_up = swiglu_backward(gate_up, last.backward(d_out))
            del gate_up
            last.add(every, every, d_out, act)
            del act
            first.add(every, every, d_gate_up, z)
            d_z = first.backward(d_gate_up)
        else:
            narrow = quantise(d_out, last.narrow.factor)
            d_act = last.narrow.backward(narrow, d_out.dtype)
            sums = None if first.gradient is None or last.gradient is None else (first.gradient, last.gradient)
            again, act_top, d_plain, d_narrow = swiglu_backward_rounded(gate_up, d_act, first.narrow.factor, plain=sums is None)
            if sums is None:
                assert again is not None and d_plain is not None
                last.add(every, every, d_out, again)
                first.add(every, every, d_plain, z)
            else:
                d_place, act_place = sums[0].place(gate_up.shape[1], z, d_narrow.top, z_top), sums[1].place(d_act.shape[1], d_out, act_top, narrow.top)
                swiglu_backward_turned(gate_up, d_act, d_narrow.top, act_top, d_place, act_place)
                del d_place, act_place
            del gate_up, d_act, again, d_plain, narrow
            d_z = first.narrow.backward(d_narrow, d_out.dtype)
        d_h, d_norm = rms_backward(d_z, h, norm, inverse, more=d_out)
        return d_h, d_norm.to(norm.dtype), None, None, None, None, None, None


def mlp_block(h: Tensor, norm: Tensor, gate_up: Weight, down: Weight, *, eps: float, recompute: bool) -> Tensor:
    """Norm, MLP and residual.

    Args:
        h: [R, H].
        norm: [H], weight of the norm before the MLP.
        gate_up: [2I, H].
        down: [H, I].
        eps: of the norm.
        recompute: keep only ``h`` for the backward, and work in slices of rows.

    Returns:
        [R, H].
    """
    if recompute and h.shape[0] > _SLICE:
        return torch.cat([mlp_block(rows, norm, gate_up, down, eps=eps, recompute=True) for rows in h.split(_SLICE)])
    out: Tensor = _Block.apply(h, norm, gate_up.token, down.token, gate_up, down, eps, recompute)
    return out
