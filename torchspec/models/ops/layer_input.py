"""How hidden states enter a layer: those rows that it goes on with, their norm, and their residual.

    state [P, H] --- to the loss
         |---------- norm of the rows taken [R, H] (and of all rows [P, H], whose keys step 0 needs)
         '---------- residual of the rows taken [R, H]

By kernel this is one pass forward and one backward, which sums what comes back on all paths. In torch it is the operations themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.norm import Norm
from torchspec.models.ops.shared_rows import Residual, take


@dataclass(frozen=True)
class LayerInputs:
    """What a layer goes on with."""

    state: Tensor
    """[P, H] what was given, for whoever else reads it: through it, that gradient is summed here."""
    normed: Tensor
    """[R, H]."""
    residual: Residual
    """[R, H]."""
    every: Tensor | None
    """[P, H] all rows normed, where asked for."""


class _Sum:
    """The gradient of a norm's weight, over all its uses in a forward pass."""

    def __init__(self) -> None:
        self._partial: Tensor | None = None

    def partial(self, width: int, device: torch.device) -> Tensor:
        """[programs, H] fp32 to add to."""
        from torchspec.models.ops.kernels import layer_input as kernel

        if self._partial is None:
            self._partial = kernel.sums(width, device)
        return self._partial

    def collect(self, like: Tensor) -> Tensor:
        """The sum, once."""
        found, self._partial = self._partial, None
        return torch.zeros_like(like) if found is None else found.sum(0)


class _Hold(torch.autograd.Function):
    """A norm's weight to the token of its sum."""

    @staticmethod
    def forward(ctx: Any, total: _Sum, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        ctx.save_for_backward(weight)
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return None, ctx.total.collect(weight)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, weight: Tensor, total: _Sum, to: Tensor, number: int, eps: float, normed_residual: bool, every: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from torchspec.models.ops.kernels import layer_input as kernel

        ctx.set_materialize_grads(False)
        normed, residual, whole, inverse = kernel.forward(x, weight, eps, to, number, normed_residual=normed_residual, every=every)
        ctx.save_for_backward(x, weight, to, inverse)
        ctx.total, ctx.number, ctx.normed_residual, ctx.every = total, number, normed_residual, every
        return x, normed, residual, whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from torchspec.models.ops.kernels import layer_input as kernel

        x, weight, to, inverse = ctx.saved_tensors
        d_state, d_every = grads[0], grads[3] if ctx.every else None
        d_normed, d_residual = (x.new_zeros(ctx.number, x.shape[1]) if grad is None else grad.contiguous() for grad in grads[1:3])
        if ctx.every:
            d_every = torch.zeros_like(x) if d_every is None else d_every.contiguous()
        if d_state is not None and d_state.stride(1) != 1:
            d_state = d_state.contiguous()
        partial = ctx.total.partial(x.shape[1], x.device)
        d_x = kernel.backward(d_normed, d_residual, d_every, d_state, x, weight, to, inverse, partial, normed_residual=ctx.normed_residual)
        return d_x, None, None, None, None, None, None, None, None


class LayerInput:
    """A layer's entrance during one forward pass.

    Args:
        norm: of the hidden states.
        normed_residual: the residual is the normed row (``norm_before_residual``).
    """

    def __init__(self, norm: Norm, *, normed_residual: bool) -> None:
        self.norm, self.normed_residual = norm, normed_residual
        self._sum = _Sum()
        self._token: Tensor | None = None

    def __call__(self, x: Tensor, place: Tensor, to: Tensor, *, every: bool = False) -> LayerInputs:
        """Enter.

        Args:
            x: [P, H].
            place: [R] rows to take, distinct.
            to: [P] the other way round: which of the R each row becomes, or -1.
            every: also all rows, normed.
        """
        if not kernels.usable(x):
            if every:
                whole = self.norm(x)
                normed = take(whole, place)
                return LayerInputs(x, normed, Residual(normed if self.normed_residual else take(x, place)), whole)
            taken = take(x, place)
            normed = self.norm(taken)
            return LayerInputs(x, normed, Residual(normed if self.normed_residual else taken), None)
        weight = self.norm.weight
        if self._token is None:
            self._token = _Hold.apply(self._sum, weight)
        state, normed, residual, whole = _Enter.apply(
            x.contiguous(), self._token, weight.detach(), self._sum, to, place.shape[0], self.norm.eps, self.normed_residual, every
        )
        return LayerInputs(state, normed, Residual(residual, spare=True), whole if every else None)
