"""Block drafts written and read back in every format, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.exports import LAYERS, save_plain_target
from torchspec.errors import UserError
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.formats import describe, written
from torchspec.models.blocks.importing import kind_of, read_draft, spread_layers
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.family import Draft
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target

KEPT = torch.arange(0, 40, 2)
SIZES: dict[str, Any] = {"num_layers": 2, "block_size": 4, "mask_token_id": 39}
OF_KIND: dict[str, dict[str, Any]] = {
    "dflash": {}, "dspark": {"markov_rank": 4}, "dflash2": {"conv_group": 4, "selector_rank": 4, "selector_candidates": 3}
}  # fmt: skip
CASES: list[tuple[dict[str, Any], bool, str]] = [
    ({"kind": "dflash"}, False, "vllm"),
    ({"kind": "dflash", "causal": True, "attention_bias": True}, True, "vllm"),
    ({"kind": "dflash", "sliding_window": 5, "learned_mask": True, "logit_scale": 0.5}, False, "vllm"),
    ({"kind": "dflash", "sliding_window": 5, "causal": True}, True, "speculators"),
    ({"kind": "dflash"}, False, "sglang"),
    ({"kind": "dspark"}, True, "vllm"),
    ({"kind": "dspark", "confidence": False}, False, "speculators"),
    ({"kind": "dspark"}, False, "sglang"),
    ({"kind": "dflash2", "conv_taps": 3}, False, "vllm"),
    ({"kind": "dflash2"}, False, "speculators"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def made(target: Target, changes: dict[str, Any], pruned: bool = False) -> tuple[BlockConfig, dict[str, Tensor]]:
    config = BlockConfig.from_target(target, aux_layers=(1, 4, LAYERS - 1), **{**SIZES, **OF_KIND[changes["kind"]], **changes})
    config = config.with_draft_vocabulary(len(KEPT)) if pruned else config
    torch.manual_seed(0)
    draft = BlockDraft(config)
    draft.set_embedding(read_embedding(target))
    draft.initialise()
    weights = {name: parameter.detach() + torch.randn_like(parameter) for name, parameter in draft.named_parameters()}
    vocabulary = VocabularyMapping(KEPT, config.vocab_size) if pruned else None
    tensors = written(Draft(config, weights, vocabulary), target, dtype=torch.float32)
    return config, {**tensors, **{name: tensor for name, tensor in weights.items() if name == "mask_embedding"}}


@pytest.mark.parametrize(("changes", "pruned", "form"), CASES)
def test_read_back_as_it_was_written(changes: dict[str, Any], pruned: bool, form: Any, target: Target) -> None:
    config, tensors = made(target, changes, pruned)
    described = describe(config, target, form=form, dtype=torch.float32)
    assert kind_of(described) == config.kind
    assert described.get("model_type") == (None if form == "speculators" else "qwen3")
    again = read_draft(described, dict(tensors), target, where="draft")
    assert again.config == config
    assert (again.vocabulary is None) is not pruned
    assert again.vocabulary is None or torch.equal(again.vocabulary.draft_ids, KEPT)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again.weights.items())
    assert again.weights.keys() == tensors.keys() - {"lm_head.weight", "d2t", "t2d"}


@pytest.mark.parametrize(
    ("changes", "pruned", "form", "named"),
    [
        ({"kind": "dflash", "causal": True}, False, "speculators", "causal blocks without a window"),
        ({"kind": "dflash", "learned_mask": True}, False, "speculators", "a learned mask"),
        ({"kind": "dflash", "logit_scale": 0.5}, False, "speculators", "a logit scale"),
        ({"kind": "dflash"}, True, "sglang", "a pruned vocabulary"),
        ({"kind": "dflash", "learned_mask": True}, False, "sglang", "a learned mask"),
        ({"kind": "dflash"}, False, "trtllm", "is not one of"),
    ],
)
def test_what_a_format_cannot_say_is_refused(changes: dict[str, Any], pruned: bool, form: Any, named: str, target: Target) -> None:
    config, _ = made(target, changes, pruned)
    with pytest.raises(UserError, match=named):
        describe(config, target, form=form, dtype=torch.float32)


def test_sglang_never_sees_the_last_layers_output(target: Target) -> None:
    for layers, named in (((1, LAYERS), f"aux layer {LAYERS}"), ((0, 1), "aux layer 0")):
        config = BlockConfig.from_target(target, kind="dflash", aux_layers=layers, **SIZES)
        with pytest.raises(UserError, match=named):
            describe(config, target, form="sglang", dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sample_from_anchor": True}, "predicts at its anchor"),
        ({"attention_sink_bias": True}, "attention_sink_bias"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "with and without a window"),
        ({"block_size": None}, "block_size"),
        ({"vocab_size": 41}, "vocab_size 41"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "is of architecture"),
    ],
)
def test_a_published_draft_that_we_would_train_as_another_is_refused(change: dict[str, Any], named: str, target: Target) -> None:
    config, tensors = made(target, {"kind": "dflash"})
    described = describe(config, target, form="vllm", dtype=torch.float32)
    with pytest.raises(UserError, match=named):
        read_draft({**described, **change}, tensors, target, where="draft")


def test_the_layout_of_dspark_without_its_heads_is_refused(target: Target) -> None:
    config, tensors = made(target, {"kind": "dspark"})
    described = describe(config, target, form="vllm", dtype=torch.float32)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("markov_head")}
    with pytest.raises(UserError, match="no Markov head"):
        read_draft({**described, "markov_rank": 0}, tensors, target, where="draft")
    config, tensors = made(target, {"kind": "dspark"})
    described = describe(config, target, form="speculators", dtype=torch.float32)
    del described["sample_from_anchor"]
    with pytest.raises(UserError, match="sample_from_anchor"):
        read_draft(described, tensors, target, where="draft")


def test_published_tables_must_be_the_targets(target: Target) -> None:
    config, tensors = made(target, {"kind": "dflash"})
    described = describe(config, target, form="vllm", dtype=torch.float32)
    table, head = read_embedding(target), TargetHead.of(target).weight
    again = read_draft(described, {**tensors, "embed_tokens.weight": table, "lm_head.weight": head}, target, where="draft")
    assert again.config == config
    with pytest.raises(UserError, match="a head of its own"):
        read_draft(described, {**tensors, "lm_head.weight": head + 1}, target, where="draft")
    with pytest.raises(UserError, match="an embedding of its own"):
        read_draft(described, {**tensors, "embed_tokens.weight": table + (torch.arange(40) < 3)[:, None]}, target, where="draft")
    learned = table.clone()
    learned[39] += 1
    again = read_draft(described, {**tensors, "embed_tokens.weight": learned}, target, where="draft")
    assert again.config.learned_mask and torch.equal(again.weights["mask_embedding"], learned[39])


def test_layers_of_published_drafts_that_name_none(tmp_path: Path) -> None:
    assert spread_layers(save_plain_target(tmp_path / "36", layers=36), 5) == (2, 10, 18, 26, 34)
    assert spread_layers(save_plain_target(tmp_path / "30", layers=30), 5) == (2, 9, 15, 21, 28)
