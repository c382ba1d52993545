"""Checks of the Triton kernels against their torch twins in fp64, at any shape, type and device. Run by ``kernel_grid.py``:
in Triton's interpreter on a CPU, and on CUDA for real where there is a GPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torchspec.models.ops.fp8 import quantise as quantise_in_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's file is imported


def _exact_casts() -> None:
    """Make the interpreter cast as a GPU does: Triton 3.9's own cuts bf16 off and loses the carry of 8-bit floats."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float
    kinds = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16)}
    kinds |= {to: (kind, torch.uint8, np.uint8) for to, kind in ((tl.float8e4nv, torch.float8_e4m3fn), (tl.float8e5, torch.float8_e5m2))}

    def convert(given: np.ndarray, source: object, to: object, rounding: object) -> np.ndarray:
        if source != tl.float32 or to not in kinds:
            return own(given, source, to, rounding)
        kind, bits, code = kinds[to]
        return torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32)).to(kind).view(bits).numpy().view(code).reshape(given.shape)

    interpreter._convert_float = convert


if DEVICE.type == "cpu":
    _exact_casts()


def close(name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Norm-wise relative error within what ``dtype`` allows; every element a number."""
    assert torch.isfinite(ours.double()).all(), name
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-20))
    assert error < factor * {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype], (name, error)


def make(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Random numbers that ``dtype`` holds exactly."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def norm(rows: int, width: int, dtype: torch.dtype, *, placed: bool) -> None:
    from torchspec.models.ops.kernels import norm as kernel

    total = rows + 3
    x, weight = make(total, width, dtype=dtype, seed=1), make(width, dtype=torch.float32, seed=2)
    place = torch.randperm(total, generator=torch.Generator().manual_seed(3))[:rows].to(DEVICE) if placed else None
    source = x if placed else x[:rows]
    d_y, more = make(rows, width, dtype=dtype, seed=4), make(*source.shape, dtype=dtype, seed=5)
    exact = source.double().requires_grad_()
    w = weight.to(dtype).double().requires_grad_()
    taken = exact if place is None else exact[place]
    expected = taken * torch.rsqrt(taken.square().mean(-1, keepdim=True) + 1e-5) * w
    (expected * d_y.double()).sum().backward()
    assert exact.grad is not None and w.grad is not None
    y, inverse = kernel.forward(source, weight, 1e-5, place=place)
    out = torch.full_like(source, 7.0)
    d_x, d_weight = kernel.backward(d_y, source, weight, inverse, more=more, place=place, out=out)
    close("y", y, expected.detach(), dtype)
    wanted = exact.grad + more.double()
    if place is not None:
        untouched = torch.ones(total, dtype=torch.bool, device=DEVICE).index_fill(0, place, False)
        wanted[untouched] = 7.0
    close("d_x", d_x, wanted, dtype)
    close("d_weight", d_weight, w.grad, dtype)


def advance(rows: int, number: int, width: int, dtype: torch.dtype, *, normed_residual: bool, every: bool, state: bool) -> None:
    """Two uses of one norm: the weight's gradient is summed over them."""
    from torchspec.models.ops.kernels import layer_input as kernel

    place = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:number].sort().values.to(DEVICE)
    to = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE).index_copy(0, place, torch.arange(number, dtype=torch.int32, device=DEVICE))
    weight = make(width, dtype=torch.float32, seed=2).to(dtype).float()
    w = weight.double().requires_grad_()
    partial = kernel.sums(width, DEVICE)
    for seed in (10, 20):
        x, d_normed, d_residual = make(rows, width, dtype=dtype, seed=seed), *(make(number, width, dtype=dtype, seed=seed + i) for i in (1, 2))
        d_every, wide = make(rows, width, dtype=dtype, seed=seed + 3), make(rows, width + 8, dtype=dtype, seed=seed + 4)
        d_state = wide[:, 8:] if state else None
        exact = x.double().requires_grad_()
        whole = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * w
        results = [whole[place], whole[place] if normed_residual else exact[place], whole]
        grads = [d_normed, d_residual, d_every if every else torch.zeros_like(d_every)]
        total = sum((result * grad.double()).sum() for result, grad in zip(results, grads, strict=True))
        (total + ((exact * d_state.double()).sum() if d_state is not None else 0.0)).backward()
        assert exact.grad is not None
        normed, residual, found, inverse = kernel.forward(x, weight, 1e-5, to, number, normed_residual=normed_residual, every=every)
        close("normed", normed, results[0].detach(), dtype)
        close("residual", residual, results[1].detach(), dtype)
        if every:
            close("every", found, whole.detach(), dtype)
        d_x = kernel.backward(d_normed, d_residual, d_every if every else None, d_state, x, weight, to, inverse, partial, normed_residual=normed_residual)
        close("d_x", d_x, exact.grad, dtype)
    assert w.grad is not None
    close("d_weight", partial.sum(0), w.grad, dtype)


