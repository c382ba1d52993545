"""Every loss against its textbook formula in fp64: values by the definition, gradients by autograd through plain softmaxes, pruned and full vocabulary."""

from __future__ import annotations

import pytest
import torch

import torchspec.models.ops.head_loss as loss_module
from tests.models.textbook import NAMES, PRUNED, Setting
from torchspec.errors import UserError
from torchspec.models.ops.head_loss import target_distribution
from torchspec.models.ops.loss_formulas import LossWeights, RowTargets, row_losses


@pytest.mark.parametrize("ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize(
    "weights",
    [*[{name: 1.0} for name in NAMES], {"forward_kl": 1.0, "tv": 0.5}, {name: 0.3 + 0.1 * i for i, name in enumerate(NAMES)}],
    ids=lambda w: "+".join(w),
)
@pytest.mark.parametrize("rows", [3, 256], ids=["three rows a chunk", "one chunk"])
def test_equals_the_textbook(ids: list[int] | None, weights: dict[str, float], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_chunks", lambda total, *_: [(low, min(low + rows, total)) for low in range(0, total, rows)])
    setting = Setting(ids)
    total, gradients, sums = setting.expected(weights)
    for measure in (False, True):
        value, fast, fast_sums = setting.found(weights, measure)
        assert value.item() == pytest.approx(total.item(), rel=1e-10)
        assert fast_sums == pytest.approx(sums, rel=1e-10)
        for slow, got in zip(gradients, fast, strict=True):
            torch.testing.assert_close(got, 3.0 * slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, {"tv": 1.0}, {name: 0.3 + 0.1 * i for i, name in enumerate(NAMES)}], ids="+".join)
def test_labels_decide_cross_entropy_alone(ids: list[int] | None, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may take the token of the text for right; one without a draft row adds nothing to cross-entropy."""
    monkeypatch.setattr(loss_module, "_chunks", lambda total, *_: [(low, min(low + 3, total)) for low in range(0, total, 3)])
    setting = Setting(ids)
    label = torch.tensor([3, -1, 0, 10, 2, 5, -1, 7, 1, -1, 4])
    total, gradients, sums = setting.expected(weights, label)
    value, fast, fast_sums = setting.found(weights, True, label)
    assert value.item() == pytest.approx(total.item(), rel=1e-10) and fast_sums == pytest.approx(sums, rel=1e-10)
    for slow, got in zip(gradients, fast, strict=True):
        torch.testing.assert_close(got, 3.0 * slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_values_where_p_is_rounded(name: str) -> None:
    """In bf16 the likeliest token of a sure target is rounded so far that p does not add up to 1: the gradient has to be that of the value all the same."""
    generator = torch.Generator().manual_seed(0)
    sure = 4.0 * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    sure[:, 3] += 12.0
    p = sure.softmax(-1).bfloat16().double()
    whole, best = p.sum(-1), p.argmax(-1)
    assert float((whole - 1).abs().max()) > 1e-3
    mass, lam, one = 0.8 / whole, torch.full((6,), 0.3, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    target = RowTargets(p, whole, best, one.bool(), mass, one, lam)
    z = (sure + torch.randn(6, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    q = z.softmax(-1)
    alpha, m = torch.minimum(p * mass[:, None], q).sum(-1), (p + q) / 2
    soft = -(p * q.log()).sum(-1)
    by_definition = {
        "forward_kl": soft, "cross_entropy": -q[torch.arange(6), best].log(), "reverse_kl": (q * (q / p).log()).sum(-1),
        "tv": 1 - alpha, "lk_alpha": -alpha.log(), "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "lk_lambda": lam * soft + (1 - lam) * (1 - alpha),
    }[name]  # fmt: skip
    for weights in ({name: 1.0}, {"cross_entropy": 1e-300, name: 1.0}):  # alone, and by the way that serves sums of losses
        found = row_losses(z.detach().clone(), target, LossWeights.of(weights), gradient=True, measure=False)
        assert found.gradient is not None
        torch.testing.assert_close(found.loss, by_definition.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.gradient, torch.autograd.grad(by_definition.sum(), z, retain_graph=True)[0], rtol=1e-7, atol=1e-10)


def test_a_rounded_distribution_is_kept_with_its_sum() -> None:
    setting = Setting(PRUNED)
    setting.head.float().weight.mul_(2.0)
    setting.head.bfloat16()
    last = setting.last.bfloat16()
    found = target_distribution(setting.head, last, dtype=torch.bfloat16, mass=True)
    assert found.p.dtype == torch.bfloat16 and torch.equal(found.whole, found.p.float().sum(-1)) and found.mass is not None
    assert float((found.whole - 1).abs().max()) > 1e-3
    inside = setting.head.logits(last).double().softmax(-1)[:, PRUNED].sum(-1)
    torch.testing.assert_close((found.p.double() * found.mass.double()[:, None]).sum(-1), inside, rtol=1e-6, atol=0.0)


def test_probabilities_are_never_kept_in_fp16() -> None:
    """Those below 6e-8 would be 0 there, and their logarithm anything."""
    setting = Setting(PRUNED)
    setting.head.float().weight.mul_(4.0)
    found = target_distribution(setting.head, setting.last.float(), dtype=torch.float16, mass=True)
    assert found.p.dtype == torch.float32 and 0 < float(found.p.min()) < 1e-8 and found.mass is not None
    full = setting.head.logits(setting.last.float()).double().softmax(-1)[:, PRUNED]
    torch.testing.assert_close(found.p.double() * found.mass.double()[:, None], full, rtol=1e-4, atol=0.0)


def test_pruning_leaves_rows_out() -> None:
    """The pruned setting above has positions of both kinds; without them its rule would not be tested."""
    setting = Setting(PRUNED)
    best = setting.head.logits(setting.last).argmax(-1)
    inside = [int(b) in PRUNED for b in best]
    assert any(inside) and not all(inside)


def test_tv_is_half_the_absolute_difference_when_unpruned() -> None:
    setting = Setting(None)
    _, _, sums = setting.found({"tv": 1.0}, False)
    with torch.no_grad():
        x = setting.states[0]
        q = torch.softmax((x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * setting.norm) @ setting.weight.t(), -1)
        p = torch.softmax(setting.head.logits(setting.last[setting.index[0]]), -1)
    assert sums[0] == pytest.approx(float((p - q).abs().sum() / 2), rel=1e-9)


@pytest.mark.parametrize("given", [{"kl": 1.0}, {"tv": -1.0}, {"tv": 0.0}, {}, {"jsd": float("nan")}])
def test_refuses(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"model\.loss"):
        LossWeights.of(given)
