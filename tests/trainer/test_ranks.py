"""Lightning's averaging on two ranks, by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.e2e.runs import config, run

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}


def configured(world: dict[str, str], folder: Path, *, averaging: dict[str, Any] = EMA) -> Path:
    """On records, with the averaging callback before all others."""
    changes = {"data__engine": "replay", "data__records": world["records"], "trainer__max_epochs": 2, "trainer__devices": 2, "trainer__strategy": "ddp"}
    made = config(folder, world["target"], world["train"], world["validate"], **changes)
    described = yaml.safe_load(made.read_text())
    described["data"] |= {"max_length": 64, "max_tokens": 96, "cache_dir": str(Path(world["folder"]) / "cache")}
    described["model"]["unroll_steps"] = 2
    described["trainer"]["callbacks"] = [averaging, *(c for c in described["trainer"]["callbacks"] if "Acceptance" not in c["class_path"])]
    made.write_text(yaml.safe_dump(described))
    return made


@pytest.mark.nightly
def test_an_averaged_run_on_two_ranks_is_resumed_exactly(world: dict[str, str], tmp_path: Path) -> None:
    made = {name: configured(world, tmp_path / name) for name in ("whole", "parts")}
    first = ["--trainer.max_steps", "5", "--model.lr_scheduler.total_steps", "12"]
    for words in (["--config", str(made["whole"])], ["--config", str(made["parts"]), *first]):
        code, output = run("fit", *words)
        assert code == 0 and "draft vocabulary: 128 of" in output, output
    code, output = run("fit", "--config", str(made["parts"]), "--ckpt_path", "last")
    assert code == 0, output
    whole, parts = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in made)
    for entry in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, parts[entry][name]) for name, value in whole[entry].items()), entry
    assert not all(torch.equal(value, whole["current_model_state"][name]) for name, value in whole["state_dict"].items())
