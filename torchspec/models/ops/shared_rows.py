"""Rows of activations that every unroll step uses, and the product with a shared weight that adds them.

As with weights (``shared_weight.py``), gradients of all uses are summed in fp32 and handed to autograd once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import quantise
from torchspec.models.ops.shared_weight import Weight, wide

_ALL = slice(None)


class RowGradient:
    """[M, C] activations and the sum of their gradients."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._sum: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        """[M, C], of all that came so far."""
        if self._sum is None:
            self._sum = torch.zeros_like(self.data, dtype=wide(self.data.dtype))
        return self._sum

    def collect(self) -> Tensor:
        """The sum, once, in the data's type."""
        found, self._sum = self._sum, None
        return torch.zeros_like(self.data) if found is None else found.to(self.data.dtype)


class _Keep(torch.autograd.Function):
    """Rows to the token of their store."""

    @staticmethod
    def forward(ctx: Any, store: RowGradient, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.store = store
        return value.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.store.collect()


@dataclass(frozen=True)
class SharedRows:
    """Rows of activations that several steps read."""

    store: RowGradient
    token: Tensor

    @classmethod
    def of(cls, value: Tensor) -> SharedRows:
        """Share [M, C]."""
        store = RowGradient(value.detach().contiguous())
        return cls(store, _Keep.apply(store, value))


@dataclass(frozen=True)
class Addend:
    """Rows ``place + shift`` (distinct; None for all) of shared rows, to be added to a product's result."""

    rows: SharedRows
    place: Tensor | None
    shift: int = 0
    columns: slice = field(default_factory=lambda: _ALL)


_Part = tuple[RowGradient, slice, Tensor | None, int]
"""Store, columns, place and shift of an addend."""


@dataclass(frozen=True)
class Residual:
    """Rows [R, H] that a product is added to."""

    rows: Tensor
    spare: bool = False
    """Nobody else reads them: the sum may take their place."""


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, bias: Tensor | None, residual: Tensor | None, spare: bool, weight: Weight,
        stores: list[_Part], *tokens: Tensor,
    ) -> Tensor:  # fmt: skip
        # the weight's own token is not kept here: it would tie the graph into a circle
        ctx.weight, ctx.stores, ctx.bias = (weight.store, weight.rows, weight.columns), stores, None if bias is None else bias.dtype
        data, added = weight.data, None if bias is None else bias.to(x.dtype)
        narrow, top = weight.store.narrow_part(weight.rows, weight.columns), None
        ctx.gradient = weight.store.gradient if narrow is not None and weight.rows == _ALL else None
        if narrow is not None:
            rounded = quantise(x)
            y = narrow.forward(rounded, x.dtype)
            if ctx.gradient is not None:
                ctx.gradient.expect(x.shape[0])
                top = rounded.top
            if stores:
                _side_by_side(stores, x.shape[0], onto=y)
            elif residual is not None:
                y.add_(residual)
        elif stores:
            start = _side_by_side(stores, x.shape[0])
            y = torch.addmm(start, x, data.t(), out=start)
        elif residual is not None and spare:
            y = torch.addmm(residual, x, data.t(), out=residual)
            ctx.mark_dirty(residual)
        elif residual is not None:
            y = torch.addmm(residual, x, data.t())
        else:
            y, added = F.linear(x, data, added), None
        ctx.save_for_backward(x, top)
        return y if added is None else y.add_(added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, top), d_y = ctx.saved_tensors, grads[0].contiguous()
        store, rows, columns = ctx.weight
        narrow, wanted, d_x = store.narrow_part(rows, columns), ctx.needs_input_grad[0], None
        rounded = quantise(d_y, narrow.factor) if narrow is not None and (wanted or ctx.gradient is not None) else None
        if wanted:
            d_x = torch.mm(d_y, store.data[rows, columns]) if narrow is None or rounded is None else narrow.backward(rounded, d_y.dtype)
        if ctx.gradient is None or rounded is None:
            store.add(rows, columns, d_y, x)
        else:
            ctx.gradient.add(d_y, x, rounded.top, top)
        if ctx.stores:
            _add_apart(ctx.stores, d_y)
        d_bias = None if ctx.bias is None else d_y.sum(0, dtype=ctx.bias)
        return d_x, None, d_bias, d_y if ctx.needs_input_grad[3] else None, None, None, None, *[None] * len(ctx.stores)


def _side_by_side(stores: list[_Part], number: int, *, onto: Tensor | None = None) -> Tensor:
    """The stores' rows next to each other, [R, sum of their widths]; a new tensor, or added to ``onto``."""
    parts = [(store.data[:, columns], place, shift) for store, columns, place, shift in stores]
    if kernels.usable(parts[0][0]):
        from torchspec.models.ops.kernels import rows

        return rows.beside(parts, number, onto=onto)
    found = torch.cat([data[:number] if place is None else data[place + shift] for data, place, shift in parts], dim=1)
    return found if onto is None else onto.add_(found)


def _add_apart(stores: list[_Part], grad: Tensor) -> None:
    """The other way round: [R, sum of their widths] to the stores' sums."""
    parts = [(store.sum[:, columns], place, shift) for store, columns, place, shift in stores]
    if kernels.usable(grad):
        from torchspec.models.ops.kernels import rows

        rows.add(parts, grad)
        return
    for (total, place, shift), part in zip(parts, grad.split([total.shape[1] for total, _, _ in parts], dim=1), strict=True):
        if place is None:
            total.add_(part)
        else:
            total.index_add_(0, place + shift, part.to(total.dtype))


def linear(x: Tensor, weight: Weight, *, bias: Tensor | None = None, residual: Residual | None = None, addends: Sequence[Addend] = ()) -> Tensor:
    """x W^T, plus what is given.

    Args:
        x: [R, in].
        weight: [out, in].
        bias: [out], in the type that its gradient is to have.
        residual: [R, out], with a gradient of its own. Not together with addends.
        addends: one or two of shared rows; side by side they are [R, out].

    Returns:
        [R, out] in the compute type.
    """
    assert residual is None or not addends
    rows, spare = (None, False) if residual is None else (residual.rows, residual.spare)
    stores = [(a.rows.store, a.columns, a.place, a.shift) for a in addends]
    y: Tensor = LinearFunction.apply(x, weight.token, bias, rows, spare, weight, stores, *[a.rows.token for a in addends])
    return y


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.total = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.total, *grads[0].shape[1:]).index_copy_(0, place, grads[0]), None


def take(x: Tensor, place: Tensor) -> Tensor:
    """``x[place]`` for distinct rows, whose backward needs no sum."""
    taken: Tensor = _Take.apply(x, place)
    return taken
