"""Head, norm and embedding read from model directories of many families, against the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.quantised import FP8, fp8, int4
from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.ops.rope import frequencies
from torchspec.models.ops.rope_parameters import rope_of
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.target import Target, TargetConfig

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma2 (1+w, soft cap)": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}),
    "cohere (LayerNorm, logit scale)": ("CohereConfig", {"logit_scale": 0.25}),
    "granite (logits scaling)": ("GraniteConfig", {"logits_scaling": 3.0}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
}


def build(folder: Path, family: str, **save: Any) -> tuple[Target, Any]:
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return Target(TargetConfig(str(folder), dtype="float32")), model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_equal_the_models_own(family: str, tmp_path: Path) -> None:
    target, model = build(tmp_path, family)
    seen: dict[str, torch.Tensor] = {}
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(last=args[0]))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
    head = TargetHead.of(target)
    assert not list(head.parameters()) and not head.state_dict()
    torch.testing.assert_close(head.logits(seen["last"][0]).float(), logits.float(), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([50, 3, 7])
    others = [i for i in range(logits.shape[1]) if i not in ids.tolist()]
    head.put_first(ids)
    with pytest.raises(RuntimeError, match="sorted already, 3 of them first"):
        head.put_first(ids)
    normed = head.normed(seen["last"][0])
    kept, rest = head.parts(normed)
    assert rest is not None
    torch.testing.assert_close(kept.float(), logits[:, ids].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.float(), logits[:, others].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.logits(seen["last"][0]).float(), logits.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read_embedding(target), model.get_input_embeddings().weight.detach())
    weight = head.rms_weight()
    if "LayerNorm" in family:
        assert weight is None
    else:
        assert weight is not None
        own = model.model.norm.weight.detach()
        torch.testing.assert_close(weight, own + 1.0 if "gemma" in family else own, rtol=1e-4, atol=1e-4)


def test_shards_are_read_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = build(tmp_path, "llama untied", max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read: list[str] = []

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = safe_open(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.handle = self.inner.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.inner.__exit__(*args)

        def keys(self) -> Any:
            return self.handle.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.handle.get_tensor(name)

    monkeypatch.setattr("safetensors.safe_open", Counting)
    head = TargetHead.of(target)
    torch.testing.assert_close(head.weight, model.lm_head.weight.detach())
    assert sorted(read) == ["lm_head.weight", "model.norm.weight"]


def test_missing_weights_name_the_fix(tmp_path: Path) -> None:
    target, _ = build(tmp_path, "llama tied")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="save_pretrained"):
        TargetHead.of(target)


def test_a_checkpoint_in_a_type_that_states_are_not_stored_in_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**SMALL, dtype="float64").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="data.target.dtype='auto' is float64 here.*set bfloat16"):
        Target(TargetConfig(str(tmp_path))).dtype  # noqa: B018 - read for its error
    assert Target(TargetConfig(str(tmp_path), dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.parametrize("base", [5e5, 1e6])
def test_rope_base_is_the_targets_never_a_default(base: float, tmp_path: Path) -> None:
    """A base read with a default trains every draft at 10000."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": base})
    config.save_pretrained(tmp_path)
    draft = DraftConfig.from_target(Target(TargetConfig(str(tmp_path))), aux_layers=(1,))
    assert draft.rope_parameters["rope_theta"] == base
    inverse, _ = frequencies(draft.rope_parameters, size=draft.rotary_dim, max_positions=draft.max_position_embeddings)
    torch.testing.assert_close(inverse, LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda r: str(r["rope_type"]),
)
def test_rope_kinds_equal_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SMALL, max_position_embeddings=1024, rope_parameters={**rope, "rope_theta": 70000.0})
    theirs = LlamaRotaryEmbedding(config)
    draft = DraftConfig(
        hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=96, draft_vocab_size=96, target_hidden_size=32,
        aux_layers=(1,), rope_parameters=rope_of(config), max_position_embeddings=1024,
    )  # fmt: skip
    inverse, factor = frequencies(draft.rope_parameters, size=draft.rotary_dim, max_positions=draft.max_position_embeddings)
    torch.testing.assert_close(inverse, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)


def rewritten(folder: Path, head: dict[str, torch.Tensor], *, quantization: dict[str, Any] | None = None) -> Target:
    """A tiny Llama whose head is stored in another way."""
    import json

    from safetensors.torch import load_file, save_file

    build(folder, "llama untied")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    return Target(TargetConfig(str(folder), dtype="float32"))


@pytest.mark.parametrize("layout", [fp8, int4], ids=["8 bits", "4 bits"])
def test_a_quantised_head_is_its_numbers(layout: Any, tmp_path: Path) -> None:
    """8-bit codes without their scales would be another teacher."""
    pack = layout("lm_head.weight", torch.randn(96, 32))
    target = rewritten(tmp_path, pack.stored, quantization=FP8)
    torch.testing.assert_close(TargetHead.of(target).weight, pack.meant, rtol=1e-2 if layout is int4 else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"lm_head.qweight": torch.zeros(4, 96, dtype=torch.int32)}, "holds lm_head.weight quantised in a way"),
        ({"lm_head.weight": torch.zeros(96, 32, dtype=torch.int8)}, "holds lm_head.weight quantised in a way"),
        ({"lm_head.weight": torch.zeros(96, 32).to(torch.float8_e4m3fn)}, "without a scale"),
        ({"lm_head.weight": torch.zeros(90, 32)}, r"of \[90, 32\], where the configuration says \[96, 32\]"),
        ({}, "holds no tensor lm_head.weight"),
    ],
    ids=["GPTQ", "INT8", "no scale", "rows", "none"],
)
def test_a_head_that_cannot_be_read_is_refused(stored: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        TargetHead.of(rewritten(tmp_path, stored))


def test_the_file_that_transformers_takes_is_read(tmp_path: Path) -> None:
    """An index left over beside ``model.safetensors`` is not looked at."""
    import json

    target, model = build(tmp_path, "llama untied")
    index = {"weight_map": dict.fromkeys(model.state_dict(), "gone.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(TargetHead.of(target).weight, model.lm_head.weight)


def test_the_type_is_that_of_the_files_where_the_configuration_says_none(tmp_path: Path) -> None:
    import json

    build(tmp_path, "llama untied")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in {"dtype", "torch_dtype"}}))
    assert Target(TargetConfig(str(tmp_path))).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "more", "scale", "cap"),
    [
        ("HyperCLOVAXConfig", {"logits_scaling": 0.125}, 0.125, None),
        ("FalconH1Config", {"lm_head_multiplier": 0.25, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, 0.25, None),
        ("RecurrentGemmaConfig", {"logits_soft_cap": 7.0, "lru_width": 32}, 1.0, 7.0),
        ("NanoChatConfig", {"final_logit_softcapping": 9.0}, 1.0, 9.0),
    ],
)
def test_what_a_class_does_to_logits_is_asked_of_it(kind: str, more: dict[str, Any], scale: float, cap: float | None, tmp_path: Path) -> None:
    import transformers

    from torchspec.models.target_tensors import on_meta, tensors_of

    config = getattr(transformers, kind)(**{**SMALL, **more})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    target = Target(TargetConfig(str(tmp_path)))
    assert type(on_meta(target)).__name__.endswith("ForCausalLM")
    assert (tensors_of(target).rule.scale, tensors_of(target).rule.soft_cap) == (scale, cap)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """Who applies it would be another teacher than who does not."""
    target, _ = build(tmp_path, "llama untied")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge the adapter"):
        TargetHead.of(target)
