"""The attention kernels of block drafts against their torch twin in fp64, as ``kernel_cases.py`` does it for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.blocks import anchors as anchors_of
from tests.models.kernel_cases import DEVICE, close, make
from torchspec.blocks import BlockRows
from torchspec.models.blocks.attention import BlockAttention, BlockMask, block_attention


def blocks(anchors: list[list[int]], lengths: list[int], slots: int) -> BlockRows:
    """Of :mod:`tests.models.blocks.anchors`, where the kernels run."""
    return anchors_of.blocks(anchors, lengths, slots, DEVICE)


def drawn(lengths: list[int], numbers: list[int], slots: int, *, seed: int) -> BlockRows:
    """Likewise."""
    return anchors_of.drawn(lengths, numbers, slots, seed=seed, device=DEVICE)


def attention(
    rows: BlockRows, total: int, heads: int, groups: int, size: int, dtype: torch.dtype, *, causal: bool, window: int | None, launches: Any = None,
    strided: bool = False, chosen: bool = False,
) -> None:  # fmt: skip
    """Value and gradients.

    Args:
        rows: the blocks.
        total: N.
        heads, groups, size: h, g, d.
        dtype: of what the kernels are given.
        causal, window: the mask.
        launches: how the kernels are cut.
        strided: inputs are parts of wider rows, as the projections' results are.
        chosen: leave it to the draft's own function to call the kernels, with its own cuts.
    """
    from torchspec.models.blocks import attention_triton
    from torchspec.models.ops.kernels.block_attention import Sizes

    number, slots = rows.base.shape[0] * rows.slots, rows.slots
    spare = 3 if strided else 0
    shapes = [(number, heads), (number, groups), (number, groups), (total, groups), (total, groups)]
    given = [make(length, many + spare, size, dtype=dtype, seed=seed)[:, :many].requires_grad_() for seed, (length, many) in enumerate(shapes)]
    exact = [t.detach().double().requires_grad_() for t in given]
    grad = make(number, heads, size, dtype=dtype, seed=9)
    wide = block_attention(*(t.unflatten(0, (-1, slots)) for t in exact[:3]), *exact[3:], rows, BlockMask(causal, window)).flatten(0, 1)
    expected = torch.autograd.grad((wide * grad.double()).sum(), exact)
    if chosen:
        attend = BlockAttention(rows, BlockMask(causal, window))
        out = attend(*given)
        assert attend._plan is not None
    else:
        out = attention_triton.attend(attention_triton.Plan(rows, Sizes(slots, heads, groups, size, causal, window), launches), *given)
    found: tuple[Tensor, ...] = torch.autograd.grad((out * grad).sum(), given)
    close("out", out.detach(), wide.detach(), dtype)
    for name, ours, theirs in zip(("query", "key", "value", "context key", "context value"), found, expected, strict=True):
        close(f"d {name}", ours, theirs, dtype, factor=2.0)
