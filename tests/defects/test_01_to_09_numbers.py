"""Failures that this field has had, each with the test that catches it: 1 to 9, numbers that are wrong without a word.

``benchmarks/mutations.py`` plants each of them in a copy of the package and shows that its test fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.defects.fits import fit, module, weights
from tests.models import reference
from tests.models.differences import PRUNED, against_reference
from tests.models.exports import LAYERS, export_variant, export_weights, random_draft, save_plain_target
from tests.models.packs import conversation, counts, draft_config, head_weight, pack, task
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.export.export import ExportOptions
from torchspec.models.export.import_draft import import_draft
from torchspec.models.ops.rope import frequencies
from torchspec.models.ops.rope_parameters import rope_of
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.supervision import Unroll
from torchspec.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def test_defect_01_rope_base_is_the_targets_in_training_and_in_the_export(tmp_path: Path) -> None:
    """Transformers 5 keeps the base in ``rope_parameters``; code that reads ``config.rope_theta`` with a default trains at 10000."""
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    assert not hasattr(config, "rope_theta")
    assert rope_of(config) == {"rope_type": "default", "rope_theta": 777.0}
    assert rope_of(SimpleNamespace(rope_theta=777.0)) == {"rope_type": "default", "rope_theta": 777.0}  # version 4
    with pytest.raises(UserError, match="without a RoPE base"):
        rope_of(SimpleNamespace(rope_parameters={"rope_type": "default"}))
    target = save_plain_target(tmp_path / "target", rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    draft = random_draft(DraftConfig.from_target(target, aux_layers=(1, 2, 3)), target)
    c = draft.config
    inverse, _ = frequencies(c.rope_parameters, size=c.rotary_dim, max_positions=c.max_position_embeddings)
    torch.testing.assert_close(inverse, 777.0 ** -(torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(draft.inverse_frequencies, inverse)
    export_weights(draft.config, {name: p.detach() for name, p in draft.named_parameters()}, None, target, tmp_path / "draft")
    described = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert described["rope_theta"] == described["rope_parameters"]["rope_theta"] == 777.0


def test_defect_02_resume_keeps_the_optimizers_moments_and_refuses_a_checkpoint_without_them(target: Target, tmp_path: Path) -> None:
    whole = module(target)
    fit(tmp_path, whole, steps=4)
    half = module(target)
    path = str(tmp_path / "half.ckpt")
    fit(tmp_path, half, steps=2).save_checkpoint(path)
    resumed = module(target)
    fit(tmp_path, resumed, steps=4, ckpt_path=path)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    content = torch.load(path, weights_only=True)
    del content["optimizer_states"]
    torch.save(content, tmp_path / "moments-lost.ckpt")
    with pytest.raises(UserError, match="lacks optimizer_states"):
        fit(tmp_path, module(target), steps=4, ckpt_path=str(tmp_path / "moments-lost.ckpt"))


def test_defect_03_the_last_supervised_position_has_the_targets_distribution() -> None:
    """Of a supervised turn that ends a conversation, whose last state is zero because nobody computed it: through the head it would be a uniform target."""
    assert Unroll(4).counts(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 6])).tolist() == [[3, 2, 1, 0]]
    config, steps = draft_config(), [1.0, 0.8, 0.5]
    made = task(config, draft_ids=None, step_weights=steps)
    given = conversation(config, [0, 0, 1, 1, 1, 1], 0)
    given.aux[-1], given.last[-1] = 0.0, 0.0
    output = made(pack(config, [given], 3))
    slow, sums = reference.loss(
        config, {name: p.detach() for name, p in made.draft.named_parameters()}, made.draft.embedding_table, ids=given.ids, mask=given.mask, aux=given.aux,
        last=given.last, head=head_weight(made), head_norm=made.head.norm_weight, head_eps=1e-5, draft_ids=list(range(40)), step_weights=steps,
        counts=counts([given], 3),
    )  # fmt: skip
    assert output.sums["rows"].tolist() == sums["rows"] == [3.0, 2.0, 1.0]
    assert float(output.loss.detach()) == pytest.approx(float(slow), rel=1e-6)


def test_defect_04_the_vocabulary_mapping_of_a_checkpoint_is_never_recomputed(target: Target, tmp_path: Path) -> None:
    ids = torch.tensor(PRUNED)
    others = dict.fromkeys(("draft_config", "target", "unroll_steps", "step_weights"), 1)
    torch.save({"torchspec": {"draft_ids": ids, **others}}, tmp_path / "some.ckpt")
    data = SimpleNamespace(token_counts=lambda: torch.arange(40), special_end_ids=lambda: [])  # would give the last ones
    trainer = SimpleNamespace(resume_path=str(tmp_path / "some.ckpt"), datamodule=data)
    resumed = SimpleNamespace(vocabulary=None, task=None, target=target)
    VocabularyPruning(len(PRUNED)).setup(trainer, resumed, "fit")  # type: ignore[arg-type]
    assert resumed.vocabulary.draft_ids.tolist() == PRUNED
    with pytest.raises(UserError, match="differs from the 19 tokens"):
        VocabularyPruning(7).setup(trainer, SimpleNamespace(vocabulary=None, task=None, target=target), "fit")  # type: ignore[arg-type]


def test_defect_05_the_final_norm_is_applied_once_before_the_targets_head(target: Target) -> None:
    """Engines deliver the state before the norm (index L); the head norms it. Together they are the target's own logits."""
    model = AutoModelForCausalLM.from_pretrained(target.config.path, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2.0)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
        expected = model(ids).logits[0]
        last = HiddenStateHooks(model, (LAYERS,), num_layers=LAYERS).run(ids)[LAYERS][0]
        head = TargetHead(model.lm_head.weight, None, norm_module=model.model.norm, norm_tensors={"weight": model.model.norm.weight})
        torch.testing.assert_close(head.logits(last), expected, rtol=1e-5, atol=1e-5)


