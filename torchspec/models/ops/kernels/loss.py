"""Every loss of ``models/ops/loss_formulas.py`` at a row of draft logits, and its gradient written over them; twin: ``losses.row_losses``.

    pass 1   lse(z), argmax z, sum p z
    pass 2   (only where a loss or metric asks) alpha = sum min(t, q), B = sum of q where q < t, R = sum q log(q/p), the two halves of JSD
    pass 3   d_z = scale [ a (s q - p) + b (q - [v = best]) + q ( c (B - [q < t]) + d (log(q/p) - R) + e (log(q/m) - sum q log(q/m)) / 2 ) ]

with p, its sum s over the row and mass from ``target.py`` (s lse - sum p z is forward_kl), q = exp(z - lse), t = p mass, m = (p + q) / 2;
a = forward_kl + lambda lk_lambda, b = cross_entropy, c = tv + (1 - lambda) lk_lambda + lk_alpha / alpha, d = reverse_kl, e = jsd. A program does one row;
passes after the first find it in the L2 cache for W up to about 60,000, since few programs run at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchspec.models.ops.kernels.rounding import LOG2E, scale_of
from torchspec.models.ops.kernels.target import VECTOR, first_of, tile

_LOW = tl.constexpr(-1e30)
_TINY = tl.constexpr(1e-30)
_LOG_TINY = tl.constexpr(-69.07755278982137)
BLOCK, WARPS = 16384, 16
"""Logits of a step through a row, and warps of a program."""


@triton.jit(do_not_specialize=["low"], do_not_specialize_on_alignment=["place"])
def _losses(
    z, target, best, inside, whole, mass, place, source, step, scale, mixing, loss, hit, alpha, chosen, factor8, scale8, top8, low, width, stride,
    w_kl, w_ce, w_rkl, w_jsd, w_tv, w_lka, w_lkl,
    GRADIENT: tl.constexpr, ALPHA: tl.constexpr, ACCEPT: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, CROSS: tl.constexpr,
    CHOSEN: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    where = tl.load(place + row)
    t = (tl.load(source + where) - low).to(tl.int64)
    k = tl.load(step + where)
    offset = tile(BLOCK, LANES)
    LOWEST: tl.constexpr = -6e4 if z.dtype.element_ty == tl.float16 else _LOW  # finite: it meets factors of 0
    own, other = z + row * width, target + t * stride
    p_sum = tl.load(whole + t)
    answer = tl.load(best + t)
    valid = tl.load(inside + t) != 0

    top, start = tl.full([LANES], _LOW, tl.float32), tl.zeros([LANES], tl.int32)
    weight, dot = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for first in range(0, width, BLOCK):
        column = first + offset
        seen = column < width
        value = tl.load(own + column, mask=seen, other=LOWEST).to(tl.float32)
        p = tl.load(other + column, mask=seen, other=0.0).to(tl.float32)
        most = tl.max(value, axis=1)
        higher = tl.maximum(top, most)
        start = tl.where(most > top, first, start)
        weight = weight * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((value - higher[:, None]) * LOG2E), axis=1)
        dot += tl.sum(p * value, axis=1)
        top = higher
    guess, highest = first_of(own, top, start, width, BLOCK, LANES)
    lse = highest + tl.log(tl.sum(weight * tl.exp2((top - highest) * LOG2E), axis=0))
    lam = tl.load(mixing + k)
    straight = w_kl + w_lkl * lam
    value_of = straight * (p_sum * lse - tl.sum(dot, axis=0))
    if CROSS:
        value_of += w_ce * (lse - tl.load(own + answer).to(tl.float32))

    accept, below, ratio_mean, jsd_mean, factor = 0.0, 0.0, 0.0, 0.0, 0.0
    if ALPHA or REVERSE or JSD:
        m = tl.load(mass + t)
        v_alpha, v_below = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        v_ratio, v_jsd, v_other = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        for first in range(0, width, BLOCK):
            column = first + offset
            seen = column < width
            log_q = tl.load(own + column, mask=seen, other=LOWEST).to(tl.float32) - lse
            p = tl.load(other + column, mask=seen, other=0.0).to(tl.float32)
            q = tl.exp2(log_q * LOG2E)
            if ALPHA:
                v_alpha += tl.sum(tl.minimum(p * m, q), axis=1)
                v_below += tl.sum(tl.where(q < p * m, q, 0.0), axis=1)
            if REVERSE or JSD:
                log_q, log_p = tl.maximum(log_q, _LOG_TINY), tl.log(tl.maximum(p, _TINY))
            if REVERSE:
                v_ratio += tl.sum(q * (log_q - log_p), axis=1)
            if JSD:
                middle = tl.log(tl.maximum((p + q) * 0.5, _TINY))
                v_jsd += tl.sum(q * (log_q - middle), axis=1)
                v_other += tl.sum(p * (log_p - middle), axis=1)
        if ALPHA:
            accept = tl.sum(v_alpha, axis=0)
            below = tl.sum(v_below, axis=0)
            tl.store(alpha + where, accept)
        if ACCEPT:
            safe = tl.maximum(accept, _TINY)
            value_of += (w_tv + w_lkl * (1 - lam)) * (1 - accept) - w_lka * tl.log(safe)
            factor = w_tv + w_lkl * (1 - lam) + w_lka / safe
        if REVERSE:
            ratio_mean = tl.sum(v_ratio, axis=0)
            value_of += w_rkl * ratio_mean
        if JSD:
            jsd_mean = tl.sum(v_jsd, axis=0)
            value_of += 0.5 * w_jsd * (jsd_mean + tl.sum(v_other, axis=0))
    tl.store(loss + where, tl.where(valid, value_of, 0.0))
    tl.store(hit + where, ((guess == answer) & valid).to(tl.int8))
    if CHOSEN:
        tl.store(chosen + where, guess.to(tl.int64))

    if GRADIENT:
        size = tl.where(valid, tl.load(scale + k), 0.0)
        by_q, by_p, shift = size * (straight * p_sum + w_ce), size * straight, lse * LOG2E
        plain, largest = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        tl.debug_barrier()
        for first in range(0, width, BLOCK):
            column = first + offset
            seen = column < width
            value = tl.load(own + column, mask=seen, other=LOWEST).to(tl.float32)
            p = tl.load(other + column, mask=seen, other=0.0).to(tl.float32)
            q = tl.exp2(value * LOG2E - shift)
            d = by_q * q - by_p * p
            if CROSS:
                d -= tl.where(column == answer, w_ce * size, 0.0)
            if ACCEPT or REVERSE or JSD:
                more = tl.zeros_like(q)
                if ACCEPT:
                    more += factor * (below - tl.where(q < p * m, 1.0, 0.0))
                if REVERSE or JSD:
                    log_q = tl.maximum(value - lse, _LOG_TINY)
                if REVERSE:
                    more += w_rkl * (log_q - tl.log(tl.maximum(p, _TINY)) - ratio_mean)
                if JSD:
                    more += 0.5 * w_jsd * (log_q - tl.log(tl.maximum((p + q) * 0.5, _TINY)) - jsd_mean)
                d += size * q * more
            result = d.to(z.dtype.element_ty)
            tl.store(own + column, result, mask=seen)
            if NARROW:
                magnitude = tl.abs(result.to(tl.float32))
                plain = tl.maximum(plain, tl.max(magnitude, axis=1))
                largest = tl.maximum(largest, tl.max(magnitude * tl.load(factor8 + column, mask=seen, other=0.0), axis=1))
        if NARROW:
            tl.store(scale8 + row, scale_of(tl.max(largest, axis=0)))
            tl.store(top8 + row, tl.max(plain, axis=0))


@dataclass(frozen=True)
class TargetStatistics:
    """The target at the rows of a chunk, as ``kernels.target.ask`` leaves and returns it."""

    p: Tensor
    best: Tensor
    inside: Tensor
    whole: Tensor
    mass: Tensor
    low: int
    """Step-0 row of the first."""


@dataclass(frozen=True)
class Rows:
    """Flat lists over the rows of all steps, M of them."""

    source: Tensor
    """[M] step-0 row whose target each has."""
    step: Tensor
    """[M] its unroll step."""
    scale: Tensor
    """[K] fp32 factor on the gradient, by step."""
    mixing: Tensor
    """[K] fp32 lambda of ``lk_lambda``, by step."""
    loss: Tensor
    """[M] fp32, filled here: before ``scale``, 0 outside."""
    hit: Tensor
    """[M] int8, filled here."""
    alpha: Tensor
    """[M] fp32, filled here where asked for; else any tensor."""
    chosen: Tensor | None = None
    """[M] int64, filled here where it is there: the draft's most likely row."""


