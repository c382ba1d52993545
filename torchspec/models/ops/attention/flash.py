"""Attention of an unroll step on CUDA in half precision: a library's flash kernel for the causal part, a Triton kernel for the k single keys.

The flash kernel runs over all rows of the pack. Queries are spread over them; rows without one ask with zeros and, in the backward, give nothing
(their log-sum-exp is infinite there, so their probabilities are zero). Which kernel: cuDNN's for a pack of one long conversation (on an H100 twice as fast,
but it wants a plan for each shape, so lengths are padded to a multiple of 512), torch's varlen flash for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchspec.models.ops.kernels import merge, rows

_LONG, _ROUND = 2048, 512


def serves(query: Tensor) -> bool:
    """Whether the flash kernel takes heads like these."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def _alone(key: Tensor, total: int, conversations: int) -> bool:
    """Whether cuDNN does the causal part."""
    return (
        conversations == 1
        and total >= _LONG
        and key.shape[-1] <= 128
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(key.device) >= (9, 0)
    )


class Causal:
    """The library's kernel for one pack. Letters as in ``attention.py``; P is N, made up to a multiple where cuDNN does it.

    Args:
        like: a key, [.., d].
        total: N.
        bounds: [S+1] int32 conversation bounds on the device.
        longest: tokens of the longest conversation.
    """

    def __init__(self, like: Tensor, *, total: int, bounds: Tensor, longest: int) -> None:
        self.alone = _alone(like, total, bounds.shape[0] - 1)
        self.total, self.bounds, self.longest = total, bounds, longest
        self.rows = -(-total // _ROUND) * _ROUND if self.alone else total
        """P."""
        self._state = torch.zeros(2, dtype=torch.int64, device=like.device)
        """Of the random generator, which nothing here draws from."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[P, h, d] and log-sum-exp [P, h] fp32, at any strides, for contiguous query [P, h, d] and key, value [P, g, d]."""
        if self.alone:
            found, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*map(_four, (query, key, value)), None, True, 0.0, True, False, scale=scale)
            return found[0].transpose(0, 1), lse[0, :, :, 0].transpose(0, 1)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, self.bounds, self.bounds, self.longest, self.longest, 0.0, True, False, scale=scale
        )
        return out, lse.transpose(0, 1)

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query [P, h, d], key and value [P, g, d], at any strides, for grad and out [P, h, d] and lse [h, P], contiguous as the rest."""
        if self.alone:
            seed = self._state[0]
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *map(_four, (grad, query, key, value, out)), lse[None, :, :, None], seed, seed, None, None, None, self.rows, self.rows, 0.0, True, scale=scale
            )
            d_query, d_key, d_value = (part[0].transpose(0, 1) for part in found)
            return d_query, d_key, d_value
        state = self._state.view(torch.uint64)
        d_query, d_key, d_value = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, self.bounds, self.bounds, self.longest, self.longest, 0.0, True, state, state[:0], scale=scale
        )
        return d_query, d_key, d_value


def _four(x: Tensor) -> Tensor:
    """[P, heads, d] as cuDNN's [1, heads, P, d]."""
    return x.transpose(0, 1)[None]


def forward(
    query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor,
    *, causal: Causal, at: Tensor, entries: Tensor, count: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend.

    Args:
        query: [P, h, d], spread.
        key, value: [P, g, d] of step 0.
        extra_key, extra_value: [M, E, g, d] later keys by entry and slot.
        causal: the kernel for step 0's keys.
        at: [R] pack row of each query.
        entries: [R] entry of each query.
        count: slots that this step reads.
        scale: on scores.

    Returns:
        [R, h, d], and the log-sum-exp [R, h] in fp32.
    """
    out, lse = causal.forward(query, key, value, scale)
    return merge.forward(out, lse, query, extra_key, extra_value, rows=at, entries=entries, count=count, scale=scale)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, extra_key: Tensor, extra_value: Tensor, out: Tensor, lse: Tensor,
    d_extra_key: Tensor, d_extra_value: Tensor,
    *, causal: Causal, at: Tensor, where: Tensor, entries: Tensor, count: int, scale: float, fresh: bool, before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`forward`: of query [R, h, d], key and value [P, g, d] at any strides; those of the later keys are added to the fp32 ``d_extra_...``.

    Args:
        grad: [R, h, d].
        query: [P, h, d], spread, or [R, h, d].
        out, lse: from the forward.
        where: [N] query of each pack row, or -1.
        fresh, before: what ``d_extra_...`` hold, see ``kernels/merge.py``.
        key, value, extra_key, extra_value, causal, at, entries, count, scale: as in the forward.
    """
    kept = query.shape[0] == causal.rows
    wide_grad, wide_out, *wide_query, wide_lse = rows.spread([grad, out] if kept else [grad, out, query], where, causal.rows, lse=lse)
    query = query if kept else wide_query[0]
    d_query, d_key, d_value = causal.backward(wide_grad, query, key, value, wide_out, wide_lse, scale)
    del wide_grad, wide_out
    more = merge.backward(
        grad, query, out, lse, extra_key, extra_value, d_query, d_extra_key, d_extra_value,
        rows=at, entries=entries, count=count, scale=scale, fresh=fresh, before=before,
    )  # fmt: skip
    return more, d_key, d_value
