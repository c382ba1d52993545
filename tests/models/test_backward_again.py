"""A second backward over the same graph (``retain_graph=True``): the same gradients once more, or an error, never others."""

from __future__ import annotations

import pytest
import torch

from tests.models import kernel_cases as cases
from tests.models.differences import PRUNED, STEPS, made_for
from tests.models.packs import pack
from torchspec.models import kernels


@pytest.mark.parametrize("variant", ["attention_bias", "three layers, Qwen3, EAGLE-3.1", "MLA, two layers, EAGLE-3.1"])
def test_gradients_double(variant: str) -> None:
    made, conversations = made_for(variant, PRUNED)
    loss = made(pack(made.draft.config, conversations, STEPS)).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in made.draft.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in made.draft.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=1e-14, msg=name)


def test_the_fused_loss_says_that_it_goes_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    made, conversations = made_for("plain", PRUNED)
    made.draft.compute_dtype = torch.float32
    made.float().to(cases.DEVICE)
    monkeypatch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
    loss = made(pack(made.draft.config, conversations, STEPS, dtype=torch.float32).to(cases.DEVICE)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()
