"""Which target tokens the rows of a pruned draft head stand for.

Draft ids are in increasing order of target ids. On disk the mapping is ``d2t`` (int64 offsets: target id = draft id + d2t[draft id]) and ``t2d`` (bool);
inside the project it
is the list of target ids, so that an offset is never taken for an id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchspec.errors import UserError


@dataclass(frozen=True, eq=False)
class VocabularyMapping:
    """A draft vocabulary inside a target's.

    Args:
        draft_ids: [W] int64 target ids, strictly increasing.
        target_size: V.
    """

    draft_ids: Tensor
    target_size: int

    def __post_init__(self) -> None:
        ids = self.draft_ids
        if ids.dtype != torch.int64 or ids.ndim != 1 or ids.numel() == 0:
            raise UserError("draft vocabulary", tuple(ids.shape), "is no list of int64 ids", "build it with VocabularyMapping.from_counts")
        if bool((ids[1:] <= ids[:-1]).any()) or int(ids[0]) < 0 or int(ids[-1]) >= self.target_size:
            raise UserError(
                "draft vocabulary",
                ids[:8].tolist(),
                f"is not strictly increasing inside 0..{self.target_size - 1}",
                "build it with VocabularyMapping.from_counts",
            )

    @property
    def size(self) -> int:
        """W."""
        return self.draft_ids.numel()

    @cached_property
    def d2t(self) -> Tensor:
        """[W] int64 offsets."""
        return self.draft_ids - torch.arange(self.size)

    @cached_property
    def t2d(self) -> Tensor:
        """[V] bool."""
        member = torch.zeros(self.target_size, dtype=torch.bool)
        member[self.draft_ids] = True
        return member

    def coverage(self, counts: Tensor) -> float:
        """Share of the counted tokens that the draft vocabulary holds; counts [V]."""
        return float(counts[self.draft_ids].sum()) / max(float(counts.sum()), 1.0)

    @classmethod
    def from_counts(cls, counts: Tensor, size: int, *, always: Sequence[int] = ()) -> VocabularyMapping:
        """The ``size`` most frequent tokens, ties by smaller id.

        Args:
            counts: [V] int64 supervised occurrences.
            size: W.
            always: ids kept whatever their count (tokens that end a turn).

        Raises:
            UserError: when ``size`` does not fit.
        """
        total = counts.numel()
        if not max(len(set(always)), 1) <= size <= total:
            raise UserError("draft vocabulary size", size, f"is not in {max(len(set(always)), 1)}..{total}", "choose a size in this range")
        rank = counts.to(torch.int64).clone()
        rank[list(always)] = torch.iinfo(torch.int64).max
        order = torch.argsort(rank, descending=True, stable=True)
        return cls(order[:size].sort().values, total)
