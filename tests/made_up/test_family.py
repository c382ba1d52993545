"""A draft family that the package has never heard of trains, exports, imports and resumes by its own folder alone, on such an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import save_conversations, save_target
from torchspec import cli

FAMILY, ENGINE = "tests.made_up.linear.family:LINEAR", "tests.made_up.engine:PLAIN"
CALLBACKS = "torchspec.callbacks."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made_up")
    torch.set_num_threads(1)
    return {
        "folder": folder,
        "target": save_target(folder / "target"),
        "train": save_conversations(folder / "train.jsonl", 24),
        "validate": save_conversations(folder / "validate.jsonl", 7, seed=1),
    }


def fit(world: dict[str, Path], name: str, *words: str, engine: str = ENGINE, callbacks: tuple[dict[str, Any], ...] = (), **changes: Any) -> Path:
    """One run of ``main.py fit`` in this process; returns its folder."""
    run = world["folder"] / name
    kept = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}}
    trainer = {
        "default_root_dir": str(run), "accelerator": "cpu", "devices": 1, "max_steps": 8, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "val_check_interval": 4, "callbacks": [kept, *callbacks],
    }  # fmt: skip
    data = {
        "target": {"path": str(world["target"])}, "train": str(world["train"]), "validate": str(world["validate"]), "max_length": 64, "max_tokens": 96,
        "packs_per_step": 1, "cache_dir": str(world["folder"] / "cache"), "engine": engine, "store": {"kind": "shm", "budget": "16MiB"},
        "engines": {"deterministic": True, "threads": 1},
    }  # fmt: skip
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
    config = {"trainer": trainer, "data": data, "model": {"family": FAMILY, "compute_dtype": "fp32", "optimizer": optimizer, **changes}}
    file = world["folder"] / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    cli.main(["fit", "--config", str(file), *words])
    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


def test_a_made_up_family_trains_exports_imports_and_resumes(world: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"class_path": f"{CALLBACKS}acceptance.AcceptanceLength", "init_args": {"num_speculative_tokens": 1}}
    pruned = {"class_path": f"{CALLBACKS}vocabulary.VocabularyPruning", "init_args": {"size": 64}}
    exported = {"class_path": f"{CALLBACKS}export.ExportDraft"}
    run = fit(world, "whole", callbacks=(measured, pruned, exported))
    half, whole = run / "checkpoints/step=4.ckpt", run / "checkpoints/step=8.ckpt"

    walks = [json.loads(line) for line in (run / "acceptance.jsonl").read_text().splitlines()]
    assert walks and all(walk["acceptance_length"] >= 1.0 for walk in walks)
    assert all(name.startswith("task.draft.") for name in weights(whole)) and set(weights(whole)) == {"task.draft.input_norm.weight", "task.draft.head.weight"}
    moved = weights(whole)["task.draft.head.weight"] - weights(half)["task.draft.head.weight"]
    assert float(moved.abs().max()) > 1e-3

    # the export of a run is the export of its checkpoint, and a draft that is read again is the same draft
    target = str(world["target"])
    cli.main(["export", "--checkpoint", str(whole), "--target", target, "--output", str(run / "again")])
    cli.main(["import_draft", "--source", str(run / "draft"), "--target", target, "--output", str(run / "imported"), "--family", FAMILY])
    expected = {**{name.removeprefix("task.draft."): value for name, value in weights(whole).items()}}
    for folder in (run / "draft", run / "again", run / "imported"):
        found = load_file(folder / "model.safetensors")
        assert found.pop("draft_ids").shape == (64,)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LinearDraft"]

    resumed = fit(world, "resumed", "--ckpt_path", str(half), callbacks=(pruned,))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed / "checkpoints/step=8.ckpt").items())
    capsys.readouterr()


def test_a_run_starts_from_a_made_up_draft(world: dict[str, Path]) -> None:
    """``model.start_from`` gives architecture and vocabulary."""
    run = world["folder"] / "whole"
    started = fit(world, "started", "--trainer.max_steps", "0", start_from=str(run / "draft"))
    assert not (started / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"head_scale": -1.0}}, "model.options.head_scale=-1.0 must be above 0"),
        ({"options": {"anchors": 3}}, "model.options.anchors"),
        ({"unroll_steps": 3}, "model.unroll_steps=3"),
        ({"recompute": True}, "model.recompute=True is not for a linear draft"),
        ({"family": "tests.made_up.linear.family:CUBIC"}, "tests.made_up.linear.family has no CUBIC"),
        ({"family": "tests.made_up.linear.config:LinearOptions"}, "is a type where Family is expected: it lacks aux_layers, beside, card, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_family_does_not_have_is_refused_by_name(world: dict[str, Path], capsys: pytest.CaptureFixture[str], changes: Any, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(world, "refused", **{"engine": "transformers", **changes})
    assert ended.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and said in told[0]
