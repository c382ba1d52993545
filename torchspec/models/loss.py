"""Loss and metrics of the unroll: soft cross-entropy with the target, fused with both heads, a chunk of rows at a time.

    z = lm_head(norm(h''_k[t]))        p = softmax(target logits over the draft rows)       l = logsumexp(z) - sum_v p(v) z(v)

which is the forward KL plus the target's entropy. Target distributions are computed once for the step-0 rows and serve every step (row j at step k reads
entry j+k). Draft
logits live for one chunk: the forward pass computes their gradient at once and multiplies it back into the gradients of hidden states and head, so no
[rows, W] tensor is kept.
A position whose most likely token over the whole vocabulary is outside the draft vocabulary adds nothing to the loss and is a miss in every metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.models.target_weights import TargetHead

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a chunk, at most."""
_CHUNK_ROWS = {"cpu": 256, "cuda": 2**14}
"""Rows of a chunk, at most: on a CPU enough for its matrix products and few enough for its cache (measured on SmolLM2's shapes)."""


def _chunks(rows: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    size = max(32, min(_CHUNK_ELEMENTS.get(device.type, 2**26) // width, _CHUNK_ROWS.get(device.type, 2**14)))
    return [(low, min(low + size, rows)) for low in range(0, rows, size)]


@dataclass(frozen=True)
class TargetDistribution:
    """What the target says at the step-0 rows, R of them."""

    p: Tensor
    """[R, W] over the draft rows, summing to 1, in the compute type."""
    best: Tensor
    """[R] int64 most likely draft row."""
    inside: Tensor
    """[R] bool: the most likely token of the whole vocabulary is in the draft vocabulary."""
    mass: Tensor | None
    """[R] probability of the draft vocabulary, where measured; None where it is everything or not asked for."""


@torch.no_grad()
def target_distribution(head: TargetHead, last: Tensor, draft_ids: Tensor | None, *, dtype: torch.dtype, measure: bool) -> TargetDistribution:
    """Ask the target's head.

    Args:
        head: the frozen head.
        last: [R, D] states before the final norm, those that predict what step 0 predicts.
        draft_ids: [W] target ids of the draft rows, None for all.
        dtype: type to keep p in.
        measure: also the mass of the draft vocabulary (needs the sum over the whole one).
    """
    rows = last.shape[0]
    width = head.weight.shape[0] if draft_ids is None else draft_ids.shape[0]
    p = torch.empty(rows, width, dtype=dtype, device=last.device)
    best = torch.empty(rows, dtype=torch.int64, device=last.device)
    inside = torch.ones(rows, dtype=torch.bool, device=last.device)
    mass = (
        torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=last.device) if measure and draft_ids is not None else None
    )
    normed = head.normed(last)
    for low, high in _chunks(rows, head.weight.shape[0], last.device):
        whole = head.project(normed[low:high])
        kept = whole if draft_ids is None else whole[:, draft_ids]
        highest, best[low:high] = kept.max(dim=-1)
        if draft_ids is not None:
            inside[low:high] = highest == whole.amax(dim=-1)
        wide = kept if kept.dtype == torch.float64 else kept.float()
        total = torch.logsumexp(wide, dim=-1)
        if mass is not None:
            mass[low:high] = torch.exp(total - torch.logsumexp(whole if whole.dtype == torch.float64 else whole.float(), dim=-1))
        p[low:high] = (wide - total[:, None]).exp_()
    return TargetDistribution(p, best, inside, mass)


@dataclass(frozen=True)
class HeadResult:
    """What one pass over the draft's head gives, per step and row."""

    loss: Tensor
    """Scalar: sum over steps of weight_k / count_k * loss sum."""
    loss_sum: Tensor
    """[K]."""
    hit: tuple[Tensor, ...]
    """K tensors [R_k] bool: the draft's most likely token is the target's."""
    alpha: tuple[Tensor, ...] | None
    """K tensors [R_k]: sum_v min(p(v), q(v)) with p over the whole vocabulary, the probability that sampling accepts."""


def head_loss(states: list[Tensor], weight: Tensor, target: TargetDistribution, index: tuple[Tensor, ...], *, scale: Tensor, measure: bool) -> HeadResult:
    """Loss of all steps.

    Args:
        states: K tensors [R_k, H], normed hidden states in the compute type.
        weight: [W, H], the draft's head in the compute type.
        target: at the step-0 rows.
        index: K tensors [R_k]: the step-0 row of each state; its target is ``index + k``.
        scale: [K] weight_k / count_k.
        measure: also alpha.
    """
    rows = torch.cat([entries + k for k, entries in enumerate(index)])
    step = torch.cat([torch.full_like(entries, k) for k, entries in enumerate(index)])
    loss, per_row, hit, alpha = _HeadLoss.apply(torch.cat(states), weight, target, rows, scale[step], measure)
    sizes = [entries.shape[0] for entries in index]
    sums = torch.stack([part.sum() for part in per_row.split(sizes)])
    return HeadResult(loss, sums, hit.split(sizes), alpha.split(sizes) if measure else None)


class _HeadLoss(torch.autograd.Function):
    """Head, loss and their gradients in one pass over chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, target: TargetDistribution, rows: Tensor, scale: Tensor, measure: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = states.shape[0]
        per_row = torch.empty(total, dtype=wide, device=states.device)
        hit = torch.empty(total, dtype=torch.bool, device=states.device)
        alpha = torch.empty(total if measure else 0, dtype=wide, device=states.device)
        d_states = torch.empty_like(states) if train else None
        d_weight = torch.zeros_like(weight, dtype=wide) if train else None
        for low, high in _chunks(total, weight.shape[0], states.device):
            x, at = states[low:high], rows[low:high]
            p, inside = target.p[at], target.inside[at]
            z = torch.matmul(x, weight.t()).to(wide)
            lse = torch.logsumexp(z, dim=-1)
            hit[low:high] = (z.argmax(dim=-1) == target.best[at]) & inside
            per_row[low:high] = torch.where(inside, lse - torch.linalg.vecdot(p.to(wide), z), 0.0)
            if train or measure:
                q = z.sub_(lse[:, None]).exp_()
            if measure:
                whole = p.to(wide) if target.mass is None else p.to(wide) * target.mass[at, None]
                alpha[low:high] = torch.minimum(whole, q).sum(dim=-1)
            if d_states is not None and d_weight is not None:
                d_z = q.sub_(p).mul_(torch.where(inside, scale[low:high], 0.0)[:, None]).to(states.dtype)
                torch.matmul(d_z, weight, out=d_states[low:high])
                d_weight += torch.matmul(d_z.t(), x)
        ctx.mark_non_differentiable(per_row, hit, alpha)
        if d_states is not None and d_weight is not None:
            ctx.save_for_backward(d_states, d_weight.to(weight.dtype))
        return torch.dot(per_row, scale.to(wide)), per_row, hit, alpha

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_weight = ctx.saved_tensors
        return d_states * grads[0].to(d_states.dtype), d_weight * grads[0].to(d_weight.dtype), None, None, None, None
