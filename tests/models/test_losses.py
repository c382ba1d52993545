"""Every loss against its textbook formula in fp64: values by the definition, gradients by autograd through plain softmaxes, pruned and full vocabulary."""

from __future__ import annotations

import pytest
import torch

import torchspec.models.loss as loss_module
from tests.models.textbook import NAMES, PRUNED, Setting
from torchspec.errors import UserError
from torchspec.models.losses import LossWeights


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
