"""Head, norm, embedding and logits of every causal and image-text class of Transformers that can be built tiny.

``make test`` takes a third of the classes (every third by name), ``make test-all`` the others too (mark ``nightly``). A
class that is not a target stands in a table with the words of its refusal, one that is not built tiny here with its reason.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.every_class import Family, families
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.errors import UserError
from torchspec.models.target_head import TargetHead, is_tied, read_embedding
from torchspec.target import Target, TargetConfig

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        "bart bert bert-generation big_bird bigbird_pegasus camembert data2vec-text electra ernie florence2 git marian mvp openai-gpt"
        " plbart blenderbot-small rembert roberta roberta-prelayernorm roc_bert roformer t5gemma2 trocr xlm xlm-roberta xmod".split(),
        "no final norm beside its blocks",
    ),
    **dict.fromkeys(
        "blip-2 instructblip instructblipvideo kosmos-2 kosmos-2.5 megatron-bert modernbert-decoder pix2struct prophetnet xlm-roberta-xl".split(),
        "makes its logits in a way that cannot be followed",
    ),
    **dict.fromkeys(("blip", "nemotron_h_omni", "pp_formulanet"), "no input embedding or output head"),
    **dict.fromkeys(("blt", "pi0"), "without hidden_size"),
    **dict.fromkeys(("hrm_text", "longcat_flash"), "has no list of"),
    **dict.fromkeys(("emu3", "shieldgemma2"), "holds no tensor"),  # under names that the class that would be loaded does not have
    "chameleon": "no scale and no soft cap",  # bars the ids of images
}
NOT_A_TOKEN = {"cpmant": "not one a token"}
"""Their head is right, but their engine's states are not: refused as an engine starts."""
NOT_RUN: dict[str, str] = {
    "idefics": "takes no text without an image",
    "udop": "takes no text without boxes",
}
"""The three tensors are compared, logits are not."""
TEXT_SCALE = {"aya_vision", "cohere2_vision"}
"""Transformers' wrapper leaves out its text model's logit scale; servers have it, and so have we."""
NOT_BUILT: dict[str, str] = {
    "cohere_compass": "layer types that its defaults do not have",
    "cohere_compass_text": "layer types that its defaults do not have",
    "dbrx": "a configuration that does not take what it writes",
    "deepseek_ocr2": "a tower without defaults",
    "diffusion_gemma": "no causal model",
    "ernie4_5_vl_moe": "sizes of rotation without defaults",
    "evolla": "in no mapping of its auto class",
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm",
    "gemma3n_text": "layer types that its defaults do not have",
    "gemma4_assistant": "a draft",
    "gemma4_unified_assistant": "a draft",
    "granite4_vision": "layers of its tower without defaults",
    "inkling_mm_model": "needs scipy",
    "musicgen": "a text encoder without defaults",
    "musicgen_melody": "a text encoder without defaults",
    "perception_lm": "needs timm",
    "qwen4_exp": "sizes without defaults",
    "qwen4_exp_text": "sizes without defaults",
    "reformer": "no decoder by default",
    "vision-encoder-decoder": "two models without defaults",
    "xlnet": "no causal attention",
    "xlstm": "sizes that its configuration derives",
    "zamba": "sizes that its configuration derives",
    "zamba2": "sizes that its configuration derives",
}
ALL = [family for family in families() if family.name not in NOT_BUILT]
LARGE = {"blt", "emu3", "glm5_next", "janus", "minicpmv4_7", "udop"}
"""Not tiny, because of sizes that their configurations fix."""
THIRD = {family.name for family in [family for family in ALL if family.name not in LARGE][::3]}
FLAGS: dict[str, tuple[bool | None, bool | None]] = {"absent": (None, None), "contradictory": (True, False), "contradictory, the other way": (False, True)}
"""``tie_word_embeddings`` of the whole configuration and of its text part, over a checkpoint with a head of its own."""


def marked() -> list[Any]:
    return [pytest.param(family, id=family.name, marks=[] if family.name in THIRD else [pytest.mark.nightly]) for family in ALL]


def load(target: Target) -> Any:
    return target.auto_class().from_pretrained(target.config.path, **target.model_files, dtype=torch.float32).eval()


def read(folder: Path) -> tuple[Target, TargetHead, torch.Tensor]:
    target = Target(TargetConfig(str(folder), dtype="float32"))
    return target, TargetHead.of(target), read_embedding(target)


def flag(folder: Path, whole: bool | None, text: bool | None) -> None:
    """Write the two flags into config.json; None takes one out."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    part = next((config[name] for name in ("text_config", "llm_config", "language_config") if name in config), None)
    for place, value in ((config, whole), (part, text)):
        if place is not None:
            place.pop("tie_word_embeddings", None)
            if value is not None:
                place["tie_word_embeddings"] = value
    file.write_text(json.dumps(config))


def same_tensors(model: Any, head: TargetHead, table: torch.Tensor) -> None:
    assert torch.equal(head.weight, model.get_output_embeddings().weight), "head"
    assert torch.equal(table, model.get_input_embeddings().weight), "embedding"
    bias = getattr(model.get_output_embeddings(), "bias", None)
    assert (head.bias is None) == (bias is None) and (head.bias is None or torch.equal(head.bias, bias)), "bias"


def same_logits(family: Family, model: Any, target: Target, head: TargetHead) -> None:
    """Of the states that the engine would send."""
    ids, layers = torch.tensor([[5, 9, 17, 33, 64, 70, 12]]), target.num_layers
    states = HiddenStateHooks(model, (layers,), num_layers=layers)
    if family.name in NOT_A_TOKEN:
        with pytest.raises(UserError, match=NOT_A_TOKEN[family.name]):
            states.run(ids)
        return
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    if family.name in TEXT_SCALE:
        assert head.scale == target.hf_config.logit_scale
        expected = expected * head.scale
    torch.testing.assert_close(head.logits(states.run(ids)[layers]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", marked())
def test_the_teacher_is_what_transformers_loads(family: Family, tmp_path: Path) -> None:
    for tied in (False, True):
        folder = tmp_path / f"tied-{tied}"
        model = family.build(tied=tied)
        model.save_pretrained(folder, max_shard_size="10GB" if tied else "100KB")
        if family.name in REFUSED:
            with pytest.raises(UserError, match=REFUSED[family.name]):
                read(folder)
            return
        target, head, table = read(folder)
        loaded = load(target)
        same_tensors(loaded, head, table)
        if family.name not in NOT_RUN:
            same_logits(family, loaded, target, head)
    head_of_its_own = tmp_path / "tied-False"
    if is_tied(read(head_of_its_own)[0]):
        return  # a class that knows no other way
    for whole, text in FLAGS.values():
        changed = tmp_path / "flags"
        shutil.copytree(head_of_its_own, changed, copy_function=os.link)
        (changed / "config.json").unlink()
        shutil.copy(head_of_its_own / "config.json", changed)
        flag(changed, whole, text)
        target, head, table = read(changed)
        same_tensors(load(target), head, table)
        shutil.rmtree(changed)


def test_every_class_is_built_or_listed() -> None:
    """And no name of the tables is of a class that is gone."""
    known = {family.name for family in families()}
    for table in (REFUSED, NOT_A_TOKEN, NOT_RUN, TEXT_SCALE, NOT_BUILT):
        assert set(table) <= known, sorted(set(table) - known)
