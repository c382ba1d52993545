"""Every loss against its textbook formula in fp64: values by the definition, gradients by autograd through plain softmaxes, pruned and full vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torchspec.models.loss as loss_module
from tests.models.packs import PlainNorm
from torchspec.errors import UserError
from torchspec.models.loss import head_loss, target_distribution
from torchspec.models.losses import LossWeights, mixing
from torchspec.models.target_weights import TargetHead

V, D, H = 23, 8, 6
PRUNED = [0, 2, 3, 5, 7, 11, 12, 13, 17, 19, 22]
NAMES = ["forward_kl", "cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda"]
SCALE = [0.5, 0.3]
MEAN_ALPHA = [0.4, 0.2]


def textbook(name: str, z: Tensor, full: Tensor, ids: list[int], mean_alpha: float) -> Tensor:
    """One row: draft logits z over ``ids``, target probabilities ``full`` over the vocabulary."""
    q = torch.softmax(z, 0)
    true = full[ids]
    p = true / true.sum()
    alpha = sum(torch.minimum(true[v], q[v]) for v in range(len(ids)))
    if name == "forward_kl":
        return -(p * q.log()).sum()
    if name == "cross_entropy":
        return -q[ids.index(int(full.argmax()))].log()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    if name == "jsd":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    if name == "tv":
        return 1 - alpha  # type: ignore[no-any-return]
    if name == "lk_alpha":
        return -alpha.log()  # type: ignore[union-attr]
    share = math.exp(-3.0 * mean_alpha)
    return share * textbook("forward_kl", z, full, ids, 0.0) + (1 - share) * textbook("tv", z, full, ids, 0.0)


class Setting:
    def __init__(self, ids: list[int] | None) -> None:
        torch.manual_seed(3)
        kind = torch.float64
        self.ids = ids
        self.head = TargetHead(torch.randn(V, D), None, norm_module=PlainNorm(D), norm_tensors={"weight": 1 + 0.2 * torch.randn(D)}).to(kind)
        self.last = torch.randn(9, D, dtype=kind)
        self.index = (torch.tensor([0, 1, 2, 4, 5, 7, 8]), torch.tensor([0, 1, 4, 7]))
        self.states = [torch.randn(len(i), H, dtype=kind, requires_grad=True) for i in self.index]
        self.norm = (1 + 0.3 * torch.randn(H, dtype=kind)).requires_grad_()
        self.weight = torch.randn(len(ids) if ids else V, H, dtype=kind).requires_grad_()

    def inputs(self) -> list[Tensor]:
        return [*self.states, self.norm, self.weight]

    def expected(self, weights: dict[str, float]) -> tuple[Tensor, list[Tensor], list[float]]:
        ids = self.ids or list(range(V))
        total, sums = torch.zeros((), dtype=torch.float64), []
        for k, (index, state) in enumerate(zip(self.index, self.states, strict=True)):
            summed = torch.zeros((), dtype=torch.float64)
            for row, j in enumerate(index.tolist()):
                full = torch.softmax(self.head.logits(self.last[j + k][None])[0], 0)
                if int(full.argmax()) not in ids:
                    continue
                x = state[row]
                z = self.weight @ (x / torch.sqrt((x * x).mean() + 1e-5) * self.norm)
                summed = summed + sum(w * textbook(name, z, full, ids, MEAN_ALPHA[k]) for name, w in weights.items())
            total = total + SCALE[k] * summed
            sums.append(float(summed.detach()))
        return total, list(torch.autograd.grad(total, self.inputs())), sums

    def found(self, weights: dict[str, float], measure: bool) -> tuple[Tensor, list[Tensor], list[float]]:
        losses = LossWeights.of(weights)
        ids = None if self.ids is None else torch.tensor(self.ids)
        target = target_distribution(self.head, self.last, ids, dtype=torch.float64, mass=measure or losses.needs_alpha)
        result = head_loss(
            self.states, self.norm, self.weight, target, self.index,
            eps=1e-5, scale=torch.tensor(SCALE, dtype=torch.float64), weights=losses, mixing=mixing(torch.tensor(MEAN_ALPHA, dtype=torch.float64)),
            measure=measure,
        )  # fmt: skip
        return result.loss, list(torch.autograd.grad(result.loss * 3.0, self.inputs())), result.loss_sum.tolist()


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
