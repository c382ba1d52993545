"""8-bit rows and products: in plain torch on a CPU (the twins of the kernels), and by the kernels on a GPU that has such products."""

from __future__ import annotations

import pytest
import torch

from tests.models.packs import PlainNorm, draft_config, task
from torchspec.errors import UserError
from torchspec.models.ops import fp8
from torchspec.models.ops.shared_rows import Addend, Residual, SharedRows, linear
from torchspec.models.ops.shared_weight import Weight
from torchspec.models.target_head import TargetHead

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICE = torch.device("cuda" if HOPPER else "cpu")


@pytest.mark.parametrize("factor", [False, True])
def test_rows_are_rounded_by_half_a_step_and_use_their_range(factor: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator) * 10.0 ** torch.arange(-2, 3)[:, None]
    x[2] = 0.0
    by = torch.randn(48, generator=generator) if factor else None
    rounded = fp8.quantise(x, by)
    y, scale = rounded.data, rounded.scale
    assert torch.equal(rounded.top, x.abs().amax(1))
    exact = x.double() if by is None else x.double() * by.double()
    assert y.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    step = exact.abs() / 16 + scale.double() / 512  # half a step of three mantissa bits, or of the smallest number
    assert ((y.double() * scale.double() - exact).abs() <= step * 1.01).all()
    assert y.float().abs().amax(dim=1).tolist() == [448.0, 448.0, 0.0, 448.0, 448.0]


@pytest.mark.parametrize("d_y_is_wide", [True, False])
def test_rows_too_faint_for_a_scale_count_as_zeros(d_y_is_wide: bool) -> None:
    """Such gradients come where attention hardly looks at a token; their scales, or one over them, would not be finite."""
    generator = torch.Generator().manual_seed(0)
    x, zeros = (torch.randn(16, 48, generator=generator).to(DEVICE) for _ in range(2))
    x[1], x[2], x[5] = 1e-40, x[2] * 1e-33, 1e-44
    zeros.copy_(x)[[1, 2, 5]] = 0.0
    by = torch.full((48,), 1e-5, device=DEVICE)
    for factor in (None, by):
        ours, exact = fp8.quantise(x, factor), fp8.quantise(zeros, factor)
        assert torch.isfinite(ours.data.float()).all() and torch.equal(ours.data.float(), exact.data.float()) and torch.equal(ours.scale, exact.scale)
    found = []
    for rows in (x, zeros):
        gradient = fp8.Fp8Gradient(d_y_is_wide=d_y_is_wide)
        other = rows.flip(0)[:, :32].contiguous()
        wide, slim = (rows, other) if d_y_is_wide else (other, rows)
        gradient.add(wide, slim, wide.abs().amax(1), slim.abs().amax(1))
        found.append(gradient.collect())
    assert found[0] is not None and found[1] is not None
    assert torch.isfinite(found[0]).all() and torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float16])
