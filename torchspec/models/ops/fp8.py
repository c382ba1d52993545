"""Products with a weight in 8-bit floats: y = x W^T and d_x = d_y W, and, as a second level, its gradient dW = d_y^T x.

In the first two every row of x, of d_y and of W has a scale of its own. In d_x the sum runs over W's rows, so their scales go into d_y before it is rounded:

    y_rn = s_r s_n sum_k x8_rk w8_nk               d_x_rk = t_r sum_n round(d_y_rn s_n / t_r) w8_nk

The gradient is :class:`Fp8Gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.ops import kernels

MULTIPLE = 16
"""What the product's kernel wants both sizes of a weight to be multiples of, and the length of its sums."""
SMALLEST = 1e-30
"""A row with nothing above it counts as one of zeros. Its scale, or one over it, would leave fp32 and make NaN of it. Gradients of tokens that attention
hardly looks at may get that small, and a row of them has no share in any sum."""
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _whole(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE


class Fp8(IntEnum):
    """Which products with weights are 8-bit ones."""

    NONE = 0
    ROWS = 1
    """y and d_x."""
    ALL = 2
    """y, d_x and dW."""

    @classmethod
    def of(cls, matmul: str) -> Fp8:
        """From ``model.matmul``."""
        return {"bf16": cls.NONE, "fp8": cls.ROWS, "fp8_all": cls.ALL}[matmul]


def check(device: torch.device, level: Fp8, sizes: Mapping[str, int]) -> None:
    """Refuse what would not be made in 8 bits.

    Args:
        device: that computes.
        level: which products.
        sizes: sides of the matrices, by the draft's names of them.

    Raises:
        UserError: sizes that the products do not take, or no CUDA device of compute capability 9.0 or more.
    """
    matmul = "fp8_all" if level is Fp8.ALL else "fp8"
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise UserError("model.matmul", matmul, f"wants sizes that are multiples of {MULTIPLE}, and draft.{name} is {size}", "change it, or use bf16")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("model.matmul", matmul, f"needs a GPU with 8-bit matrix products scaled by row (Hopper or later), this is {device}", "use bf16")


@dataclass(frozen=True)
class Rounded:
    """Rows in 8 bits: ``data`` times ``scale`` is about what they were, times the factors that were given."""

    data: Tensor
    """[R, C] e4m3."""
    scale: Tensor
    """[R, 1] fp32."""
    top: Tensor
    """[R] fp32: the largest magnitude of each row as it was, without factors."""

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Rounded:
        """Room for R rows of C numbers."""
        floats = torch.empty(2, _whole(rows), dtype=torch.float32, device=device)[:, :rows]  # the second list as aligned as the first
        return cls(torch.empty(rows, width, dtype=_E4M3, device=device), floats[0, :, None], floats[1])

    def rows(self, which: slice) -> Rounded:
        """Some of them, in the same memory."""
        return Rounded(self.data[which], self.scale[which], self.top[which])


def quantise(x: Tensor, factor: Tensor | None = None) -> Rounded:
    """Round rows, after multiplying columns by ``factor``.

    Args:
        x: [R, C].
        factor: [C] fp32.
    """
    if kernels.usable(x):
        from torchspec.models.ops.kernels import fp8

        return fp8.quantise(x, factor)
    wide = x.float()
    top = wide.abs().amax(dim=1) if x.shape[0] else x.new_empty(0, dtype=torch.float32)
    if factor is not None:
        wide = wide * factor
    largest = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > SMALLEST, largest / 448.0, 1.0)
    return Rounded((wide * (1.0 / scale)).to(_E4M3), scale, top)


def quantise_stacked(parts: Sequence[Tensor]) -> Rounded:
    """:func:`quantise` of matrices [R_i, C] on top of each other, without a copy of them in one piece."""
    if len(parts) == 1:
        return quantise(parts[0])
    if not kernels.usable(parts[0]):
        return quantise(torch.cat(list(parts)))
    from torchspec.models.ops.kernels import fp8

    whole, first = Rounded.empty(sum(part.shape[0] for part in parts), parts[0].shape[1], parts[0].device), 0
    for part in parts:
        fp8.quantise(part, None, into=whole.rows(slice(first, first + part.shape[0])))
        first += part.shape[0]
    return whole


