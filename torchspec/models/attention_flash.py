"""Attention of an unroll step on CUDA in half precision: a library's flash kernel for the causal part, a Triton kernel for the k single keys.

The flash kernel runs over all rows of the pack. Queries are spread over them; rows without one ask with zeros and, in the backward, give nothing
(their log-sum-exp is infinite there, so their probabilities are zero). Which kernel: cuDNN's for a pack of one long conversation (on an H100 twice as fast,
but it wants a plan for each shape, so lengths are padded to a multiple of 512), torch's varlen flash for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.models.kernels import merge, rows

_LONG, _ROUND = 2048, 512


def serves(query: Tensor) -> bool:
    """Whether the flash kernel takes heads like these."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _alone(key: Tensor, bounds: Tensor) -> bool:
    """Whether cuDNN does the causal part."""
    return (
        bounds.shape[0] == 2
        and key.shape[0] >= _LONG
        and key.shape[-1] <= 128
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(key.device) >= (9, 0)
    )


@dataclass(frozen=True)
class _Padded:
    """Rows made up to a multiple, as cuDNN's [1, heads, rows, d]."""

    total: int

    def of(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Spread x over the rows by ``where``; without it x has one row each."""
        if where is None:
            spread = x.new_zeros(self.rows, *x.shape[1:])
            spread[: self.total] = x
        else:
            spread = rows.spread(x, self._where(where))
        return spread.transpose(0, 1)[None]

    def lse(self, lse: Tensor, where: Tensor) -> Tensor:
        """[R, h] as cuDNN keeps it, [1, h, rows, 1]."""
        return rows.spread(lse, self._where(where), float("inf")).t().contiguous()[None, :, :, None]

    @property
    def rows(self) -> int:
        return -(-self.total // _ROUND) * _ROUND

    def _where(self, where: Tensor) -> Tensor:
        return torch.nn.functional.pad(where, (0, self.rows - self.total), value=-1)


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
    if _alone(key, bounds):
        pad = _Padded(key.shape[0])
        four, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            pad.of(query, where), pad.of(key), pad.of(value), None, True, 0.0, True, False, scale=scale
        )
        out, lse = four[0].transpose(0, 1).contiguous(), stats[0, :, :, 0]
    else:
        spread = rows.spread(query, where)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(spread, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale)
    return merge.forward(out, lse.transpose(0, 1), query, extra_key, extra_value, rows=at, entries=entries, count=count, scale=scale)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor, out: Tensor, lse: Tensor,
    d_extra_key: Tensor, d_extra_value: Tensor,
    *, at: Tensor, where: Tensor, entries: Tensor, count: int, bounds: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward`: of query [R, h, d], key and value [N, g, d]; those of the later keys are added to the fp32 ``d_extra_...``."""
    if _alone(key, bounds):
        pad = _Padded(key.shape[0])
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            pad.of(grad, where), pad.of(query, where), pad.of(key), pad.of(value), pad.of(out, where), pad.lse(lse, where), seed, seed, None, None, None,
            pad.rows, pad.rows, 0.0, True, scale=scale,
        )  # fmt: skip
        d_query, d_key, d_value = (part[0].transpose(0, 1).contiguous()[: key.shape[0]] for part in found)
    else:
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
