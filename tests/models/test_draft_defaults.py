"""Numbers of a draft that are not the target's own: of targets without RoPE or with kinds of their own, and of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from torchspec.models.draft_defaults import notes
from torchspec.models.eagle3.config import DraftConfig
from torchspec.target import Target, TargetConfig

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
PHI = {
    "intermediate_size": 128,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


def of(tmp_path: Path, kind: str, **more: Any) -> tuple[DraftConfig, list[str]]:
    getattr(transformers, kind)(**{**SMALL, **more}).save_pretrained(tmp_path)
    target = Target(TargetConfig(str(tmp_path)))
    draft = DraftConfig.from_target(target, aux_layers=(1, 2))
    said = notes(target, rope_parameters=draft.rope_parameters, intermediate_size=draft.intermediate_size)
    return draft, said


@pytest.mark.parametrize(
    ("kind", "more", "width", "told"),
    [
        ("MiniMaxM2Config", {"intermediate_size": 32}, 192, True),
        ("GptOssConfig", {"intermediate_size": 64}, 192, True),
        ("MixtralConfig", {"intermediate_size": 224}, 224, False),
        ("Llama4TextConfig", {"intermediate_size": 32, "intermediate_size_mlp": 256}, 256, True),
        ("DeepseekV3Config", {"intermediate_size": 160, "moe_intermediate_size": 32}, 160, False),
        ("Qwen3MoeConfig", {"intermediate_size": 128, "moe_intermediate_size": 32}, 128, False),
        ("Qwen3_5MoeTextConfig", {"moe_intermediate_size": 32}, 192, True),
        ("Qwen3Config", {"intermediate_size": 32}, 32, False),
    ],
)
def test_an_experts_width_is_not_taken_for_the_drafts_mlp(tmp_path: Path, kind: str, more: dict[str, Any], width: int, told: bool) -> None:
    draft, said = of(tmp_path, kind, **more)
    assert draft.intermediate_size == width
    assert [line for line in said if "expert" in line] == ([line for line in said if f"{width} wide" in line] if told else [])
    assert bool([line for line in said if "expert" in line]) == told


@pytest.mark.parametrize(
    ("kind", "more", "base", "words"),
    [
        ("NemotronHConfig", {"max_position_embeddings": 4096, "layers_block_type": ["mamba", "attention"] * 2}, 1e4, "no RoPE"),
        ("NemotronHConfig", {"max_position_embeddings": 262144, "layers_block_type": ["mamba", "attention"] * 2}, 1e6, "no RoPE"),
        ("Gemma4TextConfig", {"intermediate_size": 96}, 1e6, "proportional"),
        ("Phi3Config", PHI, 1e4, "longrope"),
    ],
)
def test_a_target_whose_rope_no_draft_has_gives_a_servable_one(tmp_path: Path, kind: str, more: dict[str, Any], base: float, words: str) -> None:
    draft, said = of(tmp_path, kind, **more)
    assert draft.rope_parameters == {"rope_type": "default", "rope_theta": base}
    assert [line for line in said if words in line and "model.draft changes it" in line]


def test_nothing_is_said_of_what_the_user_chose(tmp_path: Path) -> None:
    of(tmp_path, "GptOssConfig", intermediate_size=64)
    target = Target(TargetConfig(str(tmp_path)))
    rope = {"rope_type": "default", "rope_theta": 5.0}
    assert notes(target, rope_parameters=rope, intermediate_size=100) == []
