"""Where a fresh draft begins (``model.init``): from the target's tensors where the shapes are its own, from noise elsewhere."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from tests.models.differences import PRUNED
from tests.models.exports import save_plain_target
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.family import Build
from torchspec.models.target_head import TargetHead
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def build(target: Target, init: Literal["target", "random"], **changes: Any) -> DraftTask:
    torch.manual_seed(3)
    config = DraftConfig.from_target(target, aux_layers=(1, 2, 3), draft_vocab_size=len(PRUNED), **changes)
    vocabulary = VocabularyMapping(torch.tensor(PRUNED), target.vocab_size)
    how = Build(target, vocabulary, torch.float32, torch.device("cpu"), init=init)
    return DraftTask.build(config, how, step_weights=[1.0])


def test_from_the_target(target: Target) -> None:
    """Its head's rows, a flat copy of its norm, and fc that passes the last aux state on."""
    head, noise, made = TargetHead.of(target), build(target, "random").draft, build(target, "target").draft
    assert torch.equal(made.lm_head.weight, head.weight[PRUNED].float())
    norm = head.rms_weight()
    assert norm is not None
    torch.testing.assert_close(made.norm.weight.data, 0.3 * norm.float())
    last = torch.cat([torch.zeros(16, 32), torch.eye(16)], dim=1)
    torch.testing.assert_close(made.fc.weight.data, 0.1 * noise.fc.weight.data + last)
    assert torch.equal(made.layers[0].mlp.up_proj.weight, noise.layers[0].mlp.up_proj.weight)  # type: ignore[operator, union-attr]


def test_other_hidden_sizes_begin_with_noise_either_way(target: Target) -> None:
    ours, noise = (build(target, init, hidden_size=24).draft.state_dict() for init in ("target", "random"))
    assert ours.keys() == noise.keys() and all(torch.equal(ours[name], noise[name]) for name in ours)