def norm_as_rounded(rows: int, width: int, dtype: torch.dtype) -> None:
    """Backward of the very forward, which rounds the fp32 weight and the unit rows to ``dtype``: by autograd in fp64, where rounding has the slope 1."""
    from torchspec.models.ops import norm as norms
    from torchspec.models.ops.kernels import layer_input as advance_kernel
    from torchspec.models.ops.kernels import norm as kernel

    x, weight, d_y = make(rows, width, dtype=dtype, seed=1), make(width, dtype=torch.float32, seed=2), make(rows, width, dtype=dtype, seed=4)
    rounded = lambda t: t + (t.detach().to(dtype).double() - t.detach())  # noqa: E731
    exact, w = x.double().requires_grad_(), weight.double().requires_grad_()
    y = rounded(exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)) * rounded(w)
    (y * d_y.double()).sum().backward()
    assert exact.grad is not None and w.grad is not None
    inverse = kernel.forward(x, weight, 1e-5)[1]
    every, partial = torch.arange(rows, dtype=torch.int32, device=DEVICE), advance_kernel.sums(width, DEVICE)
    d_x = advance_kernel.backward(d_y, torch.zeros_like(d_y), None, None, x, weight, every, inverse[:, 0], partial, normed_residual=False)
    found = {"norm": kernel.backward(d_y, x, weight, inverse), "advance": (d_x, partial.sum(0))}
    if DEVICE.type == "cpu":
        found["twin"] = norms.rms_backward(d_y, x, weight, inverse)
    for name, (d_x, d_weight) in found.items():
        assert (d_x != exact.grad.to(dtype)).float().mean() < 0.01, name  # with the weight as it is, a third of them
        assert float((d_weight.double() - w.grad).norm() / w.grad.norm()) < 2e-4, name


def swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import swiglu as kernel

    gate_up, d_act = make(rows, 2 * width, dtype=dtype, seed=1, scale=2.0), make(rows, width, dtype=dtype, seed=2)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    (expected * d_act.double()).sum().backward()
    assert exact.grad is not None
    act, d_gate_up = kernel.backward(gate_up, d_act)
    for name, ours in (("forward", kernel.forward(gate_up)), ("again", act)):
        close(name, ours, expected.detach(), dtype)
    close("d_gate_up", d_gate_up, exact.grad, dtype)


