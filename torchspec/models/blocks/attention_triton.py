"""Attention of block drafts by Triton kernels, on CUDA in half precision; ``attention.py`` has the mathematics, the letters and the twin in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.blocks import BlockRows
from torchspec.models.blocks import attention_tables as tables
from torchspec.models.blocks.attention import BlockMask
from torchspec.models.ops.kernels import block_attention as kernel

_MOST_SLOTS, _MOST_HEADS = 32, 32


def serves(query: Tensor, key: Tensor, *, slots: int) -> bool:
    """Whether the kernels take blocks of so many slots, with query [A * S, h, d] and key [A * S, g, d]."""
    heads, size = query.shape[-2:]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and size <= 256 and slots <= _MOST_SLOTS and heads // key.shape[-2] <= _MOST_HEADS


class Plan:
    """The tables of a pack, for all layers of a draft.

    Args:
        rows: the blocks.
        sizes: of a layer's attention.
        launches: how the kernels are cut; None for the usual cuts of the head size.
    """

    def __init__(self, rows: BlockRows, sizes: kernel.Sizes, launches: kernel.Launches | None = None) -> None:
        self.sizes, self.launches, self.base = sizes, launches or kernel.launches(sizes.size), rows.base
        spans = rows.spans.numpy()
        made = [
            tables.row_tiles(spans, slots=sizes.slots, blocks=sizes.blocks(launch), window=sizes.window)
            for launch in (self.launches.forward, self.launches.rows)
        ]
        made.append(tables.key_tiles(spans, slots=sizes.slots, keys=self.launches.context.keys, window=sizes.window))
        together = torch.cat([torch.from_numpy(table) for table in made]).to(rows.base.device, non_blocking=True)
        self.forward, self.rows, self.context = together.split([len(table) for table in made])

    @classmethod
    def of(cls, rows: BlockRows, mask: BlockMask, query: Tensor, key: Tensor) -> Plan:
        """For query [A * S, h, d] and key [A * S, g, d] of the blocks."""
        return cls(rows, kernel.Sizes(rows.slots, query.shape[-2], key.shape[-2], query.shape[-1], mask.causal, mask.window))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor) -> Tensor:
        q, k, v, ck, cv = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, context_key, context_value))
        out, lse = kernel.forward(q, k, v, ck, cv, plan.base, plan.forward, sizes=plan.sizes, launch=plan.launches.forward)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, ck, cv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ck, cv, out, lse = ctx.saved_tensors
        plan, launches = ctx.plan, ctx.plan.launches
        found = kernel.backward(
            grads[0].contiguous(), q, k, v, ck, cv, plan.base, plan.rows, plan.context, out, lse,
            sizes=plan.sizes, launch=launches.rows, context_launch=launches.context,
        )  # fmt: skip
        return None, *found


def attend(plan: Plan, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor) -> Tensor:
    """[A * S, h, d] for query [A * S, h, d], key and value [A * S, g, d] of the blocks, and [N, g, d] of the context."""
    attended: Tensor = _Attend.apply(plan, query, key, value, context_key, context_value)
    return attended
