"""Losses of a draft against the target at one position, by name, and their gradients with respect to the draft's logits.

q = softmax(z) is the draft's distribution over the W draft rows, p the target's renormalised over the same rows and rounded to the type it is kept in, s its
sum (1 but for that rounding), t = p * mass / s the target's own probabilities of them (mass = 1 for a whole vocabulary), best the target's most likely row,
and alpha = sum_v min(t, q) the probability that sampling accepts. Each gradient is that of the value for the very p that is kept.

    name            value                                        gradient by z_v
    forward_kl      - sum p log q  (KL + entropy of p)           s q - p
    cross_entropy   -log q(best)                                 q - [v = best]
    reverse_kl      R = sum q log(q / p)                         q (log(q / p) - R)
    jsd             (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2   q (log(q / m) - sum q log(q / m)) / 2
    tv              1 - alpha (= sum |t - q| / 2 when unpruned)  q (B - [q < t]), B = sum of q where q < t
    lk_alpha        -log alpha                                   that of tv, over alpha
    lk_lambda       lambda forward_kl + (1 - lambda) tv          likewise

LK losses: arXiv 2602.23881; lambda = exp(-3 * mean alpha) of the step's depth over the previous optimizer step. A configuration weighs them:
``{forward_kl: 1.0, tv: 0.5}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from torchspec.errors import UserError

_TINY = 1e-30
"""Probabilities are not taken below it inside a logarithm."""
_ETA = 3.0


@dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the sum."""

    forward_kl: float = 0.0
    cross_entropy: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    tv: float = 0.0
    lk_alpha: float = 0.0
    lk_lambda: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, float] | None) -> LossWeights:
        """From a configuration; None means forward KL.

        Raises:
            UserError: an unknown name, a weight that is no number or negative, or no positive one.
        """
        if given is None:
            return FORWARD_KL
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise UserError("model.loss", unknown, "are no losses", f"use {', '.join(names)}")
        bad = {name: value for name, value in given.items() if not (math.isfinite(value) and value >= 0)}
        if bad or not any(given.values()):
            raise UserError("model.loss", dict(given), "needs finite weights of at least 0, one of them positive", "for example {forward_kl: 1.0, tv: 0.5}")
        return cls(**{name: float(value) for name, value in given.items()})

    @property
    def needs_alpha(self) -> bool:
        """Whether alpha, and with it the mass of a pruned vocabulary, is part of the loss."""
        return bool(self.tv or self.lk_alpha or self.lk_lambda)


FORWARD_KL = LossWeights(forward_kl=1.0)


def mixing(mean_alpha: Tensor) -> Tensor:
    """lambda [K] of ``lk_lambda`` for the mean alpha [K] of each depth."""
    return torch.exp(-_ETA * mean_alpha)


@dataclass(frozen=True)
class RowTargets:
    """The target at r rows."""

    p: Tensor
    """[r, W]."""
    whole: Tensor
    """[r] its sum, 1 but for the rounding of its type."""
    best: Tensor
    """[r] int64 most likely draft row."""
    inside: Tensor
    """[r] bool: the most likely token of the whole vocabulary is a draft row; the others add nothing."""
    mass: Tensor | None
    """[r] what p is multiplied by to be the target's own probabilities: that of all draft rows, over ``whole``. Alpha and what needs it read it."""
    scale: Tensor
    """[r] factor on loss and gradient."""
    mixing: Tensor
    """[r] lambda of ``lk_lambda``."""
    label: Tensor | None = None
    """[r] int64 draft row that cross-entropy takes for right, -1 where it adds nothing; None for ``best``."""


@dataclass(frozen=True)
class RowLosses:
    """What a chunk of logits gives."""

    loss: Tensor
    """[r] before ``scale``; 0 outside."""
    hit: Tensor
    """[r] bool: the draft's most likely row is the target's most likely token."""
    chosen: Tensor
    """[r] int64: the draft's most likely row."""
    alpha: Tensor | None
    """[r], when asked for."""
    gradient: Tensor | None
    """[r, W] of scale * loss by the logits, when asked for."""


