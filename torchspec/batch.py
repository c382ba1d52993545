"""What a trainer is given: one pack of conversations.

Letters: N tokens of a pack, S conversations in it, n aux layers, D target hidden, Q normalisers (``supervision.py``:
which positions are supervised).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from torchspec.supervision import Rows


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Tensors live on one device except ``cu_seqlens``, which stays on the host (loops and kernels' launch shapes read it
    there).
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
    """[Q] float32: normalisers of the whole optimizer step (all ranks and micro-batches), from the plan. an unroll:
    supervised positions at each of K steps.
    """
    rows: Rows
    """Where the draft learns, as its family's ``Supervision`` says."""
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
