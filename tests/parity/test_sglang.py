"""SGLang does not run here; what it would compute from our directory does: a reader of its rules (0.5.23), written apart from our importer, fed into the fp64
reference.

The rules: unknown and missing names are skipped without a word, so the set of names must be exactly its own; layers after the first norm their input with
``hidden_norm``; the embedding is the target's; ``hot_token_id`` = d2t + draft id; layer ids are those of ``eagle_config``, counted as outputs of blocks,
[1, L/2 - 1, L - 4] when absent; no q/k norms, no biases, no ``norm_before_residual``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models import reference
from tests.models.differences import PRUNED
from tests.models.exports import LAYERS, export_variant, export_weights, random_draft, save_plain_target
from tests.models.packs import draft_config
from tests.models.variants import VARIANTS
from tests.parity.speculators import STEPS, conversation_for, our_logits
from torchspec.errors import UserError
from torchspec.models.export.export import ExportOptions
from torchspec.models.target_head import read_embedding
from torchspec.target import Target

LAYER = {"post_attention_layernorm", "hidden_norm", *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def aux_layers(described: dict[str, Any]) -> list[int]:
    """In our counting."""
    ids = described.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids") or [1, LAYERS // 2 - 1, LAYERS - 4]
    return [i + 1 for i in ids]


def names_read(described: dict[str, Any]) -> set[str]:
    """Tensors that the server asks for, and those that it knows to leave alone."""
    names = {"fc", "norm", "lm_head", "embed_tokens", "layers.0.input_layernorm"}
    names |= {f"layers.{i}.{name}" for i in range(described["num_hidden_layers"]) for name in LAYER}
    names |= {f"layers.{i}.input_layernorm" for i in range(1, described["num_hidden_layers"])}  # there for vLLM; SGLang leaves it
    names |= {"input_norm"} if described.get("norm_before_fc") else set()
    names |= {f"fc_norm.{i}" for i in range(len(aux_layers(described)))} if described.get("fc_norm") else set()
    return {f"{name}.weight" for name in names} | ({"d2t", "t2d"} if described["draft_vocab_size"] < described["vocab_size"] else set())


def served(folder: Path, given: Any, table: Tensor) -> list[Tensor]:
    """Logits [T, W] of each step as the rules give them; rows without a next token are zero."""
    described = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == names_read(described)
    assert not described["tie_word_embeddings"] and not described["attention_bias"] and "norm_before_residual" not in described
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    for i in range(1, described["num_hidden_layers"]):
        weights[f"layers.{i}.input_layernorm.weight"] = weights[f"layers.{i}.hidden_norm.weight"]
    config: Any = SimpleNamespace(
        rms_norm_eps=described["rms_norm_eps"], target_hidden_size=described["hidden_size"], aux_layers=aux_layers(described),
        num_layers=described["num_hidden_layers"], num_heads=described["num_attention_heads"], num_kv_heads=described["num_key_value_heads"],
        head_dim=described["head_dim"], rope_parameters={**described["rope_parameters"], "rope_theta": described["rope_theta"]}, mla=None, qk_norm=False,
        norm_before_residual=False, norm_before_fc=described.get("norm_before_fc", False), fc_norm=described.get("fc_norm", False),
        norm_output=described.get("norm_output", False),
    )  # fmt: skip
    states = reference.unroll(config, weights, table.double(), given.ids, given.aux.double(), STEPS)
    logits = []
    for step in states:
        rows = [torch.zeros(described["draft_vocab_size"], dtype=torch.float64)] * len(step)
        for t, state in enumerate(step):
            if state is not None:
                rows[t] = weights["lm_head.weight"] @ reference.rms(state, weights["norm.weight"], described["rms_norm_eps"])
        logits.append(torch.stack(rows))
    return logits


@pytest.mark.parametrize("draft_ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_servers_rules_give_our_logits(variant: str, draft_ids: list[int] | None, target: Target, tmp_path: Path) -> None:
    try:
        made = export_variant(variant, target, tmp_path / "draft", form="sglang", draft_ids=draft_ids)
    except UserError as error:
        assert "cannot serve this draft" in str(error)
        return
    given = conversation_for(made)
    for ours, theirs in zip(our_logits(made, given), served(made.folder, given, read_embedding(target)), strict=True):
        torch.testing.assert_close(ours.double(), theirs[: len(ours)], rtol=0, atol=5e-5)  # ours is fp32
    if draft_ids is not None:
        tensors = load_file(made.folder / "model.safetensors")
        assert (tensors["d2t"] + torch.arange(len(PRUNED))).tolist() == PRUNED


def test_default_layer_ids_are_left_to_the_server(target: Target, tmp_path: Path) -> None:
    draft = random_draft(draft_config(aux_layers=(2, LAYERS // 2, LAYERS - 3)), target)
    weights = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    export_weights(draft.config, weights, None, target, tmp_path / "draft", options=ExportOptions(form="sglang"))
    assert aux_layers(json.loads((tmp_path / "draft" / "config.json").read_text())) == [2, LAYERS // 2, LAYERS - 3]
