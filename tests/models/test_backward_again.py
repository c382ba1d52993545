"""A second backward over the same graph (``retain_graph=True``) gives the same gradients once more. The fused loss refuses it: ``kernel_grid.py``."""

from __future__ import annotations

import pytest
import torch

from tests.models.differences import PRUNED, STEPS, made_for
from tests.models.packs import pack


@pytest.mark.parametrize("variant", ["attention_bias", "three layers, Qwen3, EAGLE-3.1", "MLA, two layers, EAGLE-3.1"])
def test_gradients_double(variant: str) -> None:
    made, conversations = made_for(variant, PRUNED)
    loss = made(pack(made.draft.config, conversations, STEPS)).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in made.draft.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in made.draft.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=1e-14, msg=name)