def losses(
    z: Tensor, place: Tensor, asked: TargetStatistics, rows: Rows, weights: dict[str, float], *, gradient: bool, measure: bool, factor: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Losses of a chunk.

    Args:
        z: [R, W] logits, contiguous; overwritten by the gradient where it is asked for.
        place: [R] where each row stands in the flat lists.
        asked: the target of the chunk.
        rows: read and filled.
        weights: of the losses by name, as in ``LossWeights``.
        gradient: whether it is wanted.
        measure: alpha even where no loss needs it.
        factor: [W] fp32, above 0: by what columns of the gradient will be multiplied before rows are rounded to 8 bits.

    Returns:
        with ``factor`` and ``gradient`` the scale [R, 1] and the largest magnitude [R] of each row of the gradient, as in ``fp8.Rounded``.
    """
    number, width = z.shape
    accept = bool(weights["tv"] or weights["lk_alpha"] or weights["lk_lambda"])
    narrow = gradient and factor is not None
    sizes = torch.empty(2, -(-number // 16) * 16, dtype=torch.float32, device=z.device)[:, :number] if narrow else None
    scale8, top8 = (None, None) if sizes is None else (sizes[0, :, None], sizes[1])
    if not number:
        return None if scale8 is None or top8 is None else (scale8, top8)
    block = min(BLOCK, triton.next_power_of_2(max(width, VECTOR)))
    _losses[(number,)](
        z, asked.p, asked.best, asked.inside, asked.whole, asked.mass, place, rows.source, rows.step, rows.scale, rows.mixing, rows.loss, rows.hit,
        rows.alpha, rows.chosen, factor, scale8, top8, asked.low, width, asked.p.stride(0),
        weights["forward_kl"], weights["cross_entropy"], weights["reverse_kl"], weights["jsd"], weights["tv"], weights["lk_alpha"], weights["lk_lambda"],
        GRADIENT=gradient, ALPHA=measure or accept, ACCEPT=accept, REVERSE=bool(weights["reverse_kl"]), JSD=bool(weights["jsd"]),
        CROSS=bool(weights["cross_entropy"]), CHOSEN=rows.chosen is not None, NARROW=narrow, BLOCK=block, LANES=block // VECTOR,
        num_warps=WARPS if block >= 1024 else 4,
    )  # fmt: skip
    return None if scale8 is None or top8 is None else (scale8, top8)
