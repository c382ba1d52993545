"""A made-up draft family's rule: few positions of a conversation, drawn anew each epoch, each of some draft rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchspec.supervision import depths, turns


@dataclass(frozen=True)
class SparseRows:
    """The positions that were drawn."""

    base: Tensor
    depth: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> SparseRows:
        return SparseRows(fn(self.base), self.depth)


@dataclass(frozen=True)
class Sparse:
    """At most ``most`` positions of a conversation, each of ``width`` draft rows."""

    most: int
    width: int = 4

    @property
    def horizon(self) -> int:
        return 1

    def counts(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        on = depths(turns(mask, bounds), bounds) > 0
        there = [int(part.sum()) for part in np.split(on, bounds[1:-1])] if len(bounds) > 1 else []
        return np.array([[min(n, self.most)] for n in there], dtype=np.int64).reshape(-1, 1)

    def work(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        return self.counts(mask, bounds)[:, 0] * self.width

    def rows(self, turn: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> SparseRows:
        depth = depths(turn, bounds)
        drawn = []
        for low, high, key in zip(bounds[:-1].tolist(), bounds[1:].tolist(), keys.tolist(), strict=True):
            there = low + np.flatnonzero(depth[low:high])
            chosen = np.random.default_rng(key).choice(there, min(self.most, len(there)), replace=False)
            drawn += sorted(chosen.tolist())
        return SparseRows(torch.tensor(drawn, dtype=torch.int64), torch.ones(len(drawn), dtype=torch.int64))
