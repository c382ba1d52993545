"""A target that Transformers would load in part, in another shape or with other numbers is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.quantised import FP8, fp8
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.engines.transformers.load import load_model
from torchspec.errors import UserError
from torchspec.target import TargetConfig

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}


def saved(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """A tiny Llama in one file; returns its tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 96, "tie_word_embeddings": False, **more})).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        load_model(TargetConfig(str(folder)), device="cpu", **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_missing_tensors_are_named_not_random(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    rewrite(tmp_path, {name: value for name, value in tensors.items() if "layers.1." not in name})
    assert "lacks 9 tensors of the text model (model.layers.1." in refusal(tmp_path)


def test_a_tensor_of_another_shape_is_named_not_random(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    rewrite(tmp_path, {**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(80, 64)})
    assert "in another shape (model.layers.1.mlp.up_proj.weight of [80, 64] for [96, 64])" in refusal(tmp_path)


def test_a_failed_conversion_names_its_tensors(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4, tie_word_embeddings=False)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = next(name for name in tensors if "layers.1." in name and ".experts.2." in name and name.endswith("w1.weight"))
    rewrite(tmp_path, {**tensors, expert: torch.zeros(80, 64)})
    words = refusal(tmp_path)
    assert "cannot be converted" in words and "layers.1." in words


def test_parts_that_see_images_may_be_missing_only_where_there_are_none(tmp_path: Path) -> None:
    import transformers as t

    text = {**SIZES, "model_type": "llama", "intermediate_size": 96, "tie_word_embeddings": False}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = t.LlavaConfig(text_config=text, vision_config={**vision, "model_type": "clip_vision_model"}, image_token_index=5)
    t.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {name: value for name, value in tensors.items() if "vision_tower" not in name})
    load_model(TargetConfig(str(tmp_path)), device="cpu")
    assert "tensors of the model (" in refusal(tmp_path, images=True)


def test_blocks_of_8_bits_are_those_of_the_configuration(tmp_path: Path) -> None:
    """192 rows in blocks of 128 have two scales: one for 128 rows and one for 64, not one for 96 each."""
    tensors = saved(tmp_path, intermediate_size=192)
    meant = dict(tensors)
    for name in [name for name in tensors if "mlp" in name]:
        tensors[name][128:] *= 50  # blocks that differ
        pack = fp8(name, tensors.pop(name))
        tensors |= pack.stored
        meant[name] = pack.meant
    rewrite(tmp_path, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    loaded = load_model(TargetConfig(str(tmp_path), dtype="float32"), device="cpu")
    for name, value in meant.items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)


def test_a_norm_that_also_runs_before_the_blocks_is_read_behind_them() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.norm = nn.RMSNorm(4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            state = self.norm(input_ids[..., None].float().expand(-1, -1, 4))
            for layer in self.layers:
                state = layer(state)
            self.seen = state
            return self.norm(state)

    model = Decoder()
    states = HiddenStateHooks(model, (2,), num_layers=2).run(torch.ones(1, 3, dtype=torch.int64))
    assert torch.equal(states[2], model.seen)
