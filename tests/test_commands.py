"""``main.py export`` and ``main.py import_draft`` as a user calls them: pruning after training, type, shards, tokenizer, and another format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.exports import random_draft
from tests.tiny import save_conversations, save_target
from torchspec.cli import main
from torchspec.commands.export import export
from torchspec.commands.import_draft import import_draft
from torchspec.errors import UserError
from torchspec.models.export.import_draft import import_draft as read
from torchspec.models.module import DraftModule
from torchspec.target import Target, TargetConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A target, a checkpoint of a draft with the whole vocabulary, and its weights."""
    folder = tmp_path_factory.mktemp("world")
    config = TargetConfig(str(save_target(folder / "target")))
    module = DraftModule(config, unroll_steps=3)
    draft = random_draft(module.draft_config, Target(config))
    weights = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    state = {f"task.draft.{name}": tensor for name, tensor in weights.items()}
    torch.save({"torchspec": module.facts(), "state_dict": state, "global_step": 12, "epoch": 0}, folder / "some.ckpt")
    return folder / "target", folder / "some.ckpt", weights


def test_a_draft_is_cut_after_training_and_written_in_another_format(
    world: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, checkpoint, weights = world
    counts = save_conversations(tmp_path / "answers.jsonl", 40)
    first, second = tmp_path / "cut", tmp_path / "again"
    export(
        str(checkpoint), str(path), str(first), draft_vocab_size=50, token_counts=str(counts), dtype="float32", max_shard_size="200KB", tokenizer=True,
        target_name="some/target",
    )  # fmt: skip
    assert "draft vocabulary: 50 of 384 tokens, covering" in capsys.readouterr().out
    target = Target(TargetConfig(str(path)))
    draft = read(str(first), target)
    assert draft.vocabulary is not None and draft.vocabulary.size == 50
    ids = draft.vocabulary.draft_ids
    assert set(target.end_ids()) <= set(ids.tolist())
    assert torch.equal(draft.weights["lm_head.weight"], weights["lm_head.weight"][ids])
    assert len(list(first.glob("*.safetensors"))) > 2 and (first / "tokenizer.json").is_file() and (first / "generation_config.json").is_file()
    card = (first / "README.md").read_text()
    assert "base_model: some/target" in card and "50 of 384" in card and "| optimizer steps | 12 |" in card

    import_draft(str(first), str(path), str(second), format="speculators", dtype="bfloat16")
    described = json.loads((second / "config.json").read_text())
    assert described["speculators_model_type"] == "eagle3" and described["dtype"] == "bfloat16"
    other = read(str(second), target)
    assert other.config == draft.config and all(torch.equal(other.weights[name], tensor.bfloat16()) for name, tensor in draft.weights.items())


def test_counts_and_size_go_together(world: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, checkpoint, _ = world
    with pytest.raises(UserError, match="give both or none"):
        export(str(checkpoint), str(path), str(tmp_path / "draft"), draft_vocab_size=50)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", "--checkpoint", "nope.ckpt", "--target", "TARGET", "--output", "out"], "error: checkpoint='nope.ckpt' does not exist"),
        (["show_data", "--target", "runs/of/nobody", "--input", "rows.jsonl"], "error: target='runs/of/nobody' does not exist, and is no hub id either"),
        (["show_data", "--target", "no/body", "--input", "rows.jsonl"], "error: target='no/body' cannot be read, as a folder or from the hub"),
    ],
)
def test_errors_name_options_as_they_were_typed(
    words: list[str], expected: str, world: tuple[Path, Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        main([str(world[0]) if word == "TARGET" else word for word in words])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(expected)


def test_a_run_without_tensorboard_is_not_lectured_about_it(tmp_path: Path) -> None:
    import warnings

    import lightning.pytorch as pl
    from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

    from torchspec.cli import _quiet

    logger_connector.warning_cache.clear()  # which says a thing once
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _quiet()
        pl.Trainer(logger=True, default_root_dir=tmp_path, accelerator="cpu", barebones=False)
    assert not [str(one.message) for one in said if "tensorboard" in str(one.message).lower()]