def test_the_rest_of_the_targets_logits_in_8_bits(kind: torch.dtype) -> None:
    """Near the exact ones, as many as there are, and no other token is the likelier one but where two are nearly equal; their mass is about right."""
    made = task(draft_config(target_hidden_size=64, vocab_size=77).with_draft_vocabulary(32), draft_ids=list(range(3, 35)), step_weights=[1.0])
    made.head.to(DEVICE, kind)
    normed = made.head.normed(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    kept, exact = made.head.parts(normed)
    same, rounded = made.head.parts(normed, rounded=True)
    assert exact is not None and rounded is not None and exact.shape == rounded.shape == (400, 45)
    torch.testing.assert_close(same, kept)
    error = float((rounded - exact).float().norm() / exact.float().norm())
    assert 0.001 < error < 0.05
    margin, other = ((kept.amax(-1) - rest.amax(-1)).float() for rest in (exact, rounded))
    masses = [torch.sigmoid(kept.float().logsumexp(-1) - rest.float().logsumexp(-1)) for rest in (exact, rounded)]
    assert float((masses[0] - masses[1]).abs().max()) < 0.2 and float((masses[0] - masses[1]).abs().mean()) < 0.02
    near = margin.abs() < 0.1 * exact.float().abs().amax()
    assert torch.equal((margin >= 0)[~near], (other >= 0)[~near]) and 0 < int(near.sum()) < 200
    with torch.no_grad():
        made.head.weight.neg_()
    moved = made.head.to(torch.float64).to(kind).parts(normed, rounded=True)[1]
    torch.testing.assert_close(moved, -rounded, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("more", [{"scale": 0.25}, {"soft_cap": 5.0}, {"scale": 3.0, "soft_cap": 5.0}], ids=str)
def test_logits_in_8_bits_are_biased_scaled_and_capped(more: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(77, 64, generator=generator) / 4, 3.0 * torch.randn(77, generator=generator)
    head = TargetHead(weight, bias, norm_module=PlainNorm(64), norm_tensors={"weight": torch.ones(64)}, **more).to(DEVICE, torch.bfloat16)
    head.put_first(torch.arange(3, 35, device=DEVICE))
    normed = head.normed(torch.randn(50, 64, generator=generator).to(DEVICE))
    exact, rounded = head.parts(normed)[1], head.parts(normed, rounded=True)[1]
    assert exact is not None and rounded is not None and rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(("out", "into"), [(48, 16), (16, 48)], ids=["d_y wider", "x wider"])
@pytest.mark.parametrize("bound", [2**30, 48 * 48], ids=["one product", "several"])
def test_weight_gradient_of_many_calls(out: int, into: int, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of very different size, rows of zeros, calls without rows; twice, as after ``retain_graph``."""
    monkeypatch.setattr(fp8, "_BYTES", bound)
    generator = torch.Generator().manual_seed(0)
    gradient = fp8.Fp8Gradient(d_y_is_wide=out > into)
    assert gradient.collect() is None
    calls = [0, 7, 0, 40, 16, 1]
    for rows in calls[:-1]:  # the last one comes unannounced
        gradient.expect(rows)
    for _ in range(2):
        exact, size = torch.zeros(out, into, dtype=torch.float64), torch.zeros(out, into, dtype=torch.float64)
        for rows in calls:
            d_y = torch.randn(rows, out, generator=generator) * 1e-6 * 10.0 ** (3 * torch.rand(rows, 1, generator=generator))
            x = torch.randn(rows, into, generator=generator) * 10.0 ** (2 * torch.rand(rows, 1, generator=generator))
            d_y[::5], x[1::7] = 0.0, 0.0
            gradient.add(d_y.to(DEVICE), x.to(DEVICE), *((t.abs().amax(1) if rows else t.new_empty(0)).to(DEVICE) for t in (d_y, x)))
            exact += d_y.double().t() @ x.double()
            size += d_y.double().abs().t() @ x.double().abs()
        found = gradient.collect()
        assert found is not None and found.dtype == torch.float32 and found.shape == (out, into)
        found = found.cpu()
        assert ((found.double() - exact).abs() <= size * 0.2 + 1e-5 * size.max()).all()  # half a step: 1/16 of the one operand, 1/8 of the other
        assert float((found.double() - exact).norm() / exact.norm()) < 0.07
        assert gradient.collect() is None


@pytest.mark.parametrize("rows", [slice(None), slice(0, 32), slice(32, None)], ids=["all rows", "first", "last"])
def test_linear_with_a_rectangle_in_8_bits(rows: slice) -> None:
    """A column part of a stacked weight, by rows or whole, with shared rows or a residual added: near the product with the weight itself."""
    generator = torch.Generator().manual_seed(0)
    columns, found = slice(16, None), []
    full = torch.randn(48, 48, generator=generator) * torch.rand(48, 1, generator=generator)
    x, shared = torch.randn(9, 32, generator=generator), torch.randn(12, 48, generator=generator)[:, rows]
    grad, place = torch.randn(9, shared.shape[1], generator=generator).to(DEVICE), torch.randperm(12, generator=generator)[:9].to(DEVICE)
    for narrow in (False, True):
        for extra in ("addend", "residual", "nothing"):
            leaves = [t.clone().to(DEVICE).requires_grad_() for t in (full, x, shared)]
            weight = Weight.of([leaves[0][:32], leaves[0][32:]], torch.float32)
            if narrow:
                weight.store.round_columns(columns, gradient=False)
            addends = [Addend(SharedRows.of(leaves[2]), place)] if extra == "addend" else []
            residual = Residual(leaves[2][place]) if extra == "residual" else None
            y = linear(leaves[1], weight.part(rows=rows, columns=columns), residual=residual, addends=addends)
            y.backward(grad)
            found.append((y.detach(), *[leaf.grad for leaf in leaves]))
    for exact, rounded in zip(found[:3], found[3:], strict=True):
        errors = [0.0 if a is None or b is None else float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
        assert 1e-3 < errors[0] < 0.04 and errors[1] < 1e-6 and 1e-3 < errors[2] < 0.04 and errors[3] < 1e-6, errors


@pytest.mark.parametrize("out", [48, 32, 16], ids=["d_y wider", "as wide", "x wider"])
def test_weight_gradient_of_rounded_columns(out: int) -> None:
    """Summed over calls with all rows in 8 bits; what some of the rows and the other columns add stays exact. Twice, as after ``retain_graph``."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(out, 48, generator=generator).to(DEVICE).requires_grad_()
    calls = [(slice(None), slice(16, None)), (slice(None), slice(16, None)), (slice(0, 16), slice(16, None)), (slice(None), slice(0, 16))]
    weight, exact, total = Weight.of([full], torch.float32), torch.zeros(2, out, 48, dtype=torch.float64), torch.zeros((), device=DEVICE)
    weight.store.round_columns(slice(16, None), gradient=True)
    for number, (rows, columns) in enumerate(calls):
        x, grad = torch.randn(9 + number, 32 if columns.start else 16, generator=generator), torch.randn(9 + number, full[rows].shape[0], generator=generator)
        exact[int(number > 1), rows, columns] += grad.double().t() @ x.double()
        total = total + (linear(x.to(DEVICE), weight.part(rows=rows, columns=columns)) * grad.to(DEVICE)).sum()
    for times in (1, 2):
        total.backward(retain_graph=True)
        assert full.grad is not None
        error = full.grad.cpu().double() / times - exact.sum(0)
        assert float(error[:, :16].norm() / exact[1, :, :16].norm()) < 1e-6
        assert 1e-3 < float(error[:, 16:].norm() / exact[0, :, 16:].norm()) < 0.07


@pytest.mark.parametrize(("out", "into"), [(64, 96), (96, 64), *([(4096, 4096), (4096, 12288), (6144, 4096), (24576, 4096)] if HOPPER else [])])
def test_input_gradient_errs_no_more_than_the_forward_may(out: int, into: int) -> None:
    """Both products against the exact one of the rounded operands: of signs that cancel, and of one sign, whose sums lose most in short registers.

    What is bounded is what the product adds to the rounding: its sums, and half a step of bf16."""
    generator = torch.Generator().manual_seed(0)
    for positive in (False, True):
        weight, x, d_y = (torch.randn(*size, generator=generator) for size in ((out, into), (256, into), (256, out)))
        weight, x, d_y = (t.abs() if positive else t for t in (weight.to(DEVICE), x.to(DEVICE), d_y.to(DEVICE)))
        narrow = fp8.Fp8Weight(fp8.quantise(weight))
        rounded, back = fp8.quantise(x), fp8.quantise(d_y, narrow.factor)
        pairs = [
            (narrow.forward(rounded, torch.bfloat16), rounded.data.double() * rounded.scale.double(), (narrow.data.double() * narrow.scale.double()).t()),
            (narrow.backward(back, torch.bfloat16), back.data.double() * back.scale.double(), narrow.data.double()),
        ]
        forward, backward = (float((ours.double() - left @ right).norm() / (left @ right).norm()) for ours, left, right in pairs)
        assert backward < 1.5 * forward + 2.0**-9, (forward, backward)
        assert positive or max(forward, backward) < 0.03, (forward, backward)


def test_calls_without_rows_need_no_room() -> None:
    gradient = fp8.Fp8Gradient(d_y_is_wide=True)
    nothing, ones = (
        [torch.empty(*size, device=DEVICE) for size in ((0, 32), (0, 16), (0,), (0,))],
        [torch.ones(*size, device=DEVICE) for size in ((2, 32), (2, 16), (2,), (2,))],
    )
    gradient.add(*nothing)
    gradient.add(*ones)
    found = gradient.collect()
    assert found is not None and torch.allclose(found.cpu(), torch.full((32, 16), 2.0))
    gradient.add(*nothing)
    assert gradient.collect() is None


def test_gradients_that_are_no_numbers_are_seen() -> None:
    for wide_is_bad in (False, True):
        gradient = fp8.Fp8Gradient(d_y_is_wide=True)
        d_y, x = torch.ones(16, 32, device=DEVICE), torch.ones(16, 16, device=DEVICE)
        (d_y if wide_is_bad else x)[3, 5] = float("nan")
        gradient.add(d_y, x, d_y.abs().amax(1), x.abs().amax(1))
        found = gradient.collect()
        assert found is not None and torch.isnan(found).any()


@pytest.mark.skipif(not HOPPER, reason="needs a GPU with 8-bit products")
@pytest.mark.parametrize(("out", "into"), [(24576, 4096), (4096, 12288), (32000, 4096)])
def test_weight_gradient_at_a_real_size(out: int, into: int) -> None:
    generator, exact = torch.Generator(DEVICE).manual_seed(0), torch.zeros(out, into, device=DEVICE)
    gradient = fp8.Fp8Gradient(d_y_is_wide=out > into)
    for rows in (4032, 1001, 17):
        gradient.expect(rows)
    for rows in (4032, 1001, 17):
        d_y = (torch.randn(rows, out, generator=generator, device=DEVICE) * 1e-6).bfloat16()
        x = torch.randn(rows, into, generator=generator, device=DEVICE).bfloat16()
        gradient.add(d_y, x, fp8.quantise(d_y).top, fp8.quantise(x).top)
        exact += torch.mm(d_y.t(), x, out_dtype=torch.float32)
    found = gradient.collect()
    assert found is not None and float((found - exact).norm() / exact.norm()) < 0.07


def test_levels() -> None:
    assert [fp8.Fp8.of(name) for name in ("bf16", "fp8", "fp8_all")] == [fp8.Fp8.NONE, fp8.Fp8.ROWS, fp8.Fp8.ALL]


@pytest.mark.parametrize(("field", "size"), [("hidden_size", 24), ("intermediate_size", 40), ("draft_vocab_size", 31)])
def test_sizes_that_the_products_do_not_take_are_refused(field: str, size: int) -> None:
    fine = {"hidden_size": 32, "intermediate_size": 64, "draft_vocab_size": 32}
    with pytest.raises(UserError, match=rf"model\.matmul='?fp8.*draft\.{field} is {size}"):
        fp8.check(torch.device("cuda"), fp8.Fp8.ROWS, {**fine, field: size})
    with pytest.raises(UserError, match="fp8_all.*needs a GPU"):
        fp8.check(torch.device("cpu"), fp8.Fp8.ALL, fine)
