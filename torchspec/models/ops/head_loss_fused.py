"""The loss of ``head_loss.py`` on a GPU: norm, head, target's head, loss and every gradient, a chunk of target rows at a time.

States are ordered by the target row that they are compared with, so that a chunk of target rows needs its logits once, for all of its up to G states each, and
drops them. A chunk costs three products with the draft's head, one with the target's, one read of each logit or two, and one write: the gradient
stands where the logits stood.

    target logits [c, W], [c, V - W] -> p [c, W]        z = norm(h'') W^T [r, W] -> d_z        dW += d_z^T x (fp32)        d_x = d_z W
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchspec.models.ops.fp8 import Fp8, quantise
from torchspec.models.ops.head_loss import HeadPlan
from torchspec.models.ops.shared_weight import Weight

_TILE = 128
"""Rows of a tile of the products. Chunks are whole tiles, and of one size as nearly as that goes: a short last one would read both heads for little."""
_CHUNK_ELEMENTS = 600 * 2**20
"""Draft logits of a chunk, at most: 1.2 GiB in bf16."""
_CHUNK_ROWS = 4096
"""Rows of a chunk over all groups, at most. On an H100 the three products of a chunk of 4096 rows took 10 % less time a row than those of 8192 (W=32000)."""


def chunks(uses: Tensor, groups: int, width: int) -> list[tuple[int, int, int, int]]:
    """Cut the target rows: (first, end, states before, states up to it) of each chunk, from host-side numbers alone.

    Args:
        uses: [R] states that each is the target of, ``groups`` at most.
        groups: G.
        width: W.
    """
    total = uses.shape[0]
    before = torch.cat([torch.zeros(1, dtype=torch.int64), uses.cumsum(0)]).tolist()
    most = max(groups, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // width)) // groups
    unit = min(_TILE, most)
    number = 1 + max(0, -(-(total - most) // (most // unit * unit)))  # the last one need be no whole tiles
    ends = [i * -(-total // unit) // number * unit for i in range(1, number)]
    return [(low, high, before[low], before[high]) for low, high in zip([0, *ends], [*ends, total], strict=True)]


class FusedLoss(torch.autograd.Function):
    """Of a plan, a norm, a head and states: loss; and over the M states loss before scale, hit, alpha, the draft's most likely row."""

    @staticmethod
    def forward(ctx: Any, plan: HeadPlan, norm: Tensor, weight: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        from torchspec.models.ops.kernels import fp8 as fp8_kernel
        from torchspec.models.ops.kernels import loss as kernel
        from torchspec.models.ops.kernels import norm as norm_kernel
        from torchspec.models.ops.kernels import target as target_kernel

        dtype, device, train = states[0].dtype, states[0].device, plan.train and any(ctx.needs_input_grad)
        train_head = train and ctx.needs_input_grad[2]
        ctx.sizes = [state.shape[0] for state in states]
        total, measure = sum(ctx.sizes), plan.needs_alpha
        rows = kernel.Rows(
            source=plan.target,
            step=plan.group,
            scale=plan.scale.float(),
            mixing=plan.mixing.float(),
            loss=torch.empty(total, dtype=torch.float32, device=device),
            hit=torch.empty(total, dtype=torch.int8, device=device),
            alpha=torch.empty(total if measure else 1, dtype=torch.float32, device=device),
            chosen=torch.zeros(total, dtype=torch.int64, device=device) if plan.measure else None,
        )
        order = torch.argsort(rows.source, stable=True)
        every = torch.cat(states)
        store = Weight.of([weight.detach()], dtype, fp8=plan.fp8 if train_head else min(plan.fp8, Fp8.ROWS)).store
        d_every = every if train else None  # a row's gradient takes its place when its chunk is done
        d_weight: Tensor | None = None
        d_norm = torch.zeros_like(norm, dtype=torch.float32)
        normed = plan.head.normed(plan.last)
        cut = chunks(plan.uses, plan.scale.shape[0], weight.shape[0])
        if store.gradient is not None:
            for _, _, first, end in cut:
                store.gradient.expect(end - first)
        for low, high, first, end in cut:
            p, rest = plan.head.parts(normed[low:high], rounded=bool(plan.fp8) and plan.train)
            p = p if p.dtype == dtype == torch.bfloat16 else p.float()  # other types would lose small ones, or what the draft's logits still show
            asked = kernel.TargetStatistics(p, *target_kernel.ask(p, rest), low)
            place = order[first:end]
            x: Tensor | None
            if store.narrow is None:
                x, inverse = norm_kernel.forward(every, norm, plan.eps, place=place)
                x_top, z = None, torch.mm(x, store.data.t())
            else:
                x, inverse, x8 = norm_kernel.forward_rounded(every, norm, plan.eps, place=place, plain=train_head)
                x_top, z = x8.top, store.narrow.forward(x8, dtype)
                del x8
            factor = None if store.narrow is None or store.gradient is None else store.narrow.factor
            sizes = kernel.losses(z, place, asked, rows, vars(plan.weights), gradient=train, measure=plan.measure, factor=factor)
            del asked, p, rest
            if d_every is not None:
                if store.narrow is None:
                    d_z = None
                elif store.gradient is not None and factor is not None and sizes is not None and x_top is not None and x is not None:
                    d_z = fp8_kernel.round_both(z, factor, *sizes, store.gradient.place(z.shape[1], x, sizes[1], x_top))
                else:
                    d_z = quantise(z, store.narrow.factor)
                if train_head and store.gradient is None and x is not None:
                    d_weight = _add_product(d_weight, z, x)
                d_x = torch.mm(z, store.data) if store.narrow is None or d_z is None else store.narrow.backward(d_z, dtype)
                _, part = norm_kernel.backward(d_x, every, norm, inverse, place=place, out=d_every)
                d_norm += part
                del d_z, d_x
            del z, x
        if store.gradient is not None:
            d_weight = store.gradient.collect()
        if d_every is not None:
            ctx.found = d_norm, d_weight, d_every
            ctx.kinds = norm.dtype, weight.dtype
        hit = rows.hit.bool()
        chosen = rows.alpha if rows.chosen is None else rows.chosen
        ctx.mark_non_differentiable(rows.loss, hit, rows.alpha, chosen)
        return torch.dot(rows.loss, rows.scale[rows.step]), rows.loss, hit, rows.alpha, chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from torchspec.models.ops.kernels import rows as rows_kernel

        if ctx.found is None:
            raise RuntimeError(
                "the fused loss scales its gradients where they stand and keeps no second copy: backward over a loss runs once, also with retain_graph"
            )
        (d_norm, d_weight, d_every), ctx.found = ctx.found, None
        for gradient in (d_norm, d_weight, d_every):
            if gradient is not None:
                rows_kernel.scale(gradient, grads[0])
        return None, d_norm.to(ctx.kinds[0]), None if d_weight is None else d_weight.to(ctx.kinds[1]), *d_every.split(ctx.sizes)


def _add_product(total: Tensor | None, d_z: Tensor, x: Tensor) -> Tensor:
    """total + d_z^T x in fp32."""
    if d_z.dtype == torch.float32:
        return torch.mm(d_z.t(), x) if total is None else total.addmm_(d_z.t(), x)
    if total is None:
        return torch.mm(d_z.t(), x, out_dtype=torch.float32)
    return torch.addmm(total, d_z.t(), x, out_dtype=torch.float32, out=total)
