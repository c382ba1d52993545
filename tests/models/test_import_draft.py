"""Published drafts read back: other names, other files, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.differences import PRUNED
from tests.models.exports import LAYERS, Exported, export_variant, save_plain_target
from torchspec.errors import UserError
from torchspec.models.export.import_draft import import_draft
from torchspec.models.target_head import TargetHead
from torchspec.target import Target

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def rewrite(made: Exported, *, tensors: Callable[[Tensors], Any] | None = None, **fields: Any) -> str:
    """Change an export's tensors in place, and fields of its ``config.json`` (None removes one)."""
    if tensors is not None:
        content = load_file(made.folder / "model.safetensors")
        tensors(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, made.folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((made.folder / "config.json").read_text()) | fields
    (made.folder / "config.json").write_text(json.dumps({name: value for name, value in described.items() if value is not None}))
    return str(made.folder)


def same(made: Exported, source: str, target: Target) -> None:
    again = import_draft(source, target)
    assert again.config == made.config
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in made.weights.items())


def test_older_names(target: Target, tmp_path: Path) -> None:
    made = export_variant("fc_norm", target, tmp_path / "draft")

    def older(tensors: Tensors) -> None:
        for new, old in (("layers.0.", "midlayer."), ("fc_norm.0.", "aux_norm_low."), ("fc_norm.1.", "aux_norm_mid."), ("fc_norm.2.", "aux_norm_high.")):
            for name in [name for name in tensors if name.startswith(new)]:
                tensors[f"model.{old}{name.removeprefix(new)}"] = tensors.pop(name)

    same(made, rewrite(made, tensors=older, fc_norm=None, use_aux_norm=True), target)


def test_pickled_weights_and_a_single_file(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft")
    same(made, str(made.folder / "model.safetensors"), target)
    torch.save(load_file(made.folder / "model.safetensors"), made.folder / "pytorch_model.bin")
    (made.folder / "model.safetensors").unlink()
    same(made, str(made.folder), target)
    same(made, str(made.folder / "pytorch_model.bin"), target)


def test_what_may_lawfully_be_absent(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "full")
    source = rewrite(made, tensors=lambda t: [t.pop("embed_tokens.weight"), t.pop("lm_head.weight")])
    again = import_draft(source, target)
    assert again.embedding is None
    assert torch.equal(again.weights["lm_head.weight"], TargetHead.of(target).weight)
    pruned = export_variant("plain", target, tmp_path / "pruned", draft_ids=PRUNED)
    same(pruned, rewrite(pruned, tensors=lambda t: t.pop("t2d")), target)


def test_rows_in_another_order_are_sorted_with_their_ids(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft", draft_ids=PRUNED)
    shuffled = torch.randperm(len(PRUNED), generator=torch.Generator().manual_seed(0))

    def shuffle(tensors: Tensors) -> None:
        tensors["d2t"] = torch.tensor(PRUNED)[shuffled] - torch.arange(len(PRUNED))
        tensors["lm_head.weight"] = tensors["lm_head.weight"][shuffled]

    same(made, rewrite(made, tensors=shuffle), target)


def test_layer_ids_of_eagle_config_alone_are_one_less_than_ours(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft")
    assert import_draft(rewrite(made, eagle_aux_hidden_state_layer_ids=None), target).config.aux_layers == (1, 2, 3)
    assert import_draft(rewrite(made, eagle_config=None), target).config.aux_layers == (2, LAYERS // 2, LAYERS - 3)


def test_a_repeated_norm_is_dropped_a_contradicting_one_refused(target: Target, tmp_path: Path) -> None:
    made = export_variant("two layers", target, tmp_path / "draft", form="sglang")
    same(made, str(made.folder), target)
    with pytest.raises(UserError, match="layer 1"):
        import_draft(rewrite(made, tensors=lambda t: t["layers.1.hidden_norm.weight"].add_(1)), target)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a missing tensor": ({"tensors": lambda t: t.pop("norm.weight")}, "lacks norm.weight"),
    "an unknown tensor": ({"tensors": lambda t: t.update(mask_hidden=torch.zeros(1, 48))}, "holds mask_hidden"),
    "another shape": ({"intermediate_size": 25}, "another shape: .*gate_proj"),
    "no d2t": ({"tensors": lambda t: t.pop("d2t")}, "no d2t"),
    "ids for offsets": ({"tensors": lambda t: t.update(d2t=torch.tensor(PRUNED))}, "offsets, not ids"),
    "d2t and t2d contradict": ({"tensors": lambda t: t["t2d"].logical_not_()}, "contradict"),
    "a pruned head without embedding rows": ({"tensors": lambda t: t.update({"embed_tokens.weight": torch.zeros(3, 16)})}, "embed_tokens of shape"),
    "no RoPE base": ({"rope_theta": None, "rope_parameters": None, "rope_scaling": None}, "RoPE base"),
    "partial RoPE": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "a sliding window": ({"layer_types": ["sliding_attention"]}, "sliding window"),
    "another architecture": ({"architectures": ["MedusaModel"]}, "MedusaModel"),
    "EAGLE-1": ({"eagle_config": {"use_aux_hidden_state": False}}, "EAGLE-1"),
    "another target": ({"vocab_size": 41}, "vocab_size 41"),
    "another count of layers": ({"num_aux_hidden_states": 4}, "4 aux states"),
    "ids out of order": ({"eagle_aux_hidden_state_layer_ids": [3, 1, 2]}, "increasing"),
    "no heads": ({"num_attention_heads": None}, "num_attention_heads=None"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_drafts_are_refused_by_name(wrong: str, target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft", draft_ids=PRUNED)
    changes, match = WRONG[wrong]
    with pytest.raises(UserError, match=match):
        import_draft(rewrite(made, **changes), target)


def test_speculators_drafts_must_say_what_readers_fill_in_differently(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft", form="speculators")
    with pytest.raises(UserError, match="peagle"):
        import_draft(rewrite(made, speculators_model_type="peagle"), target)
    with pytest.raises(UserError, match="norm_before_residual"):
        import_draft(rewrite(made, speculators_model_type="eagle3", norm_before_residual=None), target)


def test_random_embeddings_are_refused_and_rounded_ones_taken(target: Target, tmp_path: Path) -> None:
    """Servers use what the draft holds, training the target's table: a draft whose table is another one would mean two things."""
    made = export_variant("plain", target, tmp_path / "draft")
    same(made, rewrite(made, tensors=lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"].bfloat16()})), target)
    with pytest.raises(UserError, match="embed_tokens that is not the target's"):
        import_draft(rewrite(made, tensors=lambda t: t.update({"embed_tokens.weight": torch.randn(40, 16)})), target)


def test_a_head_of_another_width_than_the_targets_cannot_be_left_out(target: Target, tmp_path: Path) -> None:
    made = export_variant("H < D, own embedding", target, tmp_path / "draft")
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        import_draft(rewrite(made, tensors=lambda t: t.pop("lm_head.weight")), target)


def test_files_that_are_not_there(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft", max_shard_size="4KB")
    next(iter(sorted(made.folder.glob("*.safetensors")))).unlink()
    with pytest.raises(UserError, match="lacks model-00001"):
        import_draft(str(made.folder), target)
    with pytest.raises(UserError, match="does not exist"):
        import_draft(str(tmp_path / "nothing"), target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        import_draft(str(tmp_path / "empty"), target)
    damaged = export_variant("plain", target, tmp_path / "damaged")
    (damaged.folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="damaged"):
        import_draft(str(damaged.folder), target)