def _transposed(x: Tensor) -> Tensor:
    """[R, C] to [C, R], contiguous, of 8-bit numbers."""
    if kernels.usable(x):
        from torchspec.models.ops.kernels import fp8

        return fp8.transpose(x)
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


class Fp8Weight:
    """A weight [N, K], rounded by row, and turned for the backward (products want the summed dimension contiguous); :func:`check` has seen to N and K."""

    def __init__(self, rounded: Rounded) -> None:
        assert rounded.data.shape[0] % MULTIPLE == 0 and rounded.data.shape[1] % MULTIPLE == 0
        self.rounded, self.data, self.scale = rounded, rounded.data, rounded.scale

    @cached_property
    def _transposed_data(self) -> Tensor:
        return _transposed(self.data)

    @cached_property
    def _one(self) -> Tensor:
        return torch.ones(1, self.data.shape[1], dtype=torch.float32, device=self.data.device)

    def part(self, rows: slice) -> Fp8Weight:
        """Some of the rows."""
        return Fp8Weight(self.rounded.rows(rows))

    @property
    def factor(self) -> Tensor:
        """[N] what columns of d_y are multiplied by before they are rounded for :meth:`backward`."""
        return self.scale[:, 0]

    def forward(self, x: Rounded, dtype: torch.dtype) -> Tensor:
        """[R, K] to x W^T [R, N] in ``dtype``."""
        if not x.data.shape[0]:
            return x.scale.new_empty(0, self.data.shape[0], dtype=dtype)
        return torch._scaled_mm(x.data, self.data.t(), scale_a=x.scale, scale_b=self.scale.t(), out_dtype=dtype, use_fast_accum=True)

    def backward(self, d_y: Rounded, dtype: torch.dtype) -> Tensor:
        """[R, N], rounded with :attr:`factor`, to d_y W [R, K] in ``dtype``."""
        if not d_y.data.shape[0]:
            return d_y.scale.new_empty(0, self.data.shape[1], dtype=dtype)
        # Fast accumulation keeps sums in the tensor core's registers, which hold about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): its error is
        # bounded by the number of terms, whatever they are. So a sum over N that is no longer than the forward's over K errs no more than that.
        fast = self.data.shape[0] <= self.data.shape[1]
        return torch._scaled_mm(d_y.data, self._transposed_data.t(), scale_a=d_y.scale, scale_b=self._one, out_dtype=dtype, use_fast_accum=fast)


def round_transposed(x: Tensor, top: Tensor, out: Tensor, *, limit: float, common: Tensor | None = None) -> None:
    """Write x, each row times a number, in 8 bits and turned: out_cr = round(x_rc by_r), no further than the type reaches.

    Args:
        x: [R, C].
        top: [R] fp32.
        out: [C, R or more] of an 8-bit type; what is past R becomes 0.
        limit: of ``by``: limit / top_r, or with ``common`` top_r / limit / common; 0 for rows with nothing above :data:`SMALLEST`.
        common: a scalar on the device.
    """
    if kernels.usable(x):
        from torchspec.models.ops.kernels import fp8

        fp8.round_transposed(x, top, out, limit=limit, common=common)
        return
    by = torch.where(top > SMALLEST, limit / top if common is None else top / limit / common, 0.0)
    most = torch.finfo(out.dtype).max
    rows = x.shape[0]
    out[:, :rows] = (x.float() * by[:, None]).clamp(-most, most).t().to(out.dtype)
    out[:, rows:] = 0


_BYTES = 2**30
"""Of the wider operand, kept before they are multiplied; or as many as the gradient itself has, where those are more."""


