"""Attention of an unroll step on CUDA in half precision: torch's varlen flash kernel for the causal part, a Triton kernel for the k single keys.

The flash kernel runs over all rows of the pack. Queries are spread over them; rows without one ask with zeros and, in the backward, give nothing
(their log-sum-exp is infinite there, so their probabilities are zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.models.kernels import merge, rows


def serves(query: Tensor) -> bool:
    """Whether the flash kernel takes heads like these."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def forward(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor,
    *, at: Tensor, where: Tensor, entries: Tensor, count: int, bounds: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend.

    Args:
        query: [R, h, d].
        key, value: [N, g, d] of step 0.
        extra_key, extra_value: [M, E, g, d] later keys by entry and slot.
        at: [R] pack row of each query.
        where: [N] query of each pack row, or -1.
        entries: [R] entry of each query.
        count: slots that this step reads.
        bounds: [S+1] int32 conversation bounds on the device.
        longest: tokens of the longest conversation.
        scale: on scores.

    Returns:
        [R, h, d], and the log-sum-exp [R, h] in fp32.
    """
    spread = rows.spread(query, where)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(spread, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale)
    return merge.forward(out, lse.transpose(0, 1), query, extra_key, extra_value, rows=at, entries=entries, count=count, scale=scale)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor, out: Tensor, lse: Tensor,
    d_extra_key: Tensor, d_extra_value: Tensor,
    *, at: Tensor, where: Tensor, entries: Tensor, count: int, bounds: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward`: of query [R, h, d], key and value [N, g, d]; those of the later keys are added to the fp32 ``d_extra_...``."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
        rows.spread(grad, where), rows.spread(query, where), key, value, rows.spread(out, where),
        rows.spread(lse, where, float("inf")).transpose(0, 1).contiguous(),
        bounds, bounds, longest, longest, 0.0, True, state, state.new_empty(0), scale=scale,
    )  # fmt: skip
    more = merge.backward(
        grad, query, out, lse, extra_key, extra_value, d_query, d_extra_key, d_extra_value, rows=at, entries=entries, count=count, scale=scale
    )
    return more, d_key, d_value
