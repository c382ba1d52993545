"""Tensors that every unroll step uses: weights in the compute type here, rows of activations in ``shared_rows.py``. Their gradient is summed in fp32 (fp64 for
fp64), not by
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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchspec.models.ops.fp8 import Fp8, Fp8Gradient, Fp8Weight, quantise, quantise_stacked

_ALL = slice(None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class WeightGradient:
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
    def forward(ctx: Any, store: WeightGradient, *parts: Tensor) -> Tensor:
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

    store: WeightGradient
    token: Tensor
    rows: slice
    columns: slice

    @classmethod
    def of(cls, parts: Sequence[Tensor], dtype: torch.dtype, *, fp8: Fp8 = Fp8.NONE, slim_out: bool = False) -> Weight:
        """Weights [out_i, in] with one input stacked to [sum out_i, in], in ``dtype``; with ``fp8`` products with the whole of it are 8-bit ones, and
        ``slim_out`` says that its outputs are the fewer numbers."""
        store = WeightGradient(parts, dtype, fp8=fp8, slim_out=slim_out)
        return cls(store, _Stack.apply(store, *parts), _ALL, _ALL)

    def part(self, *, rows: slice = _ALL, columns: slice = _ALL) -> Weight:
        """A rectangle of the whole weight."""
        return replace(self, rows=rows, columns=columns)

    @property
    def data(self) -> Tensor:
        """[out, in] in the compute type."""
        return self.store.data[self.rows, self.columns]
