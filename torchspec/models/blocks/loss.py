"""Loss of the slots of blocks through a frozen head, a chunk of whole blocks at a time.

    z' = scale (W h + markov_w2 e)          h: normed state of a slot, e: Markov embedding of the token before it (DSpark)
    loss = sum over slots of weight_j (losses of (z', p) + cross_entropy of the label) / normaliser

``label`` is the token of the text, or the target's most likely one; it decides cross-entropy and D-PACE alone. A chunk's logits, the weights that follow from
them and their gradient are made while the chunk is alive; there is no gradient of the head. Slots whose label (for the soft losses: whose most likely token of
the target) is outside a pruned vocabulary add nothing and stay in the normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchspec.models.blocks.weighting import dpace
from torchspec.models.ops.head_loss import TargetDistribution
from torchspec.models.ops.loss_formulas import LossWeights, RowTargets, row_losses
from torchspec.models.ops.shared_weight import wide
from torchspec.models.target_head import TargetHead

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a chunk, at most."""
_CHUNK_ROWS = {"cpu": 256, "cuda": 2**14}
"""Rows of a chunk, at most; one block at least."""


@torch.no_grad()
def most_likely(head: TargetHead, last: Tensor, *, dtype: torch.dtype) -> TargetDistribution:
    """Of what the target says at states [U, D] the most likely tokens alone, for losses that read nothing else: without probabilities."""
    rows, kind = last.shape[0], wide(dtype)
    best = torch.empty(rows, dtype=torch.int64, device=last.device)
    inside = torch.ones(rows, dtype=torch.bool, device=last.device)
    normed = head.normed(last)
    step = max(32, _CHUNK_ELEMENTS.get(last.device.type, 2**26) // head.weight.shape[0])
    for low in range(0, rows, step):
        kept, rest = head.parts(normed[low : low + step])
        highest, best[low : low + step] = kept.max(dim=-1)
        if rest is not None:
            inside[low : low + step] = highest >= rest.amax(dim=-1)
    nothing = torch.empty(0, dtype=kind, device=last.device)
    return TargetDistribution(nothing, nothing, best, inside, None)


@dataclass(frozen=True)
class BlockPlan:
    """What the loss of a batch needs besides tensors that have gradients. M slots, block by block."""

    head: Tensor
    """[W, H] the frozen head in the compute type."""
    logit_scale: float
    target: TargetDistribution
    """At the distinct target rows; without probabilities where cross-entropy is the only loss and nothing is measured."""
    index: Tensor
    """[M] target row of each slot."""
    number: Tensor
    """[M] which draft token of its block a slot predicts, from 0."""
    label: Tensor | None
    """[M] draft row of the token that stands there, -1 outside the draft vocabulary; None takes the target's most likely token."""
    depth: Tensor
    """[A] on the host: slots of each block."""
    fixed: Tensor | None
    """[K] weight of each slot; None for D-PACE."""
    alpha: float
    """Of D-PACE."""
    normaliser: Tensor
    """Scalar: what the step's sum is divided by."""
    losses: LossWeights
    mixing: Tensor
    """[K] lambda of ``lk_lambda``."""
    measure: bool
    """Also alpha."""
    candidates: int
    """Likeliest draft rows of each slot to be returned; 0 for none."""
    train: bool


@dataclass(frozen=True)
class BlockResult:
    """Per slot [M] unless said otherwise."""

    loss: Tensor
    """Scalar."""
    per_slot: Tensor
    """Before weights."""
    weight: Tensor
    hit: Tensor
    """bool: the most likely draft token is the target's most likely token."""
    chosen: Tensor
    """int64: the most likely draft row."""
    alpha: Tensor | None
    candidates: Tensor
    """[M, candidates] draft rows, the likeliest first."""


def soft_part(losses: LossWeights) -> LossWeights:
    """The losses that read the target's distribution."""
    return replace(losses, cross_entropy=0.0)


def block_loss(states: Tensor, plan: BlockPlan, *, previous: Tensor | None = None, markov: Tensor | None = None) -> BlockResult:
    """Loss of all slots of a batch.

    Args:
        states: [M, H] after the final norm.
        plan: everything else.
        previous: [M, r] Markov embeddings.
        markov: [W, r], where there are such.
    """
    loss, *rest = _BlockLoss.apply(plan, states, previous, markov)
    per_slot, weight, hit, chosen, alpha, candidates = rest
    return BlockResult(loss, per_slot, weight, hit, chosen, alpha if plan.measure or plan.losses.needs_alpha else None, candidates)


def _chunks(plan: BlockPlan) -> list[tuple[int, int, int, int]]:
    """(first block, end, first slot, end) of chunks of whole blocks."""
    kind = plan.head.device.type
    size = max(32, min(_CHUNK_ELEMENTS.get(kind, 2**26) // plan.head.shape[0], _CHUNK_ROWS.get(kind, 2**14)))
    found, low, first, end = [], 0, 0, 0
    for block, depth in enumerate(plan.depth.tolist()):
        if end > first and end + depth - first > size:
            found.append((low, block, first, end))
            low, first = block, end
        end += depth
    if end > first:
        found.append((low, plan.depth.shape[0], first, end))
    return found


class _BlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: BlockPlan, states: Tensor, previous: Tensor | None, markov: Tensor | None) -> tuple[Tensor, ...]:
        dtype, device, total = states.dtype, states.device, states.shape[0]
        kind = wide(dtype)
        train = plan.train and any(ctx.needs_input_grad)
        soft = soft_part(plan.losses)
        has_soft = soft != LossWeights()
        wants_alpha = plan.measure or plan.losses.needs_alpha
        per_slot, weight = torch.empty(total, dtype=kind, device=device), torch.empty(total, dtype=kind, device=device)
        hit = torch.empty(total, dtype=torch.bool, device=device)
        chosen = torch.empty(total, dtype=torch.int64, device=device)
        alpha = torch.empty(total if wants_alpha else 0, dtype=kind, device=device)
        candidates = torch.empty(total, plan.candidates, dtype=torch.int64, device=device)
        right_cast = None if markov is None else markov.to(dtype)
        d_states = torch.empty_like(states) if train else None
        d_previous = torch.empty_like(previous) if train and previous is not None else None
        d_markov = torch.zeros_like(markov, dtype=kind) if train and markov is not None else None
        for low, high, first, end in _chunks(plan):
            part = slice(first, end)
            z = torch.matmul(states[part], plan.head.t())
            if previous is not None and right_cast is not None:
                z = torch.addmm(z, previous[part], right_cast.t())
            z = z.to(kind) * plan.logit_scale if plan.logit_scale != 1.0 else z.to(kind)
            target = plan.target
            at = plan.index[part]
            best, inside = target.best[at], target.inside[at]
            chosen[part] = z.argmax(dim=-1)
            hit[part] = (chosen[part] == best) & inside
            if plan.candidates:
                candidates[part] = z.topk(plan.candidates, dim=-1).indices
            label, there = (best, inside) if plan.label is None else (plan.label[part].clamp(min=0), plan.label[part] >= 0)
            lse = torch.logsumexp(z, dim=-1)
            log_right = z.gather(1, label[:, None])[:, 0] - lse
            weight[part] = _weights(plan, low, high, part, log_right, there)
            scale = weight[part] / plan.normaliser
            value = torch.where(there, -log_right * plan.losses.cross_entropy, 0.0)
            d_z: Tensor | None = None
            if train and plan.losses.cross_entropy:
                by = torch.where(there, scale * plan.losses.cross_entropy, 0.0)
                d_z = (z - lse[:, None]).exp_() if has_soft or wants_alpha else z.sub_(lse[:, None]).exp_()
                d_z.mul_(by[:, None]).scatter_add_(1, label[:, None], -by[:, None])
            if has_soft or wants_alpha:
                mass = None if target.mass is None else target.mass[at]
                rows = RowTargets(target.p[at], target.whole[at], best, inside, mass, scale, plan.mixing[plan.number[part]])
                found = row_losses(z, rows, soft, gradient=train and has_soft, measure=wants_alpha)
                value = value + found.loss
                if found.alpha is not None:
                    alpha[part] = found.alpha
                if found.gradient is not None:
                    d_z = found.gradient if d_z is None else d_z.add_(found.gradient)
            per_slot[part] = value
            if d_states is not None and d_z is not None:
                d_z = (d_z * plan.logit_scale if plan.logit_scale != 1.0 else d_z).to(dtype)
                d_states[part] = torch.matmul(d_z, plan.head)
                if d_previous is not None and d_markov is not None and right_cast is not None and previous is not None:
                    d_previous[part] = torch.matmul(d_z, right_cast)
                    d_markov += torch.matmul(d_z.t(), previous[part])
        ctx.mark_non_differentiable(per_slot, weight, hit, chosen, alpha, candidates)
        ctx.save_for_backward(d_states, d_previous, None if d_markov is None or markov is None else d_markov.to(markov.dtype))
        return torch.dot(per_slot, weight) / plan.normaliser.to(kind), per_slot, weight, hit, chosen, alpha, candidates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[None if gradient is None else gradient * grads[0].to(gradient.dtype) for gradient in ctx.saved_tensors]


def _weights(plan: BlockPlan, low: int, high: int, part: slice, log_right: Tensor, there: Tensor) -> Tensor:
    """Weight of each slot of a chunk."""
    number = plan.number[part]
    if plan.fixed is not None:
        return plan.fixed.to(log_right.dtype)[number]
    block = torch.repeat_interleave(torch.arange(high - low), plan.depth[low:high]).to(number.device)
    width = plan.mixing.shape[0]
    supervised = torch.zeros(high - low, width, dtype=torch.bool, device=number.device)
    supervised[block, number] = True
    right = torch.zeros(high - low, width, dtype=log_right.dtype, device=number.device)
    right[block, number] = torch.where(there, log_right.exp(), 0.0)
    return dpace(right, supervised, plan.alpha)[block, number]