def test_defect_06_layer_ids_mean_the_same_to_engine_trainer_and_servers(target: Target, tmp_path: Path) -> None:
    """Index i is ``hidden_states[i]``; SGLang's list counts blocks from 0. vLLM itself: ``tests/parity/test_vllm.py``."""
    model = AutoModelForCausalLM.from_pretrained(target.config.path, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    found = HiddenStateHooks(model, (0, 1, 5), num_layers=LAYERS).run(ids)
    assert all(torch.equal(found[i], states[i]) for i in (0, 1, 5))
    made = export_variant("plain", target, tmp_path / "draft")
    described = json.loads((made.folder / "config.json").read_text())
    assert described["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert described["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    for left_out in ("eagle_aux_hidden_state_layer_ids", "eagle_config"):
        (made.folder / "config.json").write_text(json.dumps({name: value for name, value in described.items() if name != left_out}))
        assert import_draft(str(made.folder), target).config.aux_layers == (1, 2, 3)


def test_defect_07_a_pruned_draft_is_exported_with_offsets_and_trained_with_ids(target: Target, tmp_path: Path) -> None:
    made = export_variant("plain", target, tmp_path / "draft", draft_ids=PRUNED)
    tensors = load_file(made.folder / "model.safetensors")
    assert (torch.arange(len(PRUNED)) + tensors["d2t"]).tolist() == tensors["t2d"].nonzero()[:, 0].tolist() == PRUNED
    again = import_draft(str(made.folder), target)
    assert again.vocabulary is not None and again.vocabulary.draft_ids.tolist() == PRUNED
    assert against_reference("plain", PRUNED)["loss"] < 1e-9


def test_defect_08_an_export_holds_the_targets_embedding_the_asked_type_and_every_tensor(target: Target, tmp_path: Path) -> None:
    made = export_variant("Qwen3 (qk_norm)", target, tmp_path / "draft", dtype="bfloat16")
    tensors = load_file(made.folder / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], read_embedding(target).bfloat16())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and tensors.keys() == made.weights.keys() | {"embed_tokens.weight"}
    for name in made.weights:
        kept = {other: tensor for other, tensor in made.weights.items() if other != name}
        with pytest.raises(UserError, match=name):
            export_weights(made.config, kept, None, target, tmp_path / "half", options=ExportOptions())
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("variant", ["norm_output", "EAGLE-3.1 (fc_norm, norm_output)"])
def test_defect_09_norm_output_is_honoured_by_logits_and_recurrence(variant: str) -> None:
    """The reference recurses on the normed state; a draft that norms its logits alone differs from step 1 on."""
    assert max(against_reference(variant, None).values()) < 1e-6
