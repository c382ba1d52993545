"""DFlash 2's grouped convolution inside a block: what the rows of a block tell each other around attention and around the MLP.

    coef = kernel_projection u                                         u: the normed input of the layer's part, both sides from the same
    conv_side(x)_j[c] = sum_{t < taps, t <= j} (base_kernel[side, t, c] + coef_j[side, t, group of c]) x_{j-t}[c]

It begins as nothing: the first tap passes x on, and everything else is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.models.ops.shared_rows import linear
from torchspec.models.ops.shared_weight import Weight, wide


class GroupedConvolution(nn.Module):
    """Parameters of both sides, under the names that servers read."""

    def __init__(self, size: int, *, taps: int, group: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, size))
        self.kernel_projection = nn.Linear(size, 2 * taps * size // group, bias=False)
        self.group = group

    @torch.no_grad()
    def initialise(self) -> None:
        """Pass everything on as it is."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def cast(self, dtype: torch.dtype) -> Convolution:
        """For one forward pass."""
        return Convolution(self.base_kernel.to(wide(dtype)), Weight.of([self.kernel_projection.weight], dtype), self.group)


class Convolution:
    """A convolution during one forward pass."""

    def __init__(self, base: Tensor, projection: Weight, group: int) -> None:
        self.base, self.projection, self.group = base, projection, group

    def coefficients(self, source: Tensor, slots: int) -> Tensor:
        """[2, A, S, taps, groups] from the part's normed input [A * S, H]."""
        said = linear(source, self.projection)
        return said.view(-1, slots, 2, self.base.shape[1], source.shape[1] // self.group).permute(2, 0, 1, 3, 4)

    def apply(self, side: int, coefficients: Tensor, x: Tensor) -> Tensor:
        """Convolve rows [A * S, H] inside their blocks."""
        slots = coefficients.shape[2]
        blocks = x.view(-1, slots, x.shape[1])
        total: Tensor | None = None
        for tap in range(self.base.shape[1]):
            shifted = F.pad(blocks, (0, 0, tap, 0))[:, :slots].unflatten(-1, (-1, self.group))
            weight = self.base[side, tap].view(-1, self.group) + coefficients[side, :, :, tap, :, None]
            total = weight * shifted if total is None else total + weight * shifted
        assert total is not None
        return total.flatten(-2).view(x.shape).to(x.dtype)