def row_losses(z: Tensor, target: RowTargets, weights: LossWeights, *, gradient: bool, measure: bool) -> RowLosses:
    """Losses of a chunk in plain torch.

    Args:
        z: [r, W] logits in fp32 or fp64; overwritten.
        target: at these rows.
        weights: of the losses.
        gradient: whether the gradient is wanted.
        measure: whether alpha is wanted even where no loss needs it.
    """
    if target.label is not None:
        return _with_label(z, target, target.label, weights, gradient=gradient, measure=measure)
    p, inside = target.p, target.inside
    wide = z.dtype
    lse = torch.logsumexp(z, dim=-1)
    chosen = z.argmax(dim=-1)
    hit = (chosen == target.best) & inside
    loss = torch.zeros_like(lse)
    z.sub_(lse[:, None])  # log q
    soft = -torch.linalg.vecdot(p.to(wide), z)
    straight = weights.forward_kl + weights.lk_lambda * target.mixing
    loss += straight * soft
    if weights.cross_entropy:
        loss -= weights.cross_entropy * z.gather(1, target.best[:, None])[:, 0]
    only_soft = not (weights.needs_alpha or weights.reverse_kl or weights.jsd)
    if only_soft and not gradient and not measure:
        return RowLosses(torch.where(inside, loss, 0.0), hit, chosen, None, None)
    q = z.exp_()
    alpha = None
    curved: Tensor | None = None  # sum of w (g_v - sum q g): what q multiplies in the gradient
    if measure or weights.needs_alpha:
        assert target.mass is not None
        true = p.to(wide) * target.mass[:, None]
        alpha = torch.minimum(true, q).sum(dim=-1)
    if alpha is not None and weights.needs_alpha:
        safe = alpha.clamp(min=_TINY)
        loss += (weights.tv + weights.lk_lambda * (1 - target.mixing)) * (1 - alpha) - weights.lk_alpha * safe.log()
        if gradient:
            below = (q < true).to(wide)
            factor = weights.tv + weights.lk_lambda * (1 - target.mixing) + weights.lk_alpha / safe
            curved = factor[:, None] * ((q * below).sum(-1, keepdim=True) - below)
    if weights.reverse_kl:
        ratio = q.clamp(min=_TINY).log() - p.to(wide).clamp(min=_TINY).log()
        curved, mean = _curve(curved, ratio, q, weights.reverse_kl)
        loss += weights.reverse_kl * mean
    if weights.jsd:
        middle = ((p.to(wide) + q) / 2).clamp(min=_TINY).log()
        curved, mean = _curve(curved, q.clamp(min=_TINY).log() - middle, q, weights.jsd / 2)
        other = torch.linalg.vecdot(p.to(wide), p.to(wide).clamp(min=_TINY).log() - middle)
        loss += weights.jsd / 2 * (mean + other)
    loss = torch.where(inside, loss, 0.0)
    if not gradient:
        return RowLosses(loss, hit, chosen, alpha, None)
    scale = torch.where(inside, target.scale, 0.0)
    if only_soft and not weights.cross_entropy:
        by = scale * straight
        return RowLosses(loss, hit, chosen, alpha, q.mul_((by * target.whole)[:, None]).addcmul_(p, -by[:, None]))
    d_z = (q * target.whole[:, None] - p) * straight[:, None]
    if weights.cross_entropy:
        d_z += weights.cross_entropy * q
        d_z.scatter_add_(1, target.best[:, None], torch.full_like(lse, -weights.cross_entropy)[:, None])
    if curved is not None:
        d_z += curved.mul_(q)
    return RowLosses(loss, hit, chosen, alpha, d_z.mul_(scale[:, None]))


def _with_label(z: Tensor, target: RowTargets, label: Tensor, weights: LossWeights, *, gradient: bool, measure: bool) -> RowLosses:
    """Cross-entropy of the labels, which count wherever they are draft rows, and the other losses, which count where ``best`` is one."""
    there, right = label >= 0, label.clamp(min=0)[:, None]
    log_right = z.gather(1, right)[:, 0] - torch.logsumexp(z, dim=-1)
    value = torch.where(there, -weights.cross_entropy * log_right, 0.0)
    d_label = None
    if gradient and weights.cross_entropy:
        by = torch.where(there, weights.cross_entropy * target.scale, 0.0)[:, None]
        d_label = torch.softmax(z, dim=-1).mul_(by).scatter_add_(1, right, -by)
    found = row_losses(z, replace(target, label=None), replace(weights, cross_entropy=0.0), gradient=gradient, measure=measure)
    d_z = found.gradient if d_label is None or found.gradient is None else d_label.add_(found.gradient)
    return replace(found, loss=value + found.loss, gradient=d_z)


def _curve(so_far: Tensor | None, g: Tensor, q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Add weight * (g - sum q g) for a loss with derivative g by q; returns it with sum q g [r]."""
    mean = torch.linalg.vecdot(q, g)
    part = weight * (g - mean[:, None])
    return (part if so_far is None else so_far.add_(part)), mean
