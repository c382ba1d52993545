"""``fit`` with ``data.on_policy`` and real vLLM: the target answers the training prompts, in one pass with its states or speculating with the draft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.runs import config, metrics, run, save_world, store_files

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVE = {"class_path": "torchspec.callbacks.on_policy.ServeDraft", "init_args": {"every_n_steps": 3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=100, validate=2)


def fit(folder: Path, world: dict[str, Path], *, engine: str, callbacks: tuple[dict[str, Any], ...] = (), **policy: Any) -> tuple[dict[str, Any], str]:
    """A whole run; its summary and what the console showed."""
    file = config(folder, world["target"], world["train"], None, data__engine=engine, data__on_policy={"max_new_tokens": 24, **policy})
    described = yaml.safe_load(file.read_text())
    kept = [c for c in described["trainer"]["callbacks"] if not c["class_path"].endswith(("AcceptanceLength", "ExportDraft"))]
    described["trainer"]["callbacks"] = [*kept, *callbacks]
    described["data"]["engines"] = {"threads": 1, "batch_tokens": 128, "batch_samples": 8}
    file.write_text(yaml.safe_dump(described))
    code, output = run("fit", "--config", str(file), timeout=600)
    assert code == 0, output
    assert store_files(folder) == [] and not (folder / "failed_samples.jsonl").exists()
    summary: dict[str, Any] = json.loads((folder / "pipeline.json").read_text())
    losses = metrics(folder, "train/loss")
    assert len(losses) == summary["steps"] >= 6 and sum(losses[-3:]) < sum(losses[:3])
    return summary, output


def test_answers_and_states_in_one_pass(world: dict[str, Path], tmp_path: Path) -> None:
    summary, _ = fit(tmp_path, world, engine="vllm")
    assert summary["engine"] == "vllm" and summary["samples_failed"] == 0


def test_the_draft_in_training_speculates_for_the_engine_that_answers(world: dict[str, Path], tmp_path: Path) -> None:
    """Its weights are refreshed in place, its acceptance is logged, and another engine captures what was said."""
    fit(tmp_path, world, engine="transformers", callbacks=(SERVE,), answer_workers=1)
    (log,) = [file.read_text() for file in (tmp_path / "logs").glob("vllm_answers*.log")]
    assert "vLLM is up with the draft of step 0" in log
    refreshed = [int(step) for step in re.findall(r"speculates with the draft of step (\d+)", log)]
    assert refreshed and refreshed == sorted(refreshed) and all(step % 3 == 0 for step in refreshed)
    accepted = metrics(tmp_path, "pipeline/answer_acceptance_length")
    assert accepted and all(1.0 <= length <= 4.0 for length in accepted)
    assert sorted(path.name for path in (tmp_path / "serve").iterdir())[-1].startswith("step-") and len(list((tmp_path / "serve").iterdir())) == 2
