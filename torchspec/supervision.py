"""Which positions of a conversation a draft learns at: the one thing that the data side knows of a draft family.

Letters: N tokens of a pack, C conversations in it, K horizon (draft tokens of one proposal, at most), Q normalisers,
R_0 rows.

A family's ``Supervision`` is made on the model's side (``DraftModule.supervision``), travels into the loader as a
value, and answers three questions: by what the sums of a step are divided (``counts``, known before the step, from the
plan), how many rows of the draft a conversation costs (``work``, the second bound of packing beside tokens), and which
rows a pack has (``rows``, made on the host in the loader's thread, so that the step needs no device synchronisation).

*Turns.* A turn is a maximal run of loss-mask 1 inside one conversation. Position t has *depth* d when x_{t+1} ..
x_{t+1+d} exist and all lie in the same turn: from x_{t+1}, which is given, d draft tokens can be learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """What a batch carries of its supervision: tensors that a family's task reads. ``base`` and ``depth`` every family
    has.
    """

    @property
    def base(self) -> Tensor:
        """[R_0] int64 pack positions t whose x_{t+1} is the first given token of a proposal, increasing."""
        ...

    @property
    def depth(self) -> Tensor:
        """[R_0] int64 supervised draft tokens of each entry of ``base``; stays on the host."""
        ...

    def map(self, fn: Callable[[Tensor], Tensor]) -> Rows:
        """The same rows with ``fn`` applied to each tensor but those that stay on the host."""
        ...


class Supervision(Protocol):
    """A family's rule, as a small value that is compared, hashed and pickled. Masks are [N] 0 or 1, ``bounds`` [C+1]
    where conversations begin and end.
    """

    @property
    def horizon(self) -> int:
        """K: draft tokens of one proposal, at most; columns of ``StepOutput.sums``."""
        ...

    def counts(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C, Q] int64 normalisers of each conversation, whatever is drawn of it. Q is the same for every mask (also
        for none).
        """
        ...

    def work(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C] int64 draft rows of each conversation; zeros where tokens alone say what a conversation costs."""
        ...

    def rows(self, turn: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> Rows:
        """Rows of a pack, on the host.

        Args:
            turn: [N] from :func:`turns`.
            bounds: [C+1] conversation boundaries.
            keys: [C] uint64, what a family that draws among positions draws each conversation's with: a function of
                seed, epoch and sample alone (``Plan.keys``), so that neither the world size nor a resume changes what
                is drawn.
        """
        ...


@runtime_checkable
class Learner(Protocol):
    """What the data side asks of the module that it feeds, before it starts engines and again before it plans."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Hidden-state indices (Transformers' counting) that records hold beside the last hidden state."""
        ...

    def supervision(self, stage: Literal["train", "validate"]) -> Supervision:
        """The rule of a stage; the same value for the whole run."""
        ...


