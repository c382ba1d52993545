"""Extract, tee and replay by the command line, with the real engine, store and draft."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.e2e.runs import make, run, save_world

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[dict[str, str]]:
    """Every figure of the draft that the run logged, as text: equal text is equal bits."""
    rows = csv.DictReader((folder / "metrics" / "csv" / "metrics.csv").open())
    return [{k: v for k, v in row.items() if k.startswith(("train/", "val/")) and v} for row in rows]


def test_replays_are_the_online_run_bit_for_bit(tmp_path: Path) -> None:
    world = save_world(tmp_path / "world", train=24, validate=7)
    online = make(tmp_path / "online", world, data__tee=str(tmp_path / "teed"))
    for words in (
        ("fit", "--config", str(online)),
        ("extract", "--config", str(online), "--output", str(tmp_path / "extracted"), "--data.tee", "null", "--part", "2/2"),
        ("extract", "--config", str(online), "--output", str(tmp_path / "extracted"), "--data.tee", "null", "--data.engines.deterministic", "true"),
    ):
        code, output = run(*words)
        assert code == 0, output
    assert "16 records written, 15 were there, 0 failed" in output  # the second call found what the first one wrote
    for name in ("teed", "extracted"):
        replay = make(tmp_path / f"from_{name}", world, data__engine="replay", data__records=str(tmp_path / name))
        code, output = run("fit", "--config", str(replay))
        assert code == 0, output
        assert "replay of 31 records" in output
        assert losses(tmp_path / f"from_{name}") == losses(tmp_path / "online") != []
        assert json.loads((tmp_path / f"from_{name}" / "pipeline.json").read_text())["store"] == "shards"
        assert not any((tmp_path / f"from_{name}" / "shm").iterdir())
