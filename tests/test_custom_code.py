"""Whose classes run a target: Transformers' own where it has them, also beside published code that no longer imports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from torchspec.custom_code import needs_custom_model
from torchspec.engines.transformers.engine import load_model
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
OLD = "from transformers.utils.import_utils import is_torch_fx_available\n"  # of Transformers 4
OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write(folder: Path, *, code: str, **described: Any) -> Target:
    """A folder with a configuration and code, and no weights."""
    folder.mkdir(exist_ok=True)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**SIZES, "auto_map": auto_map, **described}))
    (folder / "own.py").write_text(code)
    return Target(TargetConfig(str(folder), trust_remote_code=True))


@pytest.mark.parametrize(
    ("kind", "named", "native"),
    [
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("minimax_m2", "MiniMaxM2ForCausalLM", "MiniMaxM2ForCausalLM"),
        ("kimi_k2", "DeepseekV3ForCausalLM", "DeepseekV3ForCausalLM"),
        ("kimi_k25", "KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    ],
)
def test_native_classes_come_before_code_that_does_not_import(tmp_path: Path, kind: str, named: str, native: str) -> None:
    target = write(tmp_path / "target", code=OLD, model_type=kind, architectures=[named])

    assert not target.custom_model
    assert type(target.full_hf_config).__module__.startswith("transformers.")
    assert target.model_files["trust_remote_code"] is False
    assert target.auto_class()._model_mapping[type(target.full_hf_config)].__name__ == native


def test_code_runs_for_a_model_type_that_transformers_lacks(tmp_path: Path) -> None:
    import transformers

    target = write(tmp_path / "target", code=OWN, model_type="own_llama", architectures=["OwnForCausalLM"])
    config = target.full_hf_config

    assert target.custom_model and type(config).__name__ == "OwnConfig"
    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(tmp_path / "weights")
    for file in (tmp_path / "weights").glob("*.safetensors"):
        file.rename(tmp_path / "target" / file.name)
    model = load_model(target.config, device="cpu", attn_implementation="eager")
    assert type(model).__name__ == "OwnForCausalLM"


def test_another_model_under_a_known_type_needs_its_code(tmp_path: Path) -> None:
    """Transformers' Llama would take the weights, and compute something else."""
    described = {"model_type": "llama", "architectures": ["WiderLlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}

    assert needs_custom_model(described)
    assert not needs_custom_model({**described, "architectures": ["LlamaForCausalLM"]})
    assert not needs_custom_model({**described, "auto_map": {}})
    target = write(tmp_path / "target", code=OWN, **{**described, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}})
    with pytest.raises(UserError, match=r"is WiderLlamaForCausalLM of type llama, which Transformers .* does not have.*set trust_remote_code to true"):
        Target(TargetConfig(target.config.path)).full_hf_config  # noqa: B018


@pytest.mark.parametrize("code", [OLD, "import a_package_that_nobody_has\n", "raise RuntimeError('of its own')\n"])
def test_code_that_does_not_run_is_one_line(tmp_path: Path, code: str) -> None:
    target = write(tmp_path / "target", code=code, model_type="own_llama", architectures=["OwnForCausalLM"])

    with pytest.raises(UserError, match="code of its own for its configuration that does not run with Transformers") as caught:
        target.full_hf_config  # noqa: B018
    assert "\n" not in str(caught.value)


def test_code_that_may_not_run_is_said(tmp_path: Path) -> None:
    target = write(tmp_path / "target", code=OWN, model_type="own_llama", architectures=["OwnForCausalLM"])

    with pytest.raises(UserError, match="of type own_llama, which Transformers .* does not have"):
        Target(TargetConfig(target.config.path)).full_hf_config  # noqa: B018


def test_vllm_runs_no_code_where_classes_are_native(tmp_path: Path) -> None:
    from torchspec.engines.engine import EngineConfig
    from torchspec.engines.vllm.options import model_arguments, serve_command

    native = write(tmp_path / "native", code=OLD, model_type="minimax_m2", architectures=["MiniMaxM2ForCausalLM"])
    own = write(tmp_path / "own", code=OWN, model_type="own_llama", architectures=["OwnForCausalLM"])

    for target, expected in ((native, False), (own, True)):
        assert ("--trust-remote-code" in serve_command(target, (1, 2))) is expected
        assert model_arguments(target, EngineConfig(), max_length=64, device="cpu")["trust_remote_code"] is expected
    (tmp_path / "native" / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}))
    assert "--trust-remote-code" in serve_command(native, (1, 2))  # that server has a tokenizer


def test_everything_loads_a_target_through_one_place() -> None:
    """Who asks Transformers' auto classes by itself decides by itself whose code runs."""
    package = Path(__file__).parents[1] / "torchspec"
    asks = re.compile(r"Auto(Config|Tokenizer|Processor|ModelFor\w+|Model)\.from_pretrained|auto_class\(\)\.from_pretrained")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if asks.search(file.read_text())}
    assert found == {"custom_code.py", "tokenizer.py", "engines/transformers/load.py"}
