"""DSpark's confidence head (arXiv 2607.05147): how likely a drafted token is to be accepted.

c_j = sigmoid(proj([h_j ; markov_w1[prev_j]]))          h after the final norm; in fp32
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.models.ops.shared_weight import wide


class ConfidenceHead(nn.Module):
    """Parameters, under the names that servers read."""

    def __init__(self, *, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, states: Tensor, previous: Tensor) -> Tensor:
        """[M] logits for normed states [M, H] and embeddings of the tokens before [M, r]."""
        kind = wide(states.dtype)
        features = torch.cat([states.to(kind), previous.to(kind)], dim=-1)
        return F.linear(features, self.proj.weight.to(kind), self.proj.bias.to(kind))[:, 0]