def turns(mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Turn index of each token of a pack, -1 where unsupervised.

    Args:
        mask: [N] 0 or 1; 1 on tokens that the assistant generated, end-of-turn token included.
        bounds: [C+1] conversation boundaries; a turn never crosses one.

    Returns:
        [N] int64.
    """
    on = mask.astype(bool)
    return np.where(on, np.cumsum(_begins(on, bounds)) - 1, -1).astype(np.int64)


def _begins(on: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[N] bool: the first token of each turn."""
    first = on.copy()
    first[1:] &= ~on[:-1]
    starts = bounds[:-1]
    starts = starts[starts < on.shape[0]]
    first[starts] |= on[starts]
    return first


def chains(mask: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions with a depth above 0, a chain for each turn: depths d, d-1, .., 1 at positions t, t+1, .., t+d-1.

    A turn of L tokens that a token of its conversation precedes gives d = L-1, from that token on. One that begins the
    conversation has no such token: d = L-2, from its own first token on.

    Args:
        mask: [N] 0 or 1.
        bounds: [C+1] conversation boundaries.

    Returns:
        t, d and the conversation of each chain, [J] int64 each.
    """
    on = mask.astype(bool)
    last = on.copy()
    last[:-1] &= ~on[1:]
    tails = bounds[1:] - 1
    tails = tails[tails >= 0]
    last[tails] |= on[tails]
    begin, end = np.flatnonzero(_begins(on, bounds)), np.flatnonzero(last)
    owner = np.searchsorted(bounds, begin, side="right") - 1
    alone = (begin == bounds[owner]).astype(np.int64)
    depth = end - begin - alone
    some = depth > 0
    return (begin - 1 + alone)[some], depth[some], owner[some]


def depths(turn: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many draft tokens can be learnt after x_{t+1}, at each position t of a pack.

    Args:
        turn: [N] from :func:`turns`.
        bounds: [C+1] conversation boundaries.

    Returns:
        [N] int64, 0 where nothing is supervised.

    Example:
        >>> depths(turns(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 6])), np.array([0, 6]))
        array([0, 3, 2, 1, 0, 0])
    """
    start, length, _ = chains(turn >= 0, bounds)
    along = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    depth = np.zeros(turn.shape[0], dtype=np.int64)
    depth[np.repeat(start, length) + along] = np.repeat(length, length) - along
    return depth


@dataclass(frozen=True)
class UnrollRows:
    """Positions to compute at each unroll step.

    ``base`` [R_0]: pack positions t supervised at step 0, increasing.
    ``index[k]`` [R_k]: which entries of ``base`` are supervised at step k; ``index[0]`` is 0..R_0-1.
    ``keep[k]`` [R_k]: which entries of ``index[k-1]`` survive into step k; ``keep[0]`` equals ``index[0]``.
    ``depth`` [R_0]: steps that supervise each entry of ``base``; stays on the host, for loops that must not wait for a
    device.
    ``at`` [R_0 + .. + R_{K-1}]: ``base[index[k]]`` of every step, one after the other, and ``step``, beside it, the k
    of each.
    ``where`` [K, N] int32: the row of step k that each pack position has, or -1.
    ``onto[k]`` int32: the row of step k that each row of step k-1 ([R_{k-1}]; for k = 0 each pack position, [N])
    becomes, or -1. The target distribution of entry j at step k is that of entry j+k (x_{t+2+k} given its prefix).
    """

    base: Tensor
    index: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    depth: Tensor
    at: Tensor
    step: Tensor
    where: Tensor
    onto: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        base: Tensor,
        index: Sequence[Tensor],
        keep: Sequence[Tensor],
        *,
        depth: Tensor,
        total: int,
    ) -> UnrollRows:
        """With the rest derived, for a pack of ``total`` positions; everything on the host."""
        at = [base[entries] for entries in index]
        sizes = [total, *[len(entries) for entries in index]]
        where = torch.full((len(index), total), -1, dtype=torch.int32)
        onto = []
        for k, entries in enumerate(index):
            rows = torch.arange(len(entries), dtype=torch.int32)
            where[k, at[k]] = rows
            onto.append(torch.full((sizes[k],), -1, dtype=torch.int32).index_copy_(0, keep[k] if k else base, rows))
        step = torch.repeat_interleave(torch.arange(len(index)), torch.tensor(sizes[1:]))
        return cls(base, tuple(index), tuple(keep), depth, torch.cat(at), step, where, tuple(onto))

    @property
    def steps(self) -> int:
        """K."""
        return len(self.index)

    def map(self, fn: Callable[[Tensor], Tensor]) -> UnrollRows:
        """The same rows with ``fn`` applied to each tensor but ``depth``."""
        index, keep, onto = (tuple(fn(t) for t in tensors) for tensors in (self.index, self.keep, self.onto))
        return UnrollRows(fn(self.base), index, keep, self.depth, fn(self.at), fn(self.step), fn(self.where), onto)

    def consecutive(self) -> bool:
        """Whether ``base[j] + k == base[j + k]`` for every entry j of every step k, as ``Unroll`` makes them. Waits for
        the device that holds them.
        """
        base, last = self.base, self.base.shape[0] - 1
        there = all(bool((entries + k <= last).all()) for k, entries in enumerate(self.index))
        return there and all(torch.equal(base[entries] + k, base[entries + k]) for k, entries in enumerate(self.index))


def as_unroll(rows: Rows) -> UnrollRows:
    """The rows of a batch that an unroll made, with their own type."""
    assert isinstance(rows, UnrollRows), f"an unroll was given {type(rows).__name__}"
    return rows


@dataclass(frozen=True)
class Unroll:
    """Steps that follow each other (docs/design.md, "Alignment"): position t is supervised at step k iff its
    depth is above k, at ``steps`` (K) steps at most. Nothing is drawn; Q is K. With a conversation of 6 tokens:

        t          0   1   2   3   4   5
        mask       0   0   1   1   1   1
        depth      0   3   2   1   0   0
        step 0         *   *   *              x_{t+1}, x_{t+2} in the turn
        step 1         *   *                  ... and x_{t+3}
        step 2         *                      ... and x_{t+4}
        step 3     (none)

    Two facts follow that everything downstream uses. (1) The rows of step k+1 are a subset of those of step k, so a row
    only ever needs its own chain of earlier steps. (2) Inside a turn the rows of step 0 are consecutive, so the target
    of row j (counted in step-0 rows) at step k is the target row j+k: target logits are needed for the step-0 rows
    alone.
    """

    steps: int

    @property
    def horizon(self) -> int:
        """K."""
        return self.steps

    def counts(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C, K] int64 supervised positions of each conversation at each step.

        Example:
            >>> Unroll(4).counts(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 6]))
            array([[3, 2, 1, 0]])
        """
        _, depth, owner = chains(mask, bounds)
        counts = np.zeros((bounds.shape[0] - 1, self.steps), dtype=np.int64)
        for k in range(self.steps):  # a chain of depth d has d - k positions of depth above k
            np.add.at(counts[:, k], owner, np.maximum(depth - k, 0))
        return counts

    def work(self, mask: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """[C] zeros: an unroll costs what its tokens cost."""
        return np.zeros(bounds.shape[0] - 1, dtype=np.int64)

    def rows(self, turn: np.ndarray, bounds: np.ndarray, keys: np.ndarray | None = None) -> UnrollRows:
        """Rows to compute at each step of one pack; ``keys`` are not used."""
        depth = depths(turn, bounds)
        base = np.flatnonzero(depth > 0)
        index = [np.flatnonzero(depth[base] > k) for k in range(self.steps)]
        keep = [index[0]] + [np.flatnonzero(depth[base][index[k - 1]] > k) for k in range(1, self.steps)]
        as_tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64))  # noqa: E731
        lists = [list(map(as_tensor, arrays)) for arrays in (index, keep)]
        depth = np.minimum(depth[base], self.steps)
        return UnrollRows.of(as_tensor(base), *lists, depth=as_tensor(depth), total=turn.shape[0])
