"""A frozen head (``model.train_head=false``): the target's rows, never trained, in every checkpoint and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.defects.fits import fit, module, weights
from tests.distributed.ranks import on_ranks
from tests.models.differences import PRUNED, STEPS, made_for
from tests.models.exports import save_plain_target
from tests.models.packs import pack
from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.export.export import export_checkpoint
from torchspec.models.export.import_draft import import_draft
from torchspec.models.family import Build, Init
from torchspec.models.optim.muon import MuonAdamW
from torchspec.models.target_head import TargetHead
from torchspec.models.training.checkpoint import read_draft_weights
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def build(target: Target, init: Init = "random", *, train_head: bool = False, pruned: bool = True, **changes: Any) -> DraftTask:
    torch.manual_seed(3)
    ids = PRUNED if pruned else list(range(target.vocab_size))
    config = DraftConfig.from_target(target, aux_layers=(1, 2, 3), draft_vocab_size=len(ids), **changes)
    vocabulary = VocabularyMapping(torch.tensor(ids), target.vocab_size)
    how = Build(target, vocabulary, torch.float32, torch.device("cpu"), init=init, train_head=train_head)
    return DraftTask.build(config, how, step_weights=[1.0])


@pytest.mark.parametrize("init", ["target", "target_head", "random"])
def test_holds_the_targets_rows_whatever_the_start(target: Target, init: Init) -> None:
    rows, made = TargetHead.of(target).weight[PRUNED].float(), build(target, init)
    assert torch.equal(made.draft.lm_head.weight, rows) and not made.draft.lm_head.weight.requires_grad
    noise = build(target, "random", train_head=True).draft
    if init != "target":  # everything else is noise, the same as without the head's rows
        others = {name: p for name, p in made.draft.named_parameters() if name != "lm_head.weight"}
        assert all(torch.equal(p, noise.get_parameter(name)) for name, p in others.items())
        assert bool((made.draft.norm.weight == 1.0).all())
    assert not torch.equal(noise.lm_head.weight, rows)


def test_a_trained_head_may_start_from_the_targets_rows_amid_noise(target: Target) -> None:
    made = build(target, "target_head", train_head=True).draft
    assert torch.equal(made.lm_head.weight, TargetHead.of(target).weight[PRUNED].float()) and made.lm_head.weight.requires_grad


def test_rows_have_the_targets_logit_scale(tmp_path: Path) -> None:
    """A server multiplies by a draft's rows and scales nothing: argmax is the same either way, not probabilities."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2, vocab_size=40, max_position_embeddings=64,
        logit_scale=0.25, initializer_range=0.3,
    )  # fmt: skip
    model = CohereForCausalLM(config)
    model.save_pretrained(tmp_path)
    from torchspec.target import TargetConfig

    made = build(Target(TargetConfig(str(tmp_path), dtype="float32")), pruned=False).draft
    torch.testing.assert_close(made.lm_head.weight.data, model.lm_head.weight.data * 0.25)
    state = torch.randn(3, 16)
    torch.testing.assert_close(made.lm_head(state), model.lm_head(state) * model.logit_scale)


def test_a_bias_is_told_of(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TargetHead.of(target)
    own.register_buffer("bias", torch.ones(40), persistent=False)
    monkeypatch.setattr(TargetHead, "of", lambda _: own)
    with pytest.warns(UserWarning, match="has a bias"):
        build(target)


def test_other_hidden_sizes_are_refused_by_name(target: Target) -> None:
    with pytest.raises(UserError, match="model.train_head"):
        build(target, hidden_size=24)


def test_no_gradient_is_made_for_it_and_no_other_changes() -> None:
    found = []
    for trained in (True, False):
        made, conversations = made_for("plain", PRUNED)
        made.draft.lm_head.weight.requires_grad_(trained)
        made(pack(made.draft.config, conversations, STEPS), measure=True).loss.backward()
        found.append({name: p.grad for name, p in made.draft.named_parameters()})
    ours, theirs = found
    assert ours.pop("lm_head.weight") is not None and theirs.pop("lm_head.weight") is None
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())  # type: ignore[arg-type]


def test_a_pack_without_supervision_passes(target: Target) -> None:
    made, conversations = made_for("plain", None)
    made.draft.lm_head.weight.requires_grad_(False)
    step = made(pack(made.draft.config, conversations[1:2], STEPS))
    step.loss.backward()
    assert made.draft.lm_head.weight.grad is None and made.draft.fc.weight.grad is not None


