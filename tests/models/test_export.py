"""What an export holds, for each server: names, configuration, refusals, shards, card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.differences import PRUNED
from tests.models.exports import LAYERS, export_variant, export_weights, random_draft, save_plain_target
from tests.models.packs import draft_config
from tests.models.variants import VARIANTS
from tests.tiny import save_target
from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.family import EAGLE3
from torchspec.models.eagle3.options import UnrollOptions
from torchspec.models.export.export import ExportOptions, export_draft, prune
from torchspec.models.export.import_draft import import_draft
from torchspec.models.export.model_card import Training
from torchspec.models.family import Draft
from torchspec.models.target_head import read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig

DENSE = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def described(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("form", ["vllm", "speculators", "sglang"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_reads_back_the_same(variant: str, form: str, target: Target, tmp_path: Path) -> None:
    """Or is refused with a format that can."""
    try:
        made = export_variant(variant, target, tmp_path / "draft", form=form, draft_ids=PRUNED)
    except UserError as error:
        assert form != "vllm" and "--format" in str(error)
        return
    again = import_draft(str(made.folder), target)
    assert again.config == made.config
    assert again.vocabulary is not None and again.vocabulary.draft_ids.tolist() == PRUNED
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in made.weights.items())
    if not made.config.owns_embedding:
        assert again.embedding is not None and torch.equal(again.embedding, read_embedding(target))


@pytest.mark.parametrize(
    ("variant", "architecture", "model_type", "names"),
    [
        ("plain", "LlamaForCausalLMEagle3", "llama", DENSE),
        ("Qwen3 (qk_norm)", "Eagle3Qwen3ForCausalLM", "qwen3", DENSE | {"q_norm", "k_norm"}),
        ("MLA", "Eagle3DeepseekV2ForCausalLM", "deepseek_v2", LATENT),
    ],
)
def test_vllms_names(variant: str, architecture: str, model_type: str, names: set[str], target: Target, tmp_path: Path) -> None:
    made = export_variant(variant, target, tmp_path / "draft", draft_ids=PRUNED)
    tensors, config = load_file(made.folder / "model.safetensors"), described(made.folder)
    assert config["architectures"] == [architecture] and config["model_type"] == model_type and config["tie_word_embeddings"] is False
    layer = {
        f"layers.0.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    layer |= {f"layers.0.self_attn.{name}.weight" for name in names}
    assert set(tensors) == {"embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | layer
    assert tensors["d2t"].dtype == torch.int64 and (torch.arange(len(PRUNED)) + tensors["d2t"]).tolist() == PRUNED


def test_layer_ids_in_both_countings(tmp_path: Path) -> None:
    target = save_plain_target(tmp_path / "target")
    default = export_variant("plain", target, tmp_path / "default")
    assert default.config.aux_layers == (1, 2, 3)  # not the default of this target, so they are written
    config = described(default.folder)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert "num_aux_hidden_states" not in config
    draft = random_draft(draft_config(aux_layers=(2, LAYERS // 2, LAYERS - 3)), target)
    export_weights(draft.config, {n: p.detach() for n, p in draft.named_parameters()}, None, target, tmp_path / "usual")
    assert not {"eagle_aux_hidden_state_layer_ids", "eagle_config"} & described(tmp_path / "usual").keys()
    five = export_variant("five aux layers, norm_before_fc", target, tmp_path / "five", form="speculators")
    config = described(five.folder)
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3, 4, 8] and config["transformer_layer_config"]["num_aux_hidden_states"] == 5
    assert config["norm_before_residual"] is False and "model_type" not in config


@pytest.mark.parametrize("variant", ["RoPE base 500000", "RoPE linear", "RoPE llama3", "RoPE yarn", "MLA, yarn"])
def test_rope_survives_either_transformers(variant: str, target: Target, tmp_path: Path) -> None:
    """Version 5 reads ``rope_parameters``, 4.57 ``rope_theta`` and ``rope_scaling``: each alone says what was trained."""
    from transformers import AutoConfig

    made = export_variant(variant, target, tmp_path / "draft")
    rope = made.config.rope_parameters
    for fields in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        folder = tmp_path / "-".join(sorted(fields))
        folder.mkdir()
        kept = {k: v for k, v in described(made.folder).items() if k in fields or "rope" not in k or "head_dim" in k}
        (folder / "config.json").write_text(json.dumps(kept))
        loaded = AutoConfig.from_pretrained(folder).rope_parameters
        assert {name: loaded[name] for name in rope} == pytest.approx(rope) if rope["rope_type"] != "default" else loaded["rope_theta"] == rope["rope_theta"]


SGLANG_CANNOT = {
    "Qwen3 (qk_norm)": "qk_norm",
    "attention_bias": "attention_bias",
    "norm_before_residual": "norm_before_residual",
    "H < D, own embedding": "embedding",
    "one aux layer": "skips fc",
    "MLA": "mla",
}


@pytest.mark.parametrize("variant", SGLANG_CANNOT)
def test_what_sglang_would_serve_wrongly_is_refused(variant: str, target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{SGLANG_CANNOT[variant]}.*--format vllm"):
        export_variant(variant, target, tmp_path / "draft", form="sglang")


def test_sglang_never_captures_the_last_layer(target: Target, tmp_path: Path) -> None:
    draft = random_draft(draft_config(aux_layers=(1, 2, LAYERS)), target)
    with pytest.raises(UserError, match=f"aux layer {LAYERS}"):
        weights = {n: p.detach() for n, p in draft.named_parameters()}
        export_weights(draft.config, weights, None, target, tmp_path / "draft", options=ExportOptions(form="sglang"))


def test_later_layers_have_both_names_of_their_norm_for_sglang(target: Target, tmp_path: Path) -> None:
    made = export_variant("two layers", target, tmp_path / "draft", form="sglang")
    tensors = load_file(made.folder / "model.safetensors")
    assert torch.equal(tensors["layers.1.hidden_norm.weight"], tensors["layers.1.input_layernorm.weight"])
    assert "layers.1.hidden_norm.weight" not in load_file(export_variant("two layers", target, tmp_path / "vllm").folder / "model.safetensors")


def test_shards_and_type(target: Target, tmp_path: Path) -> None:
    made = export_variant("two layers", target, tmp_path / "draft", max_shard_size="4KB", dtype="bfloat16")
    files = sorted(made.folder.glob("*.safetensors"))
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 2 and {f.name for f in files} == set(index.values())
    assert described(made.folder)["torch_dtype"] == described(made.folder)["dtype"] == "bfloat16"
    again = import_draft(str(made.folder), target)
    assert all(torch.equal(again.weights[name], tensor.bfloat16()) for name, tensor in made.weights.items())


def test_pruning_after_training_takes_rows_of_the_head(target: Target, tmp_path: Path) -> None:
    draft = random_draft(draft_config(**VARIANTS["plain"]), target)
    weights = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    mapping = VocabularyMapping.from_counts(torch.arange(40), 10, always=[2])
    pruned = prune(Draft(draft.config, weights, None, family=EAGLE3), mapping)
    export_draft(pruned, target, tmp_path / "draft")
    again = import_draft(str(tmp_path / "draft"), target)
    assert again.config.draft_vocab_size == 10 and again.vocabulary is not None
    assert again.vocabulary.draft_ids.tolist() == [2, *range(31, 40)]
    assert torch.equal(again.weights["lm_head.weight"], weights["lm_head.weight"][again.vocabulary.draft_ids])
    with pytest.raises(UserError, match="trained with 10 tokens"):
        prune(pruned, VocabularyMapping.from_counts(torch.arange(40), 5))


def test_card_and_tokenizer(tmp_path: Path) -> None:
    target = Target(TargetConfig(str(save_target(tmp_path / "target")), dtype="float32"))
    config = draft_config(hidden_size=128, target_hidden_size=128, vocab_size=target.vocab_size, draft_vocab_size=target.vocab_size)
    draft = random_draft(config, target)
    facts = {
        "loss": {"forward_kl": 1.0, "tv": 0.5}, "start": {"init": "target"},
        "optimizer": {"name": "AdamW", "groups": [{"lr": 3e-4, "betas": [0.9, 0.95]}]}, "schedule": {"name": "Cosine", "warmup_steps": 0.05},
        "data": {"train": [["some/chats", 1.0], ["more.jsonl", 2.0]], "conversations": 56789, "max_length": 2048, "tokens_per_step": 32768, "on_policy": False,
                 "steps_per_epoch": 617},
    }  # fmt: skip
    training = Training(UnrollOptions(2, [1.0, 0.8]), 1234, facts)
    options = ExportOptions(form="sglang", tokenizer=True, target_name="somebody/some-model")
    export_weights(config, {n: p.detach() for n, p in draft.named_parameters()}, None, target, tmp_path / "draft", options=options, training=training)
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "base_model: somebody/some-model" in card and str(tmp_path) not in card
    assert "--speculative-num-steps 2" in card and "| optimizer steps | 1,234 (2 epochs) |" in card and "| step weights | 1, 0.8 |" in card
    assert "| loss | forward_kl 1, tv 0.5 |" in card and "| optimizer | AdamW: lr 0.0003, betas 0.9 0.95 |" in card
    assert "| schedule | Cosine: warmup_steps 0.05 |" in card and "| started from | the target's head" in card
    assert "| data | some/chats, 2 x more.jsonl, 56,789 conversations |" in card
    assert "| tokens | at most 2,048 a conversation, 32,768 an optimizer step |" in card
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {f.name for f in (tmp_path / "draft").iterdir()}


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.mlp.up_proj.weight", "embed_tokens.weight"])
def test_what_is_written_is_compared_with_what_was_trained(name: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with what the exporter was about to write: a slip before that is noticed too."""
    import torchspec.models.export.export as export_module

    write = export_module.write_tensors

    def slip(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
        tensors[name] = tensors[name].flip(1)
        write(folder, tensors, **options)

    monkeypatch.setattr(export_module, "write_tensors", slip)
    with pytest.raises(UserError, match="embed_tokens that is not the target's" if "embed" in name else "logits that differ"):
        export_variant("plain", target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


def test_a_folder_of_something_else_is_left_alone(target: Target, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        export_variant("plain", target, tmp_path / "draft")
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_incomplete_weights_are_refused(target: Target, tmp_path: Path) -> None:
    draft = random_draft(draft_config(), target)
    weights = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    for spoiled, match in (({k: v for k, v in weights.items() if k != "norm.weight"}, "norm.weight"), ({**weights, "surprise": torch.ones(1)}, "surprise")):
        with pytest.raises(UserError, match=match):
            export_weights(draft.config, spoiled, None, target, tmp_path / "draft")


def test_heads_of_a_target_that_do_not_divide_its_hidden_size(tmp_path: Path) -> None:
    """GLM-4.5 has 96 heads of 5120; a Llama configuration with these cannot be loaded by Transformers, so the draft gets fewer, unless it has q/k norms."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=2, head_dim=8, vocab_size=40,
        max_position_embeddings=64, tie_word_embeddings=False, rope_theta=10000.0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "target")
    target = Target(TargetConfig(str(tmp_path / "target"), dtype="float32"))
    plain = DraftConfig.from_target(target, aux_layers=(1, 2, 3))
    assert (plain.num_heads, plain.num_kv_heads, plain.head_dim) == (4, 2, 8)
    assert DraftConfig.from_target(target, aux_layers=(1, 2, 3), qk_norm=True).num_heads == 6
    with pytest.raises(UserError, match="num_attention_heads=6 does not divide"):
        DraftConfig.from_target(target, aux_layers=(1, 2, 3), num_heads=6)
