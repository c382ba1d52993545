"""The one norm of the drafts. It is also a layer of the attention modules, so it lives below both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.models.norms import RMSFunction


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times weight (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = RMSFunction.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps)
        return normed.view(x.shape)
