"""The draft's MLP with its norm and residual as one function that keeps little.

    out = h + down(silu(gate) up),   [gate; up] = W norm(h)            (SwiGLU: Shazeer, arXiv 2002.05202)

Kept for the backward are h and [gate; up]; norm and activation are made again, which costs reads and no product. With ``recompute`` [gate; up] is made
again too, by one more product, and only h is kept: (H + 2I) / H times fewer bytes a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.models import kernels
from torchspec.models.draft_config import DraftConfig
from torchspec.models.norms import rms_backward, rms_forward
from torchspec.models.shared import Weight


class MLP(nn.Module):
    """Parameters: gate, up and down."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2I] (gate, then up) to [R, I]."""
    if kernels.usable(gate_up):
        from torchspec.models.kernels import swiglu as kernel

        return kernel.forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(gate_up: Tensor, d_act: Tensor) -> tuple[Tensor, Tensor]:
    """The activation [R, I] once more, and the gradient of ``gate_up`` [R, 2I]."""
    if kernels.usable(gate_up):
        from torchspec.models.kernels import swiglu as kernel

        return kernel.backward(gate_up, d_act)
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    d_gate_up = torch.empty_like(gate_up)
    torch.mul(d_act, silu, out=d_gate_up[:, gate.shape[1] :])
    d_gate_up[:, : gate.shape[1]] = torch.ops.aten.silu_backward(d_act * up, gate)
    return silu.mul_(up), d_gate_up


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, norm: Tensor, gate_up_token: Tensor, down_token: Tensor, gate_up_weight: Weight, down_weight: Weight, eps: float, recompute: bool
    ) -> Tensor:
        z, inverse = rms_forward(h, norm, eps)
        gate_up = gate_up_weight.store.forward(z)
        ctx.stores, ctx.eps = (gate_up_weight.store, down_weight.store), eps
        ctx.save_for_backward(h, norm, inverse, None if recompute else gate_up)
        act = swiglu(gate_up)
        return torch.addmm(h, act, down_weight.data.t()) if not down_weight.store.narrow else down_weight.store.forward(act).add_(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, norm, inverse, gate_up = ctx.saved_tensors
        first, last = ctx.stores
        every, d_out = slice(None), grads[0].contiguous()
        z, _ = rms_forward(h, norm, ctx.eps)
        if gate_up is None:
            gate_up = first.forward(z)
        act, d_gate_up = swiglu_backward(gate_up, last.backward(d_out))
        del gate_up
        last.add(every, every, d_out, act)
        del act
        first.add(every, every, d_gate_up, z)
        d_h, d_norm = rms_backward(first.backward(d_gate_up), h, norm, inverse, more=d_out)
        empty = h.new_empty(0)
        return d_h, d_norm.to(norm.dtype), empty, empty, None, None, None, None


def mlp_block(h: Tensor, norm: Tensor, gate_up: Weight, down: Weight, *, eps: float, recompute: bool) -> Tensor:
    """Norm, MLP and residual.

    Args:
        h: [R, H].
        norm: [H], weight of the norm before the MLP.
        gate_up: [2I, H].
        down: [H, I].
        eps: of the norm.
        recompute: keep only ``h`` for the backward.

    Returns:
        [R, H].
    """
    out: Tensor = _Block.apply(h, norm, gate_up.token, down.token, gate_up, down, eps, recompute)
    return out
