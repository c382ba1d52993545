"""On-policy data: conversations up to one of their answers, which the target gives anew in the run.

The plan packs prompt + longest answer, since it cannot know more; what really was said comes with the records. Only the new answer is supervised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from torchspec.data.dataset import TokenizedDataset
from torchspec.engines.engine import OnPolicy
from torchspec.engines.messages import PartialAnswer, Sample
from torchspec.errors import UserError
from torchspec.supervision import Supervision
from torchspec.transfer.keys import key_of

_LEAST = 2
"""Answer tokens below which nothing can be supervised."""


class Prompts:
    """See :class:`torchspec.data.sample_source.Samples`.

    A conversation is cut before its last answer that has room for ``max_new_tokens``, else before its first; where even that has no room it is left out.

    Args:
        data: conversations with answers.
        policy: how the target answers.
        max_length: tokens of prompt and answer at most.

    Raises:
        UserError: when no conversation has room.
    """

    def __init__(self, data: TokenizedDataset, policy: OnPolicy, *, max_length: int) -> None:
        self.data, self.policy = data, policy
        cuts = np.array([_cut(data.mask(i), max_length - policy.max_new_tokens) for i in range(len(data))], dtype=np.int64)
        room = np.minimum(policy.max_new_tokens, max_length - cuts)
        self._kept = np.flatnonzero((cuts > 0) & (room >= _LEAST))
        if not self._kept.size:
            raise UserError(
                "data.on_policy.max_new_tokens", policy.max_new_tokens, f"fits behind no prompt within data.max_length={max_length}", "raise data.max_length"
            )
        self._prompts, self._room = cuts[self._kept], room[self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self._prompts + self._room

    def measured(self, supervision: Supervision) -> tuple[None, np.ndarray]:
        """No normalisers, which come with the answers; [n] draft rows of the longest ones."""
        return None, supervision.work(*_answer_masks(self._room))

    @cached_property
    def content(self) -> str:
        """Hash of the prompts and of how they are answered."""
        digest = hashlib.sha256(self.data.content.encode())
        digest.update(self._prompts.tobytes() + self.lengths.tobytes())
        digest.update(repr((self.policy.temperature, self.policy.top_p, self.policy.seed)).encode())
        return digest.hexdigest()

    def prompt(self, index: int) -> np.ndarray:
        """[P] int32 token ids."""
        return self.data.ids(int(self._kept[index]))[: self._prompts[index]]

    def request(self, index: int, *, epoch: int) -> Sample:
        seed = np.random.SeedSequence([self.policy.seed, epoch, index]).generate_state(1, np.uint32)[0]
        return Sample(index, self.prompt(index).astype("<i4").tobytes(), PartialAnswer(int(self._room[index]), seed=int(seed)))

    def mismatch(self, index: int, ids: Tensor) -> str:
        prompt = torch.from_numpy(self.prompt(index).astype("int32"))
        if not prompt.shape[0] < ids.shape[0] <= self.lengths[index]:
            return f"holds {ids.shape[0]} tokens for a prompt of {prompt.shape[0]} and at most {self._room[index]} more"
        return "" if torch.equal(ids[: prompt.shape[0]], prompt) else f"does not begin with prompt {index}"

    def loss_mask(self, index: int, tokens: int) -> np.ndarray:
        return (np.arange(tokens) >= self._prompts[index]).astype(np.uint8)

    def positions(self, index: int, tokens: int) -> np.ndarray | None:
        return None  # images and answers in the run exclude each other

    def key(self, index: int) -> int:
        return key_of(self.prompt(index))

    def place(self, index: int) -> str:
        return self.data.place(int(self._kept[index]))


def answer_counts(lengths: Sequence[int], supervision: Supervision) -> np.ndarray:
    """[Q] float32: normalisers of answers of these lengths together, each one turn behind a prompt."""
    return supervision.counts(*_answer_masks(lengths)).sum(axis=0).astype(np.float32)


def _answer_masks(lengths: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss masks of conversations of one prompt token and an answer, one after the other, and their bounds [C+1]."""
    bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(lengths, dtype=np.int64) + 1)])
    mask = np.ones(int(bounds[-1]), dtype=np.uint8)
    mask[bounds[:-1]] = 0
    return mask, bounds


def _cut(mask: np.ndarray, before: int) -> int:
    """Where the last answer begins that begins at or before a position, else the first; 0 without one that follows a prompt."""
    on = mask.astype(bool)
    begins = np.flatnonzero(on[1:] & ~on[:-1]) + 1
    if not begins.size:
        return 0
    early = begins[begins <= before]
    return int(early[-1] if early.size else begins[0])
