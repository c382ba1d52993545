"""Tensors that every unroll step uses: weights in the compute type, and rows of activations. Their gradient is summed in fp32 (fp64 for fp64), not by
autograd in the compute type, and handed over once.

A shared tensor is a *store* (the data and the sum of its gradients) and a *token*: an empty tensor that stands for it in autograd's graph. Each use takes
the token and adds to the store in its backward, where the token itself gets None; autograd runs the token's own backward after all uses, and that hands
the sum on. A further backward over
the same graph (``retain_graph=True``) begins new sums.

    dW = sum over steps of d_y_k^T x_k

On CUDA each term is added by the matrix product itself, into fp32; elsewhere the terms are kept and made in one product at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec.models.ops import kernels
from torchspec.models.ops.fp8 import Fp8, Fp8Gradient, Fp8Weight, quantise, quantise_stacked

_ALL = slice(None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _WeightStore:
    """[out, in] data of one or several stacked weights, and the sum of its gradients."""

    def __init__(self, parts: Sequence[Tensor], dtype: torch.dtype, *, fp8: Fp8 = Fp8.NONE, slim_out: bool = False) -> None:
        given = [part.detach() for part in parts]
        self.dtype, self.device, self.shape = dtype, given[0].device, torch.Size([sum(part.shape[0] for part in given), given[0].shape[1]])
        self.narrow = Fp8Weight(quantise_stacked(given)) if fp8 else None
        """Set where products with the whole weight are 8-bit ones."""
        self._data = None if fp8 else _stacked(given, dtype)
        self.gradient = Fp8Gradient(d_y_is_wide=not slim_out) if fp8 == Fp8.ALL else None
        """Set where the gradient, or that of the columns that are rounded, is an 8-bit product; what uses the store then adds to it rather than here."""
        self._columns = _ALL
        self._parts: dict[tuple[Any, ...], Fp8Weight] = {}
        self._sum: Tensor | None = None
        self._terms: dict[tuple[Any, ...], tuple[slice, slice, list[Tensor], list[Tensor]]] = {}

    @property
    def data(self) -> Tensor:
        """[out, in] in the compute type; not there where products with the whole weight are 8-bit ones."""
        assert self._data is not None
        return self._data

    def round_columns(self, columns: slice, *, gradient: bool) -> None:
        """Make products with these columns, and all or some of the rows, 8-bit ones in :func:`linear`; with ``gradient`` also the gradient of all rows."""
        data = self.data[:, columns]
        self._columns, self._parts = columns, {(None, None): Fp8Weight(quantise(data))}
        self.gradient = Fp8Gradient(d_y_is_wide=data.shape[0] >= data.shape[1]) if gradient else None

    def narrow_part(self, rows: slice, columns: slice) -> Fp8Weight | None:
        """A rectangle in 8 bits, where products with it are such."""
        if not self._parts or columns != self._columns:
            return None
        return self._parts.setdefault((rows.start, rows.stop), self._parts[None, None].part(rows))

    def forward(self, x: Tensor) -> Tensor:
        """x W^T with the whole weight."""
        return torch.mm(x, self.data.t()) if self.narrow is None else self.narrow.forward(quantise(x), x.dtype)

    def backward(self, d_y: Tensor) -> Tensor:
        """d_y W with the whole weight."""
        return torch.mm(d_y, self.data) if self.narrow is None else self.narrow.backward(quantise(d_y, self.narrow.factor), d_y.dtype)

    def add(self, rows: slice, columns: slice, d_y: Tensor, x: Tensor) -> None:
        """Add d_y^T x to a part of the gradient; d_y is [R, rows], x [R, columns]."""
        if self.device.type == "cuda":
            self._add_now(rows, columns, d_y, x)
            return
        key = (rows.start, rows.stop, columns.start, columns.stop)
        _, _, outs, ins = self._terms.setdefault(key, (rows, columns, [], []))
        outs.append(d_y)
        ins.append(x)

    def _add_now(self, rows: slice, columns: slice, d_y: Tensor, x: Tensor) -> None:
        narrow = d_y.dtype in (torch.bfloat16, torch.float16)
        if self._sum is None and rows == _ALL and columns == _ALL:
            self._sum = torch.mm(d_y.t(), x, out_dtype=torch.float32) if narrow else torch.mm(d_y.t(), x)
            return
        if self._sum is None:
            self._sum = torch.zeros(self.shape, dtype=wide(self.dtype), device=self.device)
        part = self._sum[rows, columns]
        if narrow:
            torch.addmm(part, d_y.t(), x, out_dtype=torch.float32, out=part)
        else:
            part.addmm_(d_y.t(), x)

    def collect(self) -> Tensor:
        """The sum, once."""
        narrow = None if self.gradient is None else self.gradient.collect()
        found, self._sum = self._sum, None
        terms, self._terms = list(self._terms.values()), {}
        if found is None and not terms and narrow is not None and self._columns == _ALL:
            return narrow
        if narrow is None and len(terms) == 1 and terms[0][:2] == (_ALL, _ALL):
            return _product(terms[0][2], terms[0][3])
        if found is None:
            kind = self.dtype if narrow is None and len(terms) == 1 else wide(self.dtype)
            found = torch.zeros(self.shape, dtype=kind, device=self.device)
        for rows, columns, outs, ins in terms:
            found[rows, columns] += _product(outs, ins)
        if narrow is not None:
            found[:, self._columns] += narrow
        return found


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices on top of each other, in a type."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    data = parts[0].new_empty(sum(part.shape[0] for part in parts), parts[0].shape[1], dtype=dtype)
    for place, part in zip(data.split([part.shape[0] for part in parts]), parts, strict=True):
        place.copy_(part)
    return data


def _product(outs: list[Tensor], ins: list[Tensor]) -> Tensor:
    """Sum of the d_y^T x, as one product."""
    return torch.mm((torch.cat(outs) if len(outs) > 1 else outs[0]).t(), torch.cat(ins) if len(ins) > 1 else ins[0])


class _Stack(torch.autograd.Function):
    """Parameters to the token of their store."""

    @staticmethod
    def forward(ctx: Any, store: _WeightStore, *parts: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.store, ctx.kinds = store, [(part.shape[0], part.dtype) for part in parts]
        return parts[0].new_empty(0, dtype=store.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.store.collect().split([size for size, _ in ctx.kinds])
        return None, *[piece.to(kind) for piece, (_, kind) in zip(found, ctx.kinds, strict=True)]


@dataclass(frozen=True)
class Weight:
    """A weight, or a rectangle of it, during one forward pass."""

    store: _WeightStore
    token: Tensor
    rows: slice
    columns: slice

    @classmethod
    def of(cls, parts: Sequence[Tensor], dtype: torch.dtype, *, fp8: Fp8 = Fp8.NONE, slim_out: bool = False) -> Weight:
        """Weights [out_i, in] with one input stacked to [sum out_i, in], in ``dtype``; with ``fp8`` products with the whole of it are 8-bit ones, and
        ``slim_out`` says that its outputs are the fewer numbers."""
        store = _WeightStore(parts, dtype, fp8=fp8, slim_out=slim_out)
        return cls(store, _Stack.apply(store, *parts), _ALL, _ALL)

    def part(self, *, rows: slice = _ALL, columns: slice = _ALL) -> Weight:
        """A rectangle of the whole weight."""
        return replace(self, rows=rows, columns=columns)

    @property
    def data(self) -> Tensor:
        """[out, in] in the compute type."""
        return self.store.data[self.rows, self.columns]


class _RowStore:
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
    def forward(ctx: Any, store: _RowStore, value: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.store = store
        return value.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.store.collect()


@dataclass(frozen=True)
class SharedRows:
    """Rows of activations that several steps read."""

    store: _RowStore
    token: Tensor

    @classmethod
    def of(cls, value: Tensor) -> SharedRows:
        """Share [M, C]."""
        store = _RowStore(value.detach().contiguous())
        return cls(store, _Keep.apply(store, value))


@dataclass(frozen=True)
class Addend:
    """Rows ``place + shift`` (distinct; None for all) of shared rows, to be added to a product's result."""

    rows: SharedRows
    place: Tensor | None
    shift: int = 0
    columns: slice = field(default_factory=lambda: _ALL)


_Part = tuple[_RowStore, slice, Tensor | None, int]
"""Store, columns, place and shift of an addend."""


@dataclass(frozen=True)
class Residual:
    """Rows [R, H] that a product is added to."""

    rows: Tensor
    spare: bool = False
    """Nobody else reads them: the sum may take their place."""


class _Linear(torch.autograd.Function):
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
    y: Tensor = _Linear.apply(x, weight.token, bias, rows, spare, weight, stores, *[a.rows.token for a in addends])
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
