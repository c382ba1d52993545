"""Block drafts from the command line: fit, resume to the same bits, export in every format, and going on from what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.runs import make, metrics, run, save_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DRAFTS: dict[str, dict[str, Any]] = {
    "dflash": {"num_layers": 2, "block_size": 4, "learned_mask": True},
    "dspark": {"num_layers": 1, "block_size": 4, "markov_rank": 8, "causal": True},
    "dflash2": {"num_layers": 1, "block_size": 4, "selector_rank": 8, "selector_candidates": 4, "sliding_window": 32},
}
FORMS = {"dflash": ["vllm"], "dspark": ["vllm"], "dflash2": ["vllm", "speculators", "sglang"]}
"""Of a learned mask, of a pruned vocabulary and causal blocks, and of neither."""

WHOLE_VOCABULARY = [
    {"class_path": "torchspec.callbacks.acceptance.AcceptanceLength", "init_args": {"num_speculative_tokens": 3}},
    {"class_path": "torchspec.callbacks.last.LastCheckpoint", "init_args": {"every_n_train_steps": 2}},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=24, validate=4)


@pytest.mark.parametrize("family", DRAFTS)
def test_fit_resume_export_and_go_on(family: str, world: dict[str, Path], tmp_path: Path) -> None:
    draft = tmp_path / "draft.json"
    draft.write_text(json.dumps({"mask_token_id": 380, **DRAFTS[family]}))
    changes: dict[str, Any] = {
        "data__packs_per_step": 1,
        "data__max_tokens": 128,
        "model": {
            "family": family, "draft": str(draft), "aux_layers": [2, 4, 6], "options": {"anchors": 6}, "loss": {"cross_entropy": 1.0},
            "compute_dtype": "fp32", "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
        },
    }  # fmt: skip
    if family == "dflash2":
        changes["trainer__callbacks"] = WHOLE_VOCABULARY
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = run("fit", "--config", str(make(whole, world, **changes)), "--trainer.max_steps", "4")
    assert code == 0, output
    code, output = run("fit", "--config", str(make(broken, world, **changes)), "--trainer.max_steps", "2")
    assert code == 0, output
    code, output = run("fit", "--config", str(broken / "run.yaml"), "--trainer.max_steps", "4", "--ckpt_path", "last")
    assert code == 0, output
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, broken))
    assert one["global_step"] == other["global_step"] == 4
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    assert metrics(whole, "train/loss")[2:] == metrics(broken, "train/loss")[-2:]
    exported = tmp_path / "exported"
    for form in FORMS[family]:
        checkpoint = str(whole / "checkpoints" / "last.ckpt")
        code, output = run("export", "--checkpoint", checkpoint, "--target", str(world["target"]), "--output", str(exported / form), "--format", form)
        assert code == 0, output
    changes["model"] = {**changes["model"], "draft": None, "start_from": str(exported / FORMS[family][-1])}
    code, output = run("fit", "--config", str(make(tmp_path / "again", world, **changes)), "--trainer.max_steps", "1")
    assert code == 0, output
    assert metrics(tmp_path / "again", "train/loss")[0] < metrics(whole, "train/loss")[0]
