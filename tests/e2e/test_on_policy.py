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
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]
SERVE = {"class_path": "torchspec.callbacks.on_policy.ServeDraft", "init_args": {"every_n_steps": 3}}


def fit(folder: Path, world: dict[str, Path], *, engine: str, callbacks: tuple[dict[str, Any], ...] = (), **policy: Any) -> list[float]:
    """A whole run; the loss of each step."""
    folder.mkdir()
    file = config(folder, world["target"], world["train"], None, data__engine=engine, data__on_policy={"max_new_tokens": 24, **policy})
    described = yaml.safe_load(file.read_text())
    kept = [c for c in described["trainer"]["callbacks"] if not c["class_path"].endswith(("AcceptanceLength", "ExportDraft"))]
    described["trainer"]["callbacks"] = [*kept, *callbacks]
    described["data"]["engines"] = {"threads": 1, "batch_tokens": 128, "batch_samples": 8}
    file.write_text(yaml.safe_dump(described))
    code, output = run("fit", "--config", str(file), timeout=600)
    assert code == 0, output
    assert store_files(folder) == [] and not (folder / "failed_samples.jsonl").exists()
    summary = json.loads((folder / "pipeline.json").read_text())
    assert summary["engine"] == engine and summary["samples_failed"] == 0
    losses = metrics(folder, "train/loss")
    assert len(losses) == summary["steps"] >= 6
    return losses


def test_both_forms_train_on_the_same_answers(tmp_path: Path) -> None:
    """One engine answers and captures in one pass; or one answers, speculating with the draft in training, whose weights are refreshed in place and whose
    acceptance is logged, and another captures. Greedy answers are the target's own either way: the losses of all steps agree."""
    world = save_world(tmp_path, train=100, validate=2)
    one_pass = fit(tmp_path / "one", world, engine="vllm")
    two = fit(tmp_path / "two", world, engine="transformers", callbacks=(SERVE,), answer_workers=1)
    assert two == pytest.approx(one_pass, rel=1e-4)
    (log,) = [file.read_text() for file in (tmp_path / "two" / "logs").glob("vllm_answers*.log")]
    assert "vLLM is up with the draft of step 0" in log
    refreshed = [int(step) for step in re.findall(r"speculates with the draft of step (\d+)", log)]
    assert refreshed and refreshed == sorted(refreshed) and all(step % 3 == 0 for step in refreshed)
    accepted = metrics(tmp_path / "two", "pipeline/answer_acceptance_length")
    assert accepted and all(1.0 <= length <= 4.0 for length in accepted)
    served = list((tmp_path / "two" / "serve").iterdir())
    assert len(served) == 2 and all(path.name.startswith("step-") for path in served)
