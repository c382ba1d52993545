"""Loss and metrics of states, fused with the draft's final norm and head and with the target's head, a chunk of rows at a time.

    z = lm_head(norm(h))        p = softmax(target logits over the draft rows)        losses of (z, p): models/ops/loss_formulas.py

Whose family the states are of is nothing to it: each names the target row that it is compared with, and what it weighs. Draft logits live for one chunk: the
forward pass computes their gradient at once and multiplies it back into the gradients of hidden states, norm and head, so no [rows, W] tensor is kept and
the backward pass only scales what is there.
A position whose most likely token over the whole vocabulary is outside the draft vocabulary adds nothing to the loss and is a miss in every metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.loss_formulas import LossWeights, RowTargets, row_losses
from torchspec.models.ops.norm import rms_backward, rms_forward
from torchspec.models.ops.shared_weight import wide
from torchspec.models.target_head import TargetHead

_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a chunk, at most."""
_CHUNK_ROWS = {"cpu": 256, "cuda": 2**14}
"""Rows of a chunk, at most: on a CPU enough for its matrix products and few enough for its cache (measured on SmolLM2's shapes)."""


def _chunks(rows: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    size = max(32, min(_CHUNK_ELEMENTS.get(device.type, 2**26) // width, _CHUNK_ROWS.get(device.type, 2**14)))
    return [(low, min(low + size, rows)) for low in range(0, rows, size)]


@dataclass(frozen=True)
class TargetDistribution:
    """What the target says at R states."""

    p: Tensor
    """[R, W] over the draft rows, rounded to the compute type; to fp32 where that is fp16, in which an improbable token's would be 0."""
    whole: Tensor
    """[R] its sum."""
    best: Tensor
    """[R] int64 most likely draft row."""
    inside: Tensor
    """[R] bool: the most likely token of the whole vocabulary is in the draft vocabulary."""
    mass: Tensor | None
    """[R] probability of the draft vocabulary over ``whole``, where asked for."""


@torch.no_grad()
def target_distribution(head: TargetHead, last: Tensor, *, dtype: torch.dtype, mass: bool) -> TargetDistribution:
    """What the target's head says of states.

    Args:
        head: the frozen head, rows of the draft vocabulary first.
        last: [R, D] states before the final norm.
        dtype: the compute type.
        mass: also the mass of the draft vocabulary (needs the sum over the whole one).
    """
    rows, exact = last.shape[0], wide(dtype)
    p = torch.empty(rows, head.width, dtype=exact if dtype == torch.float16 else dtype, device=last.device)
    whole = torch.empty(rows, dtype=exact, device=last.device)
    best = torch.empty(rows, dtype=torch.int64, device=last.device)
    inside = torch.ones(rows, dtype=torch.bool, device=last.device)
    masses = torch.ones(rows, dtype=exact, device=last.device) if mass else None
    normed = head.normed(last)
    for low, high in _chunks(rows, head.weight.shape[0], last.device):
        kept, rest = head.parts(normed[low:high])
        highest, best[low:high] = kept.max(dim=-1)
        logits = kept.to(wide(kept.dtype))
        total = torch.logsumexp(logits, dim=-1)
        if rest is not None:
            inside[low:high] = highest >= rest.amax(dim=-1)
            if masses is not None:
                masses[low:high] = torch.sigmoid(total - torch.logsumexp(rest.to(wide(rest.dtype)), dim=-1))
        p[low:high] = (logits - total[:, None]).exp_()
        torch.sum(p[low:high], dim=-1, dtype=exact, out=whole[low:high])
    return TargetDistribution(p, whole, best, inside, None if masses is None else masses.div_(whole))


@dataclass(frozen=True)
class HeadPlan:
    """What one pass needs besides tensors that have gradients: of M states, what each is compared with and what it weighs."""

    head: TargetHead
    last: Tensor
    """[R, D] target states before the final norm. Each goes through the target's head once, however many states it is the target of."""
    target: Tensor
    """[M] int64: the row of ``last`` whose distribution is each state's target."""
    uses: Tensor
    """[R] int64 on the host: how many states each row of ``last`` is the target of; chunks are cut by it."""
    group: Tensor
    """[M] int64: of which of the G groups (unroll steps, slots of a block) each state is."""
    scale: Tensor
    """[G] factor on loss and gradient: weight / count."""
    mixing: Tensor
    """[G] lambda of ``lk_lambda``."""
    weights: LossWeights
    eps: float
    """Of the final norm."""
    measure: bool
    """Also alpha and what is chosen."""
    train: bool
    """Gradients are wanted. (Inside a function's forward autograd says what could have one, not whether it will be asked for.)"""
    fp8: Fp8 = Fp8.NONE
    """8-bit products with the draft's head, and in training with the target's rows of all other tokens: is one likelier, and how much mass is theirs. On a
    GPU."""
    label: Tensor | None = None
    """[M] int64: the draft row that ``cross_entropy`` takes for right, -1 where that token has none; None takes the target's most likely one."""

    @property
    def needs_alpha(self) -> bool:
        """Whether a loss or a metric asks for it."""
        return self.measure or self.weights.needs_alpha


@dataclass(frozen=True)
class HeadResult:
    """What one pass over the draft's head gives."""

    loss: Tensor
    """Scalar: sum over states of scale * loss."""
    per_row: Tensor
    """[M] loss before scale."""
    hit: Tensor
    """[M] bool: the draft's most likely token is the target's."""
    alpha: Tensor | None
    """[M]: sum_v min(p(v), q(v)) with p over the whole vocabulary, the probability that sampling accepts; where it is asked for."""
    chosen: Tensor | None
    """[M] int64: the draft's most likely row, where it is measured."""


def head_loss(plan: HeadPlan, states: Sequence[Tensor], norm: Tensor, weight: Tensor) -> HeadResult:
    """Loss of states through norm and head: in Triton's kernels on a GPU (``head_loss_fused.py``), in torch elsewhere, and where labels are given.

    Args:
        plan: targets and rules.
        states: [M_i, H] each, M rows in all, before the final norm, in the compute type.
        norm: [H] weight of the final norm.
        weight: [W, H], the draft's head. Where it asks for no gradient (a frozen head) the product that would make it is left out.
    """
    if kernels.usable(states[0]) and plan.label is None:
        from torchspec.models.ops.head_loss_fused import FusedLoss

        found = FusedLoss.apply(plan, norm, weight, *states)
    else:
        found = _HeadLoss.apply(plan, norm, weight, *states)
    loss, per_row, hit, alpha, chosen = found
    return HeadResult(loss, per_row, hit, alpha if plan.needs_alpha else None, chosen if plan.measure else None)


def _pieces(sizes: list[int], low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
    """(step, first, end, place in the chunk) of the rows low..high-1 of all steps' states laid one after the other."""
    start = 0
    for k, size in enumerate(sizes):
        first, end = max(low - start, 0), min(high - start, size)
        if first < end:
            yield k, first, end, start + first - low
        start += size


class _HeadLoss(torch.autograd.Function):
    """Norm, head, loss and their gradients in one pass over chunks of rows."""

    @staticmethod
    def forward(ctx: Any, plan: HeadPlan, norm: Tensor, weight: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        dtype, device = states[0].dtype, states[0].device
        exact = wide(dtype)
        target = target_distribution(plan.head, plan.last, dtype=dtype, mass=plan.needs_alpha)
        scale, mixing = plan.scale[plan.group].to(exact), plan.mixing[plan.group].to(exact)
        train = plan.train and any(ctx.needs_input_grad)
        train_head = train and ctx.needs_input_grad[2]
        sizes = [state.shape[0] for state in states]
        total = sum(sizes)
        cast = weight.to(dtype)
        per_row = torch.empty(total, dtype=exact, device=device)
        hit = torch.empty(total, dtype=torch.bool, device=device)
        alpha = torch.empty(total if plan.needs_alpha else 0, dtype=exact, device=device)
        chosen = torch.empty(total if plan.needs_alpha else 0, dtype=torch.int64, device=device)
        d_states = [torch.empty_like(state) for state in states] if train else []
        d_weight = torch.zeros_like(cast, dtype=exact) if train_head else None
        d_norm = torch.zeros_like(norm, dtype=exact) if train else None
        for low, high in _chunks(total, cast.shape[0], device):
            pieces = [(k, first, end, place, *rms_forward(states[k][first:end], norm, plan.eps)) for k, first, end, place in _pieces(sizes, low, high)]
            x = pieces[0][4] if len(pieces) == 1 else torch.cat([piece[4] for piece in pieces])
            at = plan.target[low:high]
            rows = RowTargets(
                target.p[at],
                target.whole[at],
                target.best[at],
                target.inside[at],
                None if target.mass is None else target.mass[at],
                scale[low:high],
                mixing[low:high],
                None if plan.label is None else plan.label[low:high],
            )
            found = row_losses(torch.matmul(x, cast.t()).to(exact), rows, plan.weights, gradient=train, measure=plan.needs_alpha)
            per_row[low:high], hit[low:high] = found.loss, found.hit
            if found.alpha is not None:
                alpha[low:high], chosen[low:high] = found.alpha, found.chosen
            if found.gradient is not None and d_norm is not None:
                d_z = found.gradient.to(dtype)
                if d_weight is not None:
                    d_weight += torch.matmul(d_z.t(), x)
                d_x = torch.matmul(d_z, cast)
                for k, first, end, place, _, inverse in pieces:
                    d_states[k][first:end], part = rms_backward(d_x[place : place + end - first], states[k][first:end], norm, inverse)
                    d_norm += part
        ctx.mark_non_differentiable(per_row, hit, alpha, chosen)
        if d_norm is not None:
            ctx.save_for_backward(d_norm.to(norm.dtype), None if d_weight is None else d_weight.to(weight.dtype), *d_states)
        return torch.dot(per_row, scale), per_row, hit, alpha, chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[None if gradient is None else gradient * grads[0].to(gradient.dtype) for gradient in ctx.saved_tensors]