class Fp8Gradient:
    """Sum of d_y^T x [N, K] over calls, as one product of both with the rows of all calls in a row: the summed dimension has to be contiguous.

    A row's scale cannot be taken out of a sum over rows. So it is taken out of one operand, the wide one, which is rounded and turned when it comes, and put
    into the other, slim one, which is kept as it is until every row is there and has one scale C for all:

        dW_nk = C sum_r round(d_y_rn / s_r) round(x_rk s_r / C),    s_r = max_n |d_y_rn| / limit,    C = max_r (s_r max_k |x_rk|) / limit

    (or d_y and x exchanged). Nothing is guessed from an earlier step and nothing overflows. d_y is e5m2, which reaches down to 2^-32 of its largest number, x
    e4m3, which reaches to 2^-18. A softmax's gradient needs the former: on SmolLM2's states a tenth of the head's rows were more than 21 % off with d_y in
    e4m3 and 11 % in e5m2, as many as with a bf16 product (the other 8-bit products make the rest); for gate, up and down the two were the same.

    Args:
        d_y_is_wide: which operand is rounded when it comes.
    """

    def __init__(self, *, d_y_is_wide: bool) -> None:
        self._d_y_is_wide = d_y_is_wide
        self._wide_kind, self._slim_kind = (_E5M2, _E4M3) if self._d_y_is_wide else (_E4M3, _E5M2)
        self._expected = 0
        self._reset()

    def _reset(self) -> None:
        self._left = self._expected
        self._buffer: Tensor | None = None
        self._used = 0
        self._slim: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sum: Tensor | None = None

    def expect(self, rows: int) -> None:
        """A call of :meth:`add` with as many rows will come: room for all is made at once, up to a bound."""
        self._expected += _whole(rows)
        self._left += _whole(rows)

    def add(self, d_y: Tensor, x: Tensor, d_y_top: Tensor, x_top: Tensor) -> None:
        """Add d_y^T x.

        Args:
            d_y, x: [R, N] and [R, K].
            d_y_top, x_top: [R] fp32, the largest magnitude of each row.
        """
        if self._d_y_is_wide:
            round_transposed(d_y, d_y_top, self.place(d_y.shape[1], x, d_y_top, x_top), limit=limit_of(self._wide_kind))
        else:
            round_transposed(x, x_top, self.place(x.shape[1], d_y, x_top, d_y_top), limit=limit_of(self._wide_kind))

    def place(self, width: int, slim: Tensor, wide_top: Tensor, slim_top: Tensor) -> Tensor:
        """:meth:`add`, but the caller writes the wide operand: :func:`round_transposed` says how, with ``wide_top`` and the largest of the result's type.

        Args:
            width: columns of the wide operand, C.
            slim: [R, N or K].
            wide_top, slim_top: [R] fp32, the largest magnitude of each row.

        Returns:
            [C, R and up to 15 more].
        """
        need = _whole(slim.shape[0])
        if self._buffer is not None and self._used + need > self._buffer.shape[1]:
            self._multiply()
        if self._buffer is None:
            most = max(_BYTES, 4 * width * slim.shape[1])
            room = max(need, min(self._left, most // width // MULTIPLE * MULTIPLE))
            self._buffer = torch.empty(width, room, dtype=self._wide_kind, device=slim.device)
        found = self._buffer[:, self._used : self._used + need]
        self._slim.append((slim, wide_top, slim_top))
        self._used += need
        self._left -= need
        return found

    def _multiply(self) -> None:
        if self._buffer is None or not self._used:
            self._buffer, self._slim = None, []
            return
        limit = limit_of(self._wide_kind)
        tops = torch.cat([wide_top for _, wide_top, _ in self._slim]) * torch.cat([slim_top for *_, slim_top in self._slim])
        common = (tops.amax() / (limit * limit_of(self._slim_kind))).clamp(min=1e-30)
        slim = torch.empty(self._slim[0][0].shape[1], self._used, dtype=self._slim_kind, device=self._buffer.device)
        first = 0
        for values, wide_top, _ in self._slim:
            need = _whole(values.shape[0])
            round_transposed(values, wide_top, slim[:, first : first + need], limit=limit, common=common)
            first += need
        wide = self._buffer[:, : self._used]
        self._buffer, self._slim, self._used = None, [], 0
        out, into = (wide, slim) if self._d_y_is_wide else (slim, wide)
        one = torch.ones_like(common)
        product = torch._scaled_mm(out, into.t(), scale_a=common, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
        self._sum = product if self._sum is None else self._sum.add_(product)

    def collect(self) -> Tensor | None:
        """The sum [N, K] fp32, once; None where nothing was added. What is expected stays, for a further backward."""
        self._multiply()
        found = self._sum
        self._reset()
        return found


def limit_of(dtype: torch.dtype) -> float:
    """The largest number of an 8-bit type."""
    return float(torch.finfo(dtype).max)
