"""DFlash 2's selector: among the likeliest tokens of a slot, the one that fits best behind the token before.

score_j(c) = z_j(c) + < predecessor[prev] * (hidden_projection h_j), successor[c] >           c among the K likeliest of z_j
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.models.ops.embedding import lookup
from torchspec.models.ops.shared_rows import linear
from torchspec.models.ops.shared_weight import Weight, wide


class CandidateSelector(nn.Module):
    """Parameters, under the names that servers read."""

    def __init__(self, *, vocab_size: int, hidden_size: int, rank: int, candidates: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)
        self.candidates = candidates

    def forward(self, states: Tensor, previous: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        """Scores of candidates.

        Args:
            states: [M, H] after the final norm.
            previous: [M] the token before each slot's.
            candidates: [M, K] tokens.
            logits: [M, K] theirs.

        Returns:
            [M, K] in the type that sums are kept in.
        """
        kind = wide(states.dtype)
        hidden = linear(states, Weight.of([self.hidden_projection.weight], states.dtype))
        asked = lookup(self.predecessor_codebook, previous).to(kind) * hidden.to(kind)
        successors = lookup(self.successor_codebook, candidates.flatten()).to(kind).view(*candidates.shape, -1)
        return logits.to(kind) + torch.einsum("mr,mkr->mk", asked, successors)


def with_label(candidates: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of training: the label in the weakest one's place where it is not among them.

    Args:
        candidates: [M, K], the likeliest first.
        label: [M] tokens.

    Returns:
        the candidates; [M] where the label is among them; [M] bool whether it was there already.
    """
    equal = candidates == label[:, None]
    there = equal.any(1)
    index = torch.where(there, equal.to(torch.int64).argmax(1), candidates.shape[1] - 1)
    return candidates.scatter(1, index[:, None], label[:, None]), index, there
