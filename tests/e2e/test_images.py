"""A draft for a vision-language target, from rows with images to exported weights, and again from the records on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import config, run
from tests.e2e.test_replay import losses
from tests.tiny_vl import save_image, save_vl_target

pytestmark = pytest.mark.slow


def save_rows(file: Path, rows: int, *, seed: int) -> Path:
    """The same words about different images: only the records can tell these conversations apart."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        for row in range(rows):
            save_image(file.parent / f"{seed}-{row}.png", width=56 + 28 * (row % 2), height=84, seed=100 * seed + row)
            question = [{"type": "image", "image": f"{seed}-{row}.png"}, {"type": "text", "text": "what runs under the small cat"}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a red dog sleeps where the big cat runs over you"}]
            handle.write(json.dumps({"messages": messages}) + "\n")
    return file


def test_a_draft_is_trained_on_images(tmp_path: Path) -> None:
    target = save_vl_target(tmp_path / "target", "qwen2_5_vl")
    sets = {"train": save_rows(tmp_path / "data" / "train.jsonl", 12, seed=1), "validate": save_rows(tmp_path / "data" / "validate.jsonl", 4, seed=2)}
    seen = {
        "data__media": "engine",
        "data__image_positions": "temporal",
        "data__max_tokens": 128,
        "trainer__max_epochs": 6,
        "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    online = config(tmp_path / "online", target, *sets.values(), data__tee=str(tmp_path / "teed"), **seen)
    code, output = run("fit", "--config", str(online))
    assert code == 0, output
    assert "12 of 12 conversations" in output and "are in the training data" not in output
    assert not (tmp_path / "online" / "failed_samples.jsonl").exists()
    checked = [float(row["val/loss"]) for row in losses(tmp_path / "online") if "val/loss" in row]
    assert len(checked) == 6 and checked[-1] < checked[0], checked
    exported = json.loads(next((tmp_path / "online").rglob("config.json")).read_text())
    assert "mrope_section" not in json.dumps(exported)
    replay = config(tmp_path / "replay", target, *sets.values(), data__engine="replay", data__records=str(tmp_path / "teed"), **seen)
    code, output = run("fit", "--config", str(replay))
    assert code == 0, output
    assert "replay of 16 records" in output and losses(tmp_path / "replay") == losses(tmp_path / "online")
