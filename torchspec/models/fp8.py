"""Products with a weight in 8-bit floats (e4m3): y = x W^T and d_x = d_y W. The weight's own gradient stays a bf16 product summed in fp32.

Every row of x, of d_y and of W has a scale of its own. In d_x the sum runs over W's rows, so their scales go into d_y before it is rounded:

    y_rn = s_r s_n sum_k x8_rk w8_nk               d_x_rk = t_r sum_n round(d_y_rn s_n / t_r) w8_nk

Forward products accumulate fast (in the tensor core's short sums), backward ones, which are longer, do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models import kernels
from torchspec.models.draft_config import DraftConfig

_MULTIPLE = 16
"""What the product's kernel wants both sizes of a weight to be multiples of."""


def check(device: torch.device, config: DraftConfig) -> None:
    """Refuse what would not be made in 8 bits.

    Raises:
        UserError: sizes that the products do not take, or no CUDA device of compute capability 9.0 or more.
    """
    for name in ("hidden_size", "intermediate_size", "draft_vocab_size"):
        if (size := getattr(config, name)) % _MULTIPLE:
            raise UserError("model.matmul", "fp8", f"wants sizes that are multiples of {_MULTIPLE}, and draft.{name} is {size}", "change it, or use bf16")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("model.matmul", "fp8", f"needs a GPU with 8-bit matrix products scaled by row (Hopper or later), this is {device}", "use bf16")


def quantise(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rows, after multiplying columns by ``factor``.

    Args:
        x: [R, C].
        factor: [C] fp32.

    Returns:
        y [R, C] e4m3; s [R, 1] fp32, such that y s is about x times factor.
    """
    if kernels.usable(x):
        from torchspec.models.kernels import fp8

        return fp8.quantise(x, factor)
    wide = x.float() if factor is None else x.float() * factor
    scale = wide.abs().amax(dim=1, keepdim=True) / 448.0
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale).to(torch.float8_e4m3fn), scale


class Fp8Weight:
    """A weight [N, K], rounded by row and kept both ways round (products want the summed dimension contiguous); :func:`check` has seen to N and K."""

    def __init__(self, data: Tensor) -> None:
        assert data.shape[0] % _MULTIPLE == 0 and data.shape[1] % _MULTIPLE == 0
        self.data, self.scale = quantise(data)
        self.turned = self.data.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
        self.one = torch.ones(1, data.shape[1], dtype=torch.float32, device=data.device)

    def forward(self, x: Tensor) -> Tensor:
        """[R, K] to x W^T [R, N]."""
        x8, scale = quantise(x)
        return torch._scaled_mm(x8, self.data.t(), scale_a=scale, scale_b=self.scale.t(), out_dtype=x.dtype, use_fast_accum=True)

    def backward(self, d_y: Tensor) -> Tensor:
        """[R, N] to d_y W [R, K]."""
        d8, scale = quantise(d_y, self.scale[:, 0])
        return torch._scaled_mm(d8, self.turned.t(), scale_a=scale, scale_b=self.one, out_dtype=d_y.dtype, use_fast_accum=False)