def rows(number: int, total: int, width: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import rows as kernel

    place = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:number].to(DEVICE)
    where = torch.full((total,), -1, device=DEVICE).index_copy(0, place, torch.arange(number, device=DEVICE))
    size = 3 if width % 3 == 0 else 1
    first, more = (make(number, width // size, size, dtype=dtype, seed=seed) for seed in (1, 3))
    lse = make(number, width // size, dtype=torch.float32, seed=8)
    for given in ([first], [first, more], [more, first, first]):
        found = kernel.spread(given, where, total + 3, lse=lse)
        for source, ours in zip(given, found, strict=False):
            assert torch.equal(ours, torch.zeros(total + 3, *source.shape[1:], dtype=dtype, device=DEVICE).index_copy(0, place, source))
        assert torch.equal(found[-1], torch.full((total + 3, width // size), torch.inf, device=DEVICE).index_copy(0, place, lse).t())
        assert len(kernel.spread(given, where, total + 3)) == len(given) == len(found) - 1

    second, shift = width // 2 + 1, 2
    data = make(total + shift, width, dtype=dtype, seed=4), make(total + shift, second + 3, dtype=dtype, seed=5)[:, 3:]
    starts = make(total + shift, width + 8, dtype=torch.float32, seed=2)[:, 8:], make(total + shift, second, dtype=torch.float32, seed=6)
    grad = make(number, width + second + 8, dtype=dtype, seed=7)[:, 8:]
    for places in ((place,), (None,), (place, place), (None, place), (place, None)):
        chosen = [torch.arange(number, device=DEVICE) if at is None else at + shift for at in places]
        found = kernel.beside([(t, at, shift) for t, at in zip(data, places, strict=False)], number)
        assert torch.equal(found, torch.cat([t[at] for t, at in zip(data, chosen, strict=False)], dim=1))
        start = make(*found.shape, dtype=dtype, seed=9)
        ours = start.clone()
        assert kernel.beside([(t, at, shift) for t, at in zip(data, places, strict=False)], number, onto=ours) is ours
        assert torch.equal(ours, start + found)
        ours, given = [torch.cat([t, t[:, :2]], dim=1)[:, : t.shape[1]] for t in starts[: len(places)]], grad[:, : found.shape[1]]
        kernel.add([(t, at, shift) for t, at in zip(ours, places, strict=True)], given)
        parts = given.double().split([t.shape[1] for t in ours], dim=1)
        for t, start, at, part in zip(ours, starts, chosen, parts, strict=False):
            close("add", t, start.double().index_add(0, at, part), torch.float32)


def gather(rows: int, groups: int, size: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import rows as kernel

    sums = tuple(torch.full((rows, groups, size), float("nan"), device=DEVICE) for _ in range(2))
    total = [torch.zeros(rows, groups, size, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    for seed in (1, 2, 3):
        key = make(groups, rows, size, dtype=dtype, seed=seed).transpose(0, 1)
        value = make(rows + 1, groups + 1, size, dtype=dtype, seed=seed + 5)[1:, 1:]
        kernel.gather(key, value, (sums[0], sums[1]), first=seed == 1)
        total = [total[0] + key.double(), total[1] + value.double()]
    for name, ours, exact in zip(("key", "value"), sums, total, strict=True):
        close(name, ours, exact, torch.float32)


def heads(number: int, queries: int, groups: int, size: int, dtype: torch.dtype) -> None:
    """Queries alone, keys and values alone, all three; and back."""
    from torchspec.models.ops.kernels import heads as kernel
    from torchspec.models.ops.rope import rotate

    total, padded, entries_of, slots = number + 3, number + 5, number + 2, 3
    order = lambda high, seed: torch.randperm(high, generator=torch.Generator().manual_seed(seed))[:number].sort().values.to(DEVICE)  # noqa: E731
    at, entries = order(total, 0), order(entries_of, 1)
    where = torch.full((total,), -1, dtype=torch.int32, device=DEVICE).index_copy(0, at, torch.arange(number, dtype=torch.int32, device=DEVICE))
    angle = make(number, 1, size // 2, dtype=torch.float32, seed=2, scale=3.0)
    cos, sin = angle.cos(), angle.sin()
    flat = make(number, (queries + 2 * groups) * size + 8, dtype=dtype, seed=3)[:, : (queries + 2 * groups) * size]
    all_heads = flat.double().unflatten(1, (-1, size))
    q, k, v = all_heads.split([queries, groups, groups], dim=1)
    q, k = rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double())

    nan = lambda *shape: torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)  # noqa: E731
    for later in (False, True):
        query, key, value = nan(padded, queries, size), nan(entries_of, slots, groups, size), nan(entries_of, slots, groups, size)
        part = flat if later else flat[:, : queries * size]
        slot = {"key": key[:, 1], "value": value[:, 1], "entries": entries} if later else {"key": None, "value": None, "entries": None}
        kernel.split(part, cos, sin, query=query, where=where, **slot)
        close("query", query, torch.zeros(padded, queries, size, dtype=torch.float64, device=DEVICE).index_copy(0, at, q), dtype)
        if later:
            close("key", key[entries, 1], k, dtype)
            close("value", value[entries, 1], v, dtype)
            assert int(key.isnan().sum()) == int(value.isnan().sum()) == key.numel() - k.numel()
    query, key, value = nan(number, queries, size), nan(number, groups, size), nan(number, groups, size)
    kernel.split(flat, cos, sin, query=query, key=key, value=value, where=None, entries=None)
    for name, ours, exact in (("query", query, q), ("key", key, k), ("value", value, v)):
        close(f"{name} of the same rows", ours, exact, dtype)
    key, value = nan(padded, groups, size), nan(padded, groups, size)
    kernel.split(flat[:, queries * size :], cos, sin, query=None, key=key, value=value, where=None, entries=None)
    more = torch.zeros(padded - number, groups, size, dtype=torch.float64, device=DEVICE)
    close("key", key, torch.cat([k, more]), dtype)
    close("value", value, torch.cat([v, more]), dtype)

    d_query = make(number, queries, size, dtype=dtype, seed=4)
    d_key, d_value = (make(entries_of, slots, groups, size, dtype=torch.float32, seed=seed) for seed in (5, 6))
    back = lambda x: rotate(x.double(), cos.double(), -sin.double())  # noqa: E731
    slotted = [d_key[entries, 1], d_value[entries, 1]]
    found = kernel.join(number, cos, sin, d_query=d_query, d_key=d_key[:, 1], d_value=d_value[:, 1], entries=entries, dtype=dtype)
    close("all", found, torch.cat([back(d_query), back(slotted[0]), slotted[1].double()], dim=1).flatten(1), dtype)
    found = kernel.join(number, cos, sin, d_query=d_query, d_key=None, d_value=None, entries=None, dtype=dtype)
    close("queries", found, back(d_query).flatten(1), dtype)
    found = kernel.join(number, cos, sin, d_query=None, d_key=d_key[:, 1], d_value=d_value[:, 1], entries=None, dtype=dtype)
    close("keys, values", found, torch.cat([back(d_key[:number, 1]), d_value[:number, 1].double()], dim=1).flatten(1), dtype)


class CausalInTorch:
    """Stands for ``attention_flash.Causal`` where no flash kernel runs: the same promises, other strides, NaN where nothing may be read."""

    def __init__(self, like: Tensor, *, total: int, bounds: Tensor, longest: int) -> None:
        self.total, self.bounds, self.rows = total, bounds.cpu(), -(-total // 8) * 8
        assert longest == int(self.bounds.diff().max())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from torchspec.models.ops.attention import torch as attention_torch

        self._check(query, key, value)
        every = torch.arange(self.total, device=query.device)
        out, lse = attention_torch.causal(*(t[: self.total] for t in (query, key, value)), every, self.bounds, scale)
        return self._wide(out), self._wide(lse)

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, ...]:
        from torchspec.models.ops.attention import torch as attention_torch

        self._check(grad, query, key, value, out)
        assert lse.is_contiguous() and lse.shape == (query.shape[1], self.rows) and lse[:, self.total :].eq(torch.inf).all()
        every = torch.arange(self.total, device=query.device)
        given = [t[: self.total] for t in (grad, query, key, value, out, lse.t())]
        d_query, d_key, d_value = attention_torch.causal_backward(*given, every, self.bounds, scale)
        return self._wide(d_query), *(torch.nn.functional.pad(t, (0, 0, 0, 0, 0, self.rows - self.total)) for t in (d_key, d_value))

    def _check(self, *given: Tensor) -> None:
        for t in given:
            assert t.is_contiguous() and t.shape[0] == self.rows and t[self.total :].eq(0).all() and torch.isfinite(t).all()

    def _wide(self, x: Tensor) -> Tensor:
        """[N, h, ..] in an array [h, P + 1, .. + 8] of NaN."""
        x = x.transpose(0, 1)
        found = x.new_full((x.shape[0], self.rows + 1, *(size + 8 for size in x.shape[2:])), torch.nan)
        place = found[:, : self.total] if x.ndim == 2 else found[:, : self.total, : x.shape[2]]
        place.copy_(x)
        return (found[:, :-1] if x.ndim == 2 else found[:, :-1, : x.shape[2]]).transpose(0, 1)


def same(ours: Tensor, exact: Tensor) -> None:
    """Of two kernels that compute alike: every bit in the interpreter; a GPU's compiler may contract products and sums otherwise in one than in the other."""
    if DEVICE.type == "cpu":
        assert torch.equal(ours, exact)
    else:
        torch.testing.assert_close(ours, exact, rtol=1e-5 if exact.dtype == torch.float32 else 1e-2, atol=1e-6)


def scale(number: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import rows as kernel

    x, factor = make(number, dtype=dtype, seed=1), torch.tensor(1.37, device=DEVICE)
    ours = x.clone()
    kernel.scale(ours, factor)
    close("scale", ours, x.double() * factor.double(), dtype)


def merge(number: int, heads: int, groups: int, size: int, slots: int, count: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.attention import torch as attention_torch
    from torchspec.models.ops.kernels import merge as kernel

    total, entries_of, scale = number + 4, number + 2, size**-0.5
    at = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:number].sort().values.to(DEVICE)
    entries = torch.randperm(entries_of, generator=torch.Generator().manual_seed(1))[:number].sort().values.to(DEVICE)
    causal, lse = make(heads, total, size, dtype=dtype, seed=1).transpose(0, 1), make(heads, total, dtype=torch.float32, seed=2).t()
    spread, grad = make(total, heads, size, dtype=dtype, seed=3), make(number, heads, size, dtype=dtype, seed=4)
    query = spread[at]
    key, value = make(entries_of, slots, groups, size, dtype=dtype, seed=5), make(entries_of, slots, groups, size, dtype=dtype, seed=6)
    out, merged = kernel.forward(causal, lse, spread, key, value, rows=at, entries=entries, count=count, scale=scale)
    k, v = key[entries, :count].double(), value[entries, :count].double()
    expected, expected_lse = causal[at].double(), lse[at].double()
    if count:
        expected, expected_lse = attention_torch.merge(expected, expected_lse, query.double(), k, v, scale)
    close("out", out, expected, dtype)
    close("lse", merged, expected_lse, torch.float32)

    d_causal = make(total, heads + 1, size + 8, dtype=dtype, seed=7)[:, 1:, 8:]
    sums = [make(*key.shape, dtype=torch.float32, seed=8), make(*key.shape, dtype=torch.float32, seed=9)]
    wanted = [total_.double().clone() for total_ in sums]
    d_query = d_causal[at].double()
    if count:
        more, d_key, d_value = attention_torch.merge_backward(grad.double(), query.double(), k, v, out.double(), merged.double(), scale)
        d_query = d_query + more
        wanted[0][entries, :count] += d_key
        wanted[1][entries, :count] += d_value
    given = {"rows": at, "entries": entries, "count": count, "scale": scale}
    found = kernel.backward(grad, spread, out, merged, key, value, d_causal, *sums, **given)
    close("d_query", found, d_query, dtype)
    close("d_key", sums[0], wanted[0], torch.float32, 3.0)
    close("d_value", sums[1], wanted[1], torch.float32, 3.0)

    # sums that hold nothing yet: everywhere, then at every other row
    empty = (torch.full_like(sums[0], torch.nan), torch.full_like(sums[1], torch.nan))
    kernel.backward(grad, spread, out, merged, key, value, d_causal, *empty, **given, fresh=True)
    before = torch.where(torch.arange(number, device=DEVICE) % 2 == 0, -1, 5).int()
    half = tuple(t.clone() for t in empty)
    for t in half:
        t[entries[::2]] = torch.nan
    kernel.backward(grad, spread, out, merged, key, value, d_causal, *half, **given, before=before)
    if count:
        for name, once, twice, added in zip(("d_key", "d_value"), empty, half, (d_key, d_value), strict=True):
            close(name, once[entries, :count], added, torch.float32, 3.0)
            times = torch.where(before < 0, 1.0, 2.0).double()[:, None, None, None]
            close(name, twice[entries, :count], times * added, torch.float32, 3.0)


def target(number: int, vocabulary: int, width: int, dtype: torch.dtype) -> None:
    from torchspec.models.ops.kernels import target as kernel

    logits = make(number, vocabulary, dtype=dtype, seed=1, scale=3.0)
    logits[::2, width - 1 :: max(1, vocabulary // 3)] = 9.0  # ties, also between the two parts
    kept, rest = logits[:, :width], logits[:, width:] if width < vocabulary else None
    p = logits.clone()[:, :width]
    best, inside, whole, mass = kernel.ask(p, rest)
    largest = kept == kept.amax(-1, keepdim=True)
    assert torch.equal(best.long(), (largest.cumsum(-1) == 0).sum(-1))  # the first of them
    assert torch.equal(inside.bool(), kept.amax(-1) == logits.amax(-1))
    close("p", p, kept.double().softmax(-1), dtype)
    close("whole", whole, p.double().sum(-1), torch.float32)
    if number:
        bad = logits.clone()
        bad[0] = torch.nan
        answer = kernel.ask(bad[:, :width], None if rest is None else bad[:, width:])[0]
        assert 0 <= int(answer[0]) < width and torch.equal(answer[1:], best[1:])
    close("mass", mass * whole, (kept.double().logsumexp(-1) - logits.double().logsumexp(-1)).exp(), torch.float32, 5.0)


def losses(
    number: int, width: int, weights: dict[str, float], dtype: torch.dtype, *, pruned: bool, measure: bool, kind: torch.dtype | None = None, sure: float = 0.0
) -> None:
    """``kind``: of p, where it is not that of the draft's logits. ``sure``: how far ahead of others the target's token 3 is, and a third of it the draft's."""
    from torchspec.models.ops.kernels import loss as kernel
    from torchspec.models.ops.kernels import target as target_kernel
    from torchspec.models.ops.loss_formulas import LossWeights, RowTargets, row_losses

    chosen, low, steps, states = LossWeights.of(weights), 2, 3, 2 * number
    vocabulary = 2 * width if pruned else width
    logits = make(number, vocabulary, dtype=kind or dtype, seed=1, scale=2.0)
    logits[:, 3] += sure
    p = logits[:, :width].clone(memory_format=torch.contiguous_format)
    asked = kernel.TargetStatistics(p, *target_kernel.ask(p, logits[:, width:] if pruned else None), low)
    assert sure == 0.0 or float((asked.whole - 1).abs().max()) > 1e-3
    place = torch.randperm(states + 1, generator=torch.Generator().manual_seed(2))[:states].to(DEVICE)
    flat = lambda high, seed: torch.randint(0, high, (states + 1,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)  # noqa: E731
    lists = kernel.Rows(
        source=flat(number, 3) + low, step=flat(steps, 4), scale=make(steps, dtype=torch.float32, seed=5).abs(),
        mixing=make(steps, dtype=torch.float32, seed=6).sigmoid(), loss=make(states + 1, dtype=torch.float32, seed=7),
        hit=torch.full((states + 1,), 9, dtype=torch.int8, device=DEVICE), alpha=make(states + 1, dtype=torch.float32, seed=8),
        chosen=torch.full((states + 1,), -1, device=DEVICE) if measure else None,
    )  # fmt: skip
    z = make(states, width, dtype=dtype, seed=9, scale=2.0)
    z[:, 3] += sure / 3
    t, k = lists.source[place] - low, lists.step[place]
    exact = RowTargets(
        p=p.double()[t], whole=asked.whole.double()[t], best=asked.best.long()[t], inside=asked.inside.bool()[t], mass=asked.mass.double()[t],
        scale=lists.scale.double()[k], mixing=lists.mixing.double()[k],
    )  # fmt: skip
    expected = row_losses(z.double().clone(), exact, chosen, gradient=True, measure=measure)
    ours = z.clone()
    kernel.losses(ours, place, asked, lists, vars(chosen), gradient=True, measure=measure)
    close("loss", lists.loss[place], expected.loss, torch.float32, 20.0)
    assert expected.gradient is not None
    # the gradient of tv and lk has a jump where q = t: rounding puts a few elements on its other side
    close("gradient", ours, expected.gradient, dtype, 500.0 if chosen.needs_alpha and dtype == torch.float32 else 5.0)
    assert torch.equal(lists.hit[place].bool(), expected.hit) or dtype != torch.float32
    assert lists.chosen is None or torch.equal(lists.chosen[place], z.max(-1).indices) or dtype != torch.float32
    if expected.alpha is not None:
        close("alpha", lists.alpha[place], expected.alpha, torch.float32, 5.0)
    factor, again = make(width, dtype=torch.float32, seed=10).abs() + 0.01, z.clone()
    sizes = kernel.losses(again, place, asked, lists, vars(chosen), gradient=True, measure=measure, factor=factor)
    assert sizes is not None
    same(again, ours)
    torch.testing.assert_close(sizes[0], quantise_in_torch(again, factor).scale, rtol=1e-6, atol=0.0)
    assert torch.equal(sizes[1], again.float().abs().amax(1))
    unchanged = z.clone()
    kernel.losses(unchanged, place, asked, lists, vars(chosen), gradient=False, measure=measure)
    assert torch.equal(unchanged, z)
