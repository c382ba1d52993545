"""The samples that were given up: ``failed_samples.jsonl`` in the run's folder, one JSON line each with its place in the data and the engine's reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torchspec.data.samples import Samples
from torchspec.engines.messages import Failure


def append_failures(path: Path, failures: Sequence[Failure], *, stage: str, epoch: int, pack: int, dataset: Samples) -> None:
    """Add the samples that a pack lacks; ranks of a host may append at the same time (one write a call)."""
    lines = [
        {"stage": stage, "epoch": epoch, "pack": pack, "sample": f.index, "place": dataset.place(f.index), "reason": f.reason, "attempts": f.attempts}
        for f in failures
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        handle.write("".join(json.dumps(line) + "\n" for line in lines))


def cut_failures(path: Path, *, epoch: int, pack: int) -> None:
    """Forget training failures at or after a position: these packs are trained again."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    kept = [line for line in lines if (entry := json.loads(line))["stage"] != "train" or (entry["epoch"], entry["pack"]) < (epoch, pack)]
    if len(kept) == len(lines):
        return
    if not kept:
        path.unlink()
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
