"""Rows of a table that is trained, with a gradient summed in fp32 (fp64 for fp64) and rounded to the table's type once.

A token that is frequent in a pack has hundreds of terms, and the table may be a bf16 copy (FSDP gathers such): torch's own backward sums in the table's type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.models.ops.shared_weight import wide


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.kind = table.shape[0], table.dtype
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(grads[0].to(wide(ctx.kind)), ids, ctx.rows, -1, False)
        return total.to(ctx.kind), None


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """``table[ids]``, [N, H] for a table [V, H] and ids [N]."""
    found: Tensor = _Lookup.apply(table, ids)
    return found
