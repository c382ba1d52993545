"""The network: logits = head(norm(a_t)), where a_t [H] is the target's hidden state of one layer at position t.

position          0    1    2    3
aux state         a0   a1   a2   a3
proposes          x2   x3   x4   -      the token after the next one, x_{t+1} being given
"""

from __future__ import annotations

from torch import Tensor, nn

from tests.made_up.linear.config import LinearConfig
from torchspec.models.ops.norm import RMSNorm


class LinearDraft(nn.Module):
    """Names of its parameters are those of its files."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config
        self.input_norm = RMSNorm(config.hidden_size, config.eps)
        self.head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def forward(self, aux: Tensor) -> Tensor:
        """Logits [..., W] of states [..., H]."""
        logits: Tensor = self.head(self.input_norm(aux))
        return logits
