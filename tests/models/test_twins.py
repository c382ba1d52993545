"""Twins of big targets: head, norm and embedding are the stored ones; quantised weights mean what they should; a tensor
less is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.twins import QUANTISED, TWINS, L, Twin, drop, make, stored
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.engines.transformers.load import load_model
from torchspec.errors import UserError
from torchspec.models.target_head import TargetHead, is_tied, read_embedding
from torchspec.target import Target, TargetConfig

LOST = {
    "gemma4": "model.language_model.layers.3.mlp.up_proj.weight",
    "gpt_oss": "model.layers.3.mlp.experts.down_proj_scales",
    "kimi_k25": "language_model.model.layers.3.mlp.experts.1.up_proj.weight_packed",
    "llama4": "language_model.model.layers.3.self_attn.q_proj.weight",
    "nemotron_h": "backbone.layers.3.mixer.q_proj.weight",
    "qwen3_5": "model.language_model.layers.3.self_attn.q_proj.weight",
}
"""A stored tensor of a text model; elsewhere the norm before block 3's MLP."""


@pytest.fixture(scope="module", params=list(TWINS))
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("twins") / request.param
    quantised = request.param in QUANTISED
    return request.param, make(request.param, folder, dequantised=folder.with_name("copy") if quantised else None)


def _norm_of(twin: Twin) -> str:
    return f"{twin.names[1].removesuffix('norm.weight')}layers.3.post_attention_layernorm.weight"


def last(folder: Path) -> torch.Tensor:
    """[1, T, (L + 1) states of D] of a twin in fp32, in which no router flips by rounding."""
    model = load_model(TargetConfig(str(folder), dtype="float32"), device="cpu")
    ids = torch.arange(3, 43)[None]
    states = HiddenStateHooks(model, tuple(range(L + 1)), num_layers=L).run(ids)
    return torch.cat([states[i] for i in range(L + 1)], dim=-1)


def test_head_norm_and_embedding_are_the_stored_ones(twin: tuple[str, Path]) -> None:
    """And in bf16, though 8-bit tensors stand beside them."""
    name, folder = twin
    target = Target(TargetConfig(str(folder)))
    head, table = TargetHead.of(target), read_embedding(target)
    names = TWINS[name].names
    for key, found in zip(names, (table, head.norm_weight, head.weight), strict=True):
        assert isinstance(found, torch.Tensor) and found.dtype == torch.bfloat16
        assert torch.equal(found, load_file(folder / stored(folder)[key])[key]), key
    assert is_tied(target) == (names[0] == names[2])
    assert head.soft_cap == (30.0 if name == "gemma4" else None) and head.scale == 1.0


def test_quantised_weights_give_the_states_of_the_dequantised_copy(twin: tuple[str, Path]) -> None:
    name, folder = twin
    if name not in QUANTISED:
        return
    found, expected = last(folder), last(folder.with_name("copy"))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_text_tensor_less_is_refused(twin: tuple[str, Path], tmp_path: Path) -> None:
    """Transformers would fill it with random numbers; tensors of the tower are not asked for by text."""
    name, folder = twin
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    family = next((known for known in LOST if name.startswith(known)), None)
    drop(broken, LOST[family] if family is not None and LOST[family] in stored(broken) else _norm_of(TWINS[name]))
    with pytest.raises(UserError) as refused:
        load_model(TargetConfig(str(broken)), device="cpu")
    words = str(refused.value)
    assert "\n" not in words and "data.target.path" in words and ("layers.3." in words)
