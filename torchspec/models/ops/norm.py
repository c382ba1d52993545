"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467): the layer, and its forward and backward as plain functions, by kernel where there is one.

y = x / rms(x) in fp32, cast back, times weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import Rounded, quantise
from torchspec.models.ops.shared_weight import wide


@dataclass(frozen=True)
class Norm:
    """A norm during one forward pass, used any number of times."""

    weight: Tensor
    """[C] in the type that sums are kept in."""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C] in the type of ``x``."""
        normed: Tensor = RMSFunction.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps)
        return normed.view(x.shape)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def cast(self) -> Norm:
        """For one forward pass. The weight may be a bf16 copy (FSDP gathers such): widened once here, the gradients of all uses are summed wide and rounded
        once."""
        return Norm(self.weight.to(wide(self.weight.dtype)), self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.cast()(x)


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of rows.

    Args:
        x: [R, H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        y [R, H] in the type of ``x``, and 1 / rms [R, 1] in fp32 (fp64 for fp64).
    """
    if kernels.usable(x):
        from torchspec.models.ops.kernels import norm

        return norm.forward(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype), inverse


def rms_forward_rounded(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Rounded]:
    """:func:`rms_forward` with y in 8 bits alone, as :func:`~torchspec.models.ops.fp8.quantise` rounds it: 1 / rms, y."""
    if kernels.usable(x):
        from torchspec.models.ops.kernels import norm

        return norm.forward_rounded(x, weight, eps, plain=False)[1:]
    y, inverse = rms_forward(x, weight, eps)
    return inverse, quantise(y)


def rms_backward(d_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_forward`, through the weight and the unit rows as it rounded them.

    Args:
        d_y: [R, H].
        x, weight, inverse: given to and returned by the forward.
        more: [R, H] added to d_x: the gradient that reaches x another way.

    Returns:
        d_x [R, H] in the type of ``x``; d_weight [H] in fp32 (fp64 for fp64).
    """
    if kernels.usable(x):
        from torchspec.models.ops.kernels import norm

        return norm.backward(d_y, x, weight, inverse, more=more)
    kind = inverse.dtype
    unit = x.to(kind) * inverse
    d_unit = d_y.to(kind) * weight.to(x.dtype).to(kind)
    d_x = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * inverse
    if more is not None:
        d_x += more
    return d_x.to(x.dtype), (d_y.to(kind) * unit.to(x.dtype).to(kind)).sum(0)


class RMSFunction(torch.autograd.Function):
    """The norm of rows [R, H]; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = rms_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        d_x, d_weight = rms_backward(grads[0], x, weight, inverse)
        return d_x, d_weight.to(weight.dtype), None
