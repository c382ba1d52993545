"""What a trainer is given: one pack of conversations, and which of its positions are supervised at which unroll step.

Letters: N tokens of a pack, S conversations in it, T tokens of one conversation, n aux layers, D target hidden, K unroll steps.

The rule (docs/design.md, "Alignment"). A *turn* is a maximal run of loss-mask 1 inside one conversation. Position t is
supervised at step k iff t+2+k < T and x_{t+1} .. x_{t+2+k} all lie in the same turn. With T = 6:

    t          0   1   2   3   4   5
    mask       0   0   1   1   1   1
    step 0         *   *   *              x_{t+1}, x_{t+2} in the turn
    step 1         *   *                  ... and x_{t+3}
    step 2         *                      ... and x_{t+4}
    step 3     (none)

Two facts follow that everything downstream uses. (1) The rows of step k+1 are a subset of those of step k, so a row only
ever needs its own chain of earlier steps. (2) Inside a turn the rows of step 0 are consecutive, so the target of row j (counted
in step-0 rows) at step k is the target row j+k: target logits are needed for the step-0 rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class UnrollRows:
    """Positions to compute at each unroll step; built on the host, so that the step needs no device synchronisation.

    ``base`` [R_0]: pack positions t supervised at step 0, increasing.
    ``index[k]`` [R_k]: which entries of ``base`` are supervised at step k; ``index[0]`` is 0..R_0-1.
    ``keep[k]`` [R_k]: which entries of ``index[k-1]`` survive into step k; ``keep[0]`` equals ``index[0]``.
    ``depth`` [R_0]: steps that supervise each entry of ``base``; stays on the host, for loops that must not wait for a device.
    ``at`` [R_0 + .. + R_{K-1}]: ``base[index[k]]`` of every step, one after the other, and ``step``, beside it, the k of each.
    ``where`` [K, N] int32: the row of step k that each pack position has, or -1.
    ``onto[k]`` int32: the row of step k that each row of step k-1 ([R_{k-1}]; for k = 0 each pack position, [N]) becomes, or -1.
    The target distribution of entry j at step k is that of entry j+k (x_{t+2+k} given its prefix).
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
    def of(cls, base: Tensor, index: Sequence[Tensor], keep: Sequence[Tensor], *, depth: Tensor, total: int) -> UnrollRows:
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
        """Whether ``base[j] + k == base[j + k]`` for every entry j of every step k, as :func:`unroll_rows` has it. Waits for the device that holds them."""
        last = self.base.shape[0] - 1
        return all(bool((entries + k <= last).all()) and torch.equal(self.base[entries] + k, self.base[entries + k]) for k, entries in enumerate(self.index))


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Tensors live on one device except ``cu_seqlens``, which stays on the host (loops and kernels' launch shapes read it there).
    """

    input_ids: Tensor
    """[N] int64."""
    position: Tensor
    """[N] int64, restarts at 0 in each conversation."""
    sequence: Tensor
    """[N] int64, index of the conversation in the pack."""
    turn: Tensor
    """[N] int64, index of the turn in the pack, -1 where the loss mask is 0."""
    aux: Tensor
    """[N, n*D] target states of the aux layers in id order; the last row of a conversation may be zero (never read)."""
    last: Tensor
    """[N, D] target state before its final norm; the last row of a conversation may be zero (never read)."""
    cu_seqlens: Tensor
    """[S+1] int32 on the host: conversation s holds rows cu_seqlens[s] .. cu_seqlens[s+1]-1."""
    sample_ids: tuple[int, ...]
    """Dataset indices of the S conversations, in order."""
    counts: Tensor
    """[K] float32: supervised positions a step over the whole optimizer step (all ranks and micro-batches), from the plan."""
    rows: UnrollRows
    pack_index: int = 0
    """Index of this pack in its epoch's plan."""
    stage: str = "train"

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.input_ids.shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> PackedBatch:
        """A copy with ``fn`` applied to each tensor but ``cu_seqlens``, which stays on the host."""
        changed = {f.name: fn(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor) and f.name != "cu_seqlens"}
        return replace(self, rows=self.rows.map(fn), **changed)  # type: ignore[arg-type]  # tensors under their own names

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """A copy on ``device`` (host-side fields stay)."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory, so that ``to`` overlaps with compute."""
        return self.map(lambda t: t.pin_memory())


def turns(mask: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Turn index of each token of a pack, -1 where unsupervised.

    Args:
        mask: [N] 0 or 1; 1 on tokens that the assistant generated, end-of-turn token included.
        cu_seqlens: [S+1] conversation boundaries; a turn never crosses one.

    Returns:
        [N] int64.
    """
    on = mask.astype(bool)
    first = on.copy()
    first[1:] &= ~on[:-1]
    starts = cu_seqlens[:-1]
    starts = starts[starts < on.shape[0]]
    first[starts] |= on[starts]
    return np.where(on, np.cumsum(first) - 1, -1).astype(np.int64)


def supervised_depth(turn: np.ndarray) -> np.ndarray:
    """How many unroll steps supervise each position: step k does iff depth > k.

    x_{t+1} .. x_{t+2+k} in one turn means: the run of equal turn index that starts at t+1 has length >= k+2.

    Args:
        turn: [N] from :func:`turns`.

    Returns:
        [N] int64, 0 where no step supervises.
    """
    n = turn.shape[0]
    run = np.zeros(n + 1, dtype=np.int64)
    if n:
        end = np.flatnonzero(np.diff(turn, append=turn[-1] - 1) != 0)  # last index of each run of equal values
        run[:n] = end[np.searchsorted(end, np.arange(n))] - np.arange(n) + 1
        run[:n][turn < 0] = 0
    depth = run[1:] - 1
    return np.maximum(depth, 0)


def supervised_counts(mask: np.ndarray, steps: int) -> np.ndarray:
    """Supervised positions of one conversation at each step.

    Args:
        mask: [T] 0 or 1.
        steps: K.

    Returns:
        [K] int64.

    Example:
        >>> supervised_counts(np.array([0, 0, 1, 1, 1, 1]), 4)
        array([3, 2, 1, 0])
    """
    cu = np.array([0, mask.shape[0]])
    depth = supervised_depth(turns(mask, cu))
    return (depth[:, None] > np.arange(steps)[None, :]).sum(axis=0)


def unroll_rows(turn: np.ndarray, cu_seqlens: np.ndarray, steps: int) -> UnrollRows:
    """Rows to compute at each step of the unroll of one pack.

    Args:
        turn: [N] from :func:`turns`.
        cu_seqlens: [S+1] conversation boundaries.
        steps: K.
    """
    depth = supervised_depth(turn)
    ends = cu_seqlens[1:] - 1
    depth[ends[ends >= 0]] = 0  # the last token of a conversation has no successor in it
    base = np.flatnonzero(depth > 0)
    index = [np.flatnonzero(depth[base] > k) for k in range(steps)]
    keep = [index[0]] + [np.flatnonzero(depth[base][index[k - 1]] > k) for k in range(1, steps)]
    as_tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64))  # noqa: E731
    lists = [list(map(as_tensor, arrays)) for arrays in (index, keep)]
    return UnrollRows.of(as_tensor(base), *lists, depth=as_tensor(np.minimum(depth[base], steps)), total=turn.shape[0])
