"""The token that stands in the slots to be drafted, and where its embedding comes from.

Servers embed it like any token, so its row must not be that of a token which texts hold. Best is a row of the target's table that the tokenizer does not use
(Qwen3 has 151669 and up); else a special token of the tokenizer's that ends nothing and that the chat template does not name. The row of a learned mask is
the draft's own and ships beside it (``mask_embedding.pt``); vLLM's DFlash and DFlash 2 read it, its DSpark does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchspec.errors import UserError
from torchspec.models.target_head import read_embedding
from torchspec.target import Target


@dataclass(frozen=True)
class Mask:
    """Which token, and whether its row is the draft's own."""

    token: int
    learned: bool


def default_mask(target: Target, *, learn: bool) -> Mask:
    """The mask of a draft of this target.

    Args:
        target: its table and tokenizer decide.
        learn: whether a row of the draft's own can be served.

    Raises:
        UserError: there is neither an unused row nor an unused special token.
    """
    tokenizer = target.tokenizer()
    table = read_embedding(target)
    for row in range(len(tokenizer), min(target.vocab_size, table.shape[0])):
        if bool((table[row] != 0).any()) and bool(torch.isfinite(table[row]).all()):
            return Mask(row, False)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = {*target.end_ids(), tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    spare = [i for i, token in sorted(added.items()) if token.special and i not in used and str(token) not in template and i < target.vocab_size]
    if spare:
        return Mask(spare[-1], learn)
    problem = "has no row in its embedding for the mask: the tokenizer uses all of them, its special tokens too"
    raise UserError("data.target.path", target.config.path, problem, "set mask_token_id in model.draft to a token that no text of yours holds")
