"""RMSNorm forward and backward as plain functions, for autograd functions that recompute a normed tensor instead of keeping it.

y = x / rms(x) in fp32, cast back, times weight (Zhang and Sennrich, arXiv 1910.07467)
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norm of rows.

    Args:
        x: [R, H].
        weight: [H].
        eps: added to the mean square.

    Returns:
        y [R, H] in the type of ``x``, and 1 / rms [R, 1] in fp32 (fp64 for fp64).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype), inverse


def rms_backward(d_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_forward`.

    Args:
        d_y: [R, H].
        x, weight, inverse: given to and returned by the forward.

    Returns:
        d_x [R, H] in the type of ``x``; d_weight [H] in fp32 (fp64 for fp64).
    """
    kind = inverse.dtype
    unit = x.to(kind) * inverse
    d_unit = d_y.to(kind) * weight.to(kind)
    d_x = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)) * inverse
    return d_x.to(x.dtype), (d_y.to(kind) * unit).sum(0)