RULES: dict[str, Any] = {"train_head": False, "optimizer": lambda given: MuonAdamW(given, lr=1e-2, weight_decay=0.5)}


def test_training_resume_and_export_keep_it(target: Target, tmp_path: Path) -> None:
    """No optimizer state, no decay; a resume is exact; a checkpoint with a trained head is refused and the other way
    round; exports carry it, also pruned afterwards."""
    rows = TargetHead.of(target).weight.float()
    whole = fit(tmp_path, module(target, **RULES), steps=4)
    first = fit(tmp_path, module(target, **RULES), steps=2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    held = {id(p) for group in first.optimizers[0].param_groups for p in group["params"]}
    assert id(first.lightning_module.task.draft.lm_head.weight) not in held  # type: ignore[union-attr]
    again = fit(tmp_path, module(target, **RULES), steps=4, ckpt_path=str(tmp_path / "a.ckpt"))
    ours, resumed = weights(whole.lightning_module), weights(again.lightning_module)  # type: ignore[arg-type]
    assert torch.equal(ours["lm_head.weight"], rows) and all(torch.equal(value, resumed[name]) for name, value in ours.items())
    for made in (module(target), module(target, optimizer=RULES["optimizer"])):
        with pytest.raises(UserError, match=r"model.train_head"):
            fit(tmp_path, made, steps=4, ckpt_path=str(tmp_path / "a.ckpt"))
    assert torch.equal(read_draft_weights(tmp_path / "a.ckpt")["lm_head.weight"], rows)

    export_checkpoint(tmp_path / "a.ckpt", target, tmp_path / "whole")
    assert torch.equal(load_file(tmp_path / "whole" / "model.safetensors")["lm_head.weight"].float(), rows)
    assert "| head | kept as it started |" in (tmp_path / "whole" / "README.md").read_text()
    export_checkpoint(tmp_path / "a.ckpt", target, tmp_path / "pruned", vocabulary=VocabularyMapping(torch.tensor(PRUNED), target.vocab_size))
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"].float(), rows[PRUNED]) and torch.equal(tensors["d2t"] + torch.arange(len(PRUNED)), torch.tensor(PRUNED))
    back = import_draft(str(tmp_path / "pruned"), target)
    assert back.vocabulary is not None and back.vocabulary.draft_ids.tolist() == PRUNED


def test_start_from_a_trained_head_keeps_that_one(target: Target, tmp_path: Path) -> None:
    fit(tmp_path, module(target), steps=2).save_checkpoint(tmp_path / "trained.ckpt")
    head = read_draft_weights(tmp_path / "trained.ckpt")["lm_head.weight"]
    again = fit(tmp_path, module(target, start_from=str(tmp_path / "trained.ckpt"), **RULES), steps=2)
    after = weights(again.lightning_module)  # type: ignore[arg-type]
    assert torch.equal(after["lm_head.weight"], head) and not torch.equal(head, TargetHead.of(target).weight.float())
    assert not torch.equal(after["norm.weight"], read_draft_weights(tmp_path / "trained.ckpt")["norm.weight"])


def _sharded_step(rank: int) -> None:
    """Two ranks, one pack each, against one process with both: weights after a step of Muon and AdamW with decay."""
    from torch.distributed.device_mesh import init_device_mesh

    from torchspec.models.optim.muon import mark_hidden_matrices
    from torchspec.models.training.parallelize import parallelize

    found = []
    for mesh in (None, init_device_mesh("cpu", (2,))):
        made, conversations = made_for("plain", PRUNED)
        made.draft.compute_dtype = torch.float32
        made.float()
        made.draft.lm_head.weight.requires_grad_(False)
        before = made.draft.lm_head.weight.detach().clone()
        parallelize(made, mesh=mesh, compute_dtype=torch.float32)
        mark_hidden_matrices(made)
        optimizer = MuonAdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3, matrices="layers_and_fc")
        batch = pack(made.draft.config, conversations, STEPS, dtype=torch.float32)
        made(batch).loss.backward()
        optimizer.step()
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in made.draft.named_parameters()}
        assert torch.equal(whole["lm_head.weight"], before)
        found.append(whole)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sharded_over_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _sharded_step)
