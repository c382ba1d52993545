"""DSpark's Markov head (arXiv 2607.05147): what the token before says about the next one, as a low-rank bias of the logits.

z'_j = z_j + markov_w2 markov_w1[prev_j]            prev: the anchor's token, then the token drafted one slot before (in training the text's own)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspec.models.ops.embedding import lookup

_SPREAD = 0.01
"""Of markov_w1 at the start, speculators' value; markov_w2 starts at 0, so that the bias does."""


class MarkovHead(nn.Module):
    """Parameters, under the names that servers read: one embedding of every target token, one row of every draft token."""

    def __init__(self, *, vocab_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """No bias yet."""
        self.markov_w1.weight.normal_(0.0, _SPREAD, generator=generator)
        self.markov_w2.weight.zero_()

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, r] for token ids [M]."""
        return lookup(self.markov_w1.weight, tokens).to(dtype)
