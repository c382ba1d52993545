"""The one norm of the drafts. It is also a layer of the attention modules, so it lives below both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchspec.models.ops.norms import RMSFunction
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
