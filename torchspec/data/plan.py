"""The plan: which conversations make up which micro-batch of which optimizer step. A pure function, the same on every rank and for every world size.

*Packs.* Conversations of the epoch's permutation are put together by best fit in windows (``packing.py``): padding
stays under 2 %, and which conversations share a pack is random within a window. The packs are then shuffled over the
whole epoch. Where a draft family computes more than tokens say (block drafts), its rows are a second bound of a pack.

*Length.* Every epoch has the same number of packs, that of epoch 0 rounded up to whole steps (schedules and cursors count on it). An epoch whose permutation
needs more takes the next permutation of its seed, after a few of them the packs of epoch 0 in its own order.

*Steps.* Packs ``s * packs_per_step .. + packs_per_step - 1`` train optimizer step s. The epoch is padded with empty packs, so that the last step is whole.
Rank r of a world of w trains packs r, r + w, r + 2w, ...: micro-batch b of rank r is pack ``b * w + r``, and as packs_per_step is a multiple of w, a step is
the same set of packs whatever w is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchspec.data.packing import Bound, form_packs
from torchspec.errors import UserError

VERSION = 1
"""Goes up when the order changes, so that a resume under other code is refused."""
_ATTEMPTS = 4
_PACKS_AT_ONCE = 4096


class Plan:
    """One epoch.

    Example:
        >>> plan = Plan([5, 3, 4, 6], seed=0, epoch=0, max_tokens=9, packs_per_step=2)
        >>> sorted(i for pack in range(len(plan)) for i in plan.pack(pack).tolist())
        [0, 1, 2, 3]

    Args:
        lengths: [n] tokens of each conversation.
        seed, epoch: choose the permutation.
        max_tokens: tokens of a pack at most.
        packs_per_step: packs of an optimizer step.
        counts: [n, Q] normalisers of each conversation (``Supervision.counts``), for :meth:`step_counts`.
        shuffle: False keeps the order of the data (validation).
        content: hash of the data, part of the fingerprint.
        work: [n] draft rows of each conversation (``Supervision.work``); None, or zeros, where tokens say what it
            costs.
        max_rows: draft rows of a pack at most; a conversation of more is a pack of its own. None bounds nothing.
        num_packs: ``len`` of another epoch of the same plan, to spare finding it again.

    Raises:
        UserError: when a conversation is longer than a pack.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        seed: int,
        epoch: int,
        max_tokens: int,
        packs_per_step: int,
        counts: np.ndarray | None = None,
        shuffle: bool = True,
        content: str = "",
        work: np.ndarray | None = None,
        max_rows: int | None = None,
        num_packs: int | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed, self.epoch, self.max_tokens, self.packs_per_step, self.shuffle, self.content = seed, epoch, max_tokens, packs_per_step, shuffle, content
        longest = int(self.lengths.max()) if self.lengths.size else 0
        if longest > max_tokens:
            raise UserError(
                "data.max_tokens", max_tokens, f"is below the longest conversation of {longest} tokens", "raise data.max_tokens or lower data.max_length"
            )
        if packs_per_step < 1:
            raise UserError("data.packs_per_step", packs_per_step, "is below 1", "use 1 or more")
        bounded = max_rows is not None and work is not None and bool(np.any(work))
        self.max_rows = max_rows if bounded else None
        """Draft rows of a pack at most; None where tokens are the only bound."""
        self._tokens = Bound(self.lengths, max_tokens)
        self._rows = Bound(np.asarray(work, dtype=np.int64), max_rows) if bounded and max_rows is not None else None
        self._order, self._starts = self._form(num_packs)
        self._counts = None if counts is None else _sum_by_pack(counts, self._order, self._starts)

    def __len__(self) -> int:
        """Packs, the empty ones included."""
        return len(self._starts) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self) // self.packs_per_step

    @property
    def padding(self) -> float:
        """Share of the room in non-empty packs that stays unused."""
        filled = int((np.diff(self._starts) > 0).sum())
        return 1.0 - float(self.lengths[self._order].sum()) / max(filled * self.max_tokens, 1)

    def pack(self, index: int) -> np.ndarray:
        """Conversations of a pack, [S] int64; none for an empty one."""
        return self._order[self._starts[index] : self._starts[index + 1]]

    def keys(self, samples: np.ndarray) -> np.ndarray:
        """[S] uint64, for what is drawn inside each of these conversations in this epoch (``Supervision.rows``)."""
        seeds = (np.random.SeedSequence([self.seed % 2**63, self.epoch, int(i)]) for i in samples)
        return np.array([seed.generate_state(1, np.uint64)[0] for seed in seeds], dtype=np.uint64)

    def tokens(self) -> np.ndarray:
        """[packs] tokens of each pack."""
        sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths[self._order])])
        return sums[self._starts[1:]] - sums[self._starts[:-1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each pack of a value per conversation, [n] or [n, K] → [packs] or [packs, K]."""
        return _sum_by_pack(values, self._order, self._starts)

    def step_counts(self, step: int) -> np.ndarray:
        """[Q] float32: normalisers of the whole optimizer step, all ranks and micro-batches."""
        assert self._counts is not None, "the plan was made without counts"
        low = step * self.packs_per_step
        total: np.ndarray = self._counts[low : low + self.packs_per_step].sum(axis=0)
        return total.astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order of all epochs follows from."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).tobytes())
        digest.update(repr((VERSION, self.seed, self.max_tokens, self.packs_per_step, self.shuffle, self.content)).encode())
        if self._rows is not None:
            digest.update(np.ascontiguousarray(self._rows.sizes).tobytes() + repr(("rows", self._rows.limit)).encode())
        return digest.hexdigest()[:32]

    def _form(self, num_packs: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(conversations in the order of their packs, where each pack begins)."""
        order, sizes = self._packs(self.epoch, 0)
        if self.epoch and self.shuffle:
            if num_packs is None:
                num_packs = _whole(self._packs(0, 0)[1].shape[0], self.packs_per_step)
            attempt = 1
            while sizes.shape[0] > num_packs:
                order, sizes = self._packs(self.epoch, attempt) if attempt < _ATTEMPTS else self._packs(0, 0)
                attempt += 1
        if self.shuffle:
            order, sizes = _rearranged(order, sizes, self._generator(self.epoch, _ATTEMPTS).permutation(sizes.shape[0]))
        total = _whole(sizes.shape[0], self.packs_per_step) if num_packs is None else num_packs
        starts = np.full(total + 1, order.shape[0], dtype=np.int64)
        starts[: sizes.shape[0]] = np.cumsum(sizes) - sizes
        return order, starts

    def _packs(self, epoch: int, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.lengths.shape[0]
        order = self._generator(epoch, attempt).permutation(n) if self.shuffle else np.arange(n)
        return form_packs(order, self._tokens, self._rows)

    def _generator(self, epoch: int, attempt: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed % 2**63, epoch, attempt]))


def _whole(packs: int, packs_per_step: int) -> int:
    return packs + -packs % packs_per_step


def _rearranged(order: np.ndarray, sizes: np.ndarray, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same packs, pack ``packs[j]`` in place j."""
    begins = np.cumsum(sizes) - sizes
    chosen = sizes[packs]
    source = np.repeat(begins[packs] - (np.cumsum(chosen) - chosen), chosen)
    source += np.arange(order.shape[0])
    return order[source], chosen


def _sum_by_pack(values: Any, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums over packs, some packs at a time: ``values`` in plan order would be as large as all of them."""
    values = np.asarray(values)
    summed = np.zeros((len(starts) - 1, *values.shape[1:]), dtype=np.int64)
    for low in range(0, len(starts) - 1, _PACKS_AT_ONCE):
        bounds = starts[low : low + _PACKS_AT_ONCE + 1]
        part = values[order[bounds[0] : bounds[-1]]]
        running = np.concatenate([np.zeros((1, *values.shape[1:]), dtype=np.int64), np.cumsum(part, axis=0, dtype=np.int64)])
        summed[low : low + len(bounds) - 1] = running[bounds[1:] - bounds[0]] - running[bounds[:-1] - bounds[0]]
    return summed
