"""Which positions a block draft (DFlash, DSpark, DFlash 2) learns at, as a value that the data's side can use without knowing the draft.

An *anchor* a is a position of an answer whose next token belongs to the same answer; the draft reads the target's states before it and proposes what
follows x_a. It is the row t = a - 1 of an unroll: the same candidates, the same target rows, the same depth. With S = 4 slots, DFlash:

    position     0    1    2    3    4    5    6    7
    token        x0   x1   x2   x3   x4   x5   x6   x7
    loss mask    0    0    1    1    1    1    1    0
    anchor 3     c    c    c    x3   M    M    M          c: target states, M: mask token; slots 1..3 predict x4, x5, x6
                                     |    |    |          from target rows 3, 4, 5

Which anchors are trained is drawn for each conversation and epoch, by a key of its own: the same whatever the packs, the ranks or a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchspec.supervision import Rows, chains, depths


@dataclass(frozen=True)
class BlockRows:
    """The blocks of a pack: A anchors, S slots each, M supervised slots.

    ``spans`` and ``depth`` stay on the host, for loops that must not wait for a device.
    """

    base: Tensor
    """[A] int64: a - 1 of each anchor, increasing; the last position whose states its block reads."""
    depth: Tensor
    """[A] int64 on the host: supervised draft tokens of each block, 1 or more."""
    spans: Tensor
    """[A, 2] int64 on the host: first position of the anchor's conversation, and a. The block reads the states between."""
    target: Tensor
    """[M] int64: position whose target state predicts what the slot predicts; blocks in order, slots inside."""
    slot: Tensor
    """[M] int64: the slot's row among the A * S rows of all blocks."""
    unique: Tensor
    """[U] int64: distinct positions of ``target``, increasing."""
    index: Tensor
    """[M] int64: ``unique[index] == target``."""
    slots: int
    """S."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> BlockRows:
        """The same rows with ``fn`` applied to each tensor that does not stay on the host."""
        return BlockRows(
            fn(self.base), self.depth, self.spans, fn(self.target), fn(self.slot), fn(self.unique), fn(self.index), self.slots
        )  # fmt: skip

    def part(self, low: int, high: int) -> BlockRows:
        """Blocks ``low`` to ``high`` - 1 alone. Waits for the device that holds them."""
        first, end = int(self.depth[:low].sum()), int(self.depth[:high].sum())
        target = self.target[first:end]
        unique, index = torch.unique(target, return_inverse=True)
        return BlockRows(
            self.base[low:high], self.depth[low:high], self.spans[low:high], target, self.slot[first:end] - low * self.slots, unique, index, self.slots
        )  # fmt: skip


def as_blocks(rows: Rows) -> BlockRows:
    """The rows of a batch that are blocks, with their own type."""
    assert isinstance(rows, BlockRows), f"blocks were given {type(rows).__name__}"
    return rows


@dataclass(frozen=True)
class Blocks:
    """Supervision of a block draft.

    Args:
        slots: S, rows of a block.
        shift: slots that predict nothing: 1 (DFlash: the anchor's own slot), or 0 (DSpark).
        anchors: of a conversation and epoch at most, or a share of its candidates (a float up to 1); None for every one.

    Example:
        >>> Blocks(4, 1, None).counts(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 6]))
        array([[3]])
    """

    slots: int
    shift: int
    anchors: int | float | None

    @property
    def horizon(self) -> int:
        """K, draft tokens of a block."""
        return self.slots - self.shift

    def drawn(self, candidates: int) -> int:
        """How many of a conversation's candidates are anchors of an epoch."""
        if self.anchors is None or not candidates:
            return candidates
        if isinstance(self.anchors, float):
            return min(candidates, math.ceil(self.anchors * candidates))
        return min(candidates, self.anchors)

    def counts(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C, 1] int64 blocks of each conversation: a closed form, whichever are drawn."""
        _, length, owner = chains(mask, bounds)
        candidates = np.bincount(owner, weights=length, minlength=bounds.shape[0] - 1).astype(np.int64)
        return np.array([[self.drawn(number)] for number in candidates.tolist()], dtype=np.int64).reshape(-1, 1)

    def work(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C] int64 rows that the draft computes for each conversation."""
        return self.counts(mask, bounds)[:, 0] * self.slots

    def rows(self, turn: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> BlockRows:
        """Blocks of a pack: see :class:`~torchspec.supervision.Supervision`."""
        depth = depths(turn, bounds)
        chosen = []
        for first, end, key in zip(bounds[:-1].tolist(), bounds[1:].tolist(), keys, strict=True):
            candidates = first + np.flatnonzero(depth[first:end] > 0)
            number = self.drawn(len(candidates))
            if number < len(candidates):
                generator = np.random.Generator(np.random.PCG64(int(key)))
                candidates = np.sort(generator.choice(candidates, number, replace=False))
            chosen.append(candidates)
        base = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        supervised = np.minimum(depth[base], self.horizon)
        block = np.repeat(np.arange(len(base)), supervised)
        drafted = np.arange(len(block)) - np.repeat(np.cumsum(supervised) - supervised, supervised)  # 0, 1, .. in each block
        target = base[block] + 1 + drafted
        unique, index = np.unique(target, return_inverse=True)
        start = bounds[np.searchsorted(bounds, base, side="right") - 1]

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

        return BlockRows(
            base=tensor(base),
            depth=tensor(supervised),
            spans=tensor(np.stack([start, base + 1], axis=1)),
            target=tensor(target),
            slot=tensor(block * self.slots + self.shift + drafted),
            unique=tensor(unique),
            index=tensor(index),
            slots=self.slots,
        )
