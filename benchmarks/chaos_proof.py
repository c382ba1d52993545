"""What must be true after (and during) a seed of ``chaos.py``: each function returns the breaches that it found, in words."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_parts import PackBounds


def over_budget(folder: Path, allowed: int) -> list[str]:
    """Records in shared memory against the budget (and what a worker that was cut off in a write may add: its key is deleted once more later)."""
    used = 0
    for path in (folder / "shm").glob("*/r*"):
        try:
            used += path.stat().st_size
        except FileNotFoundError:
            pass
    return [f"{used} bytes in the store, {allowed} allowed"] if used > allowed else []


def left_behind(folder: Path, token: str) -> list[str]:
    """Files and processes of a group that is closed, and records that vanished while they were owed (the run heals that, but it must not happen)."""
    found = [f"file left in shared memory: {name}" for name in os.listdir(folder / "shm")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"TORCHSPEC_TOKEN={token}".encode() in (entry / "environ").read_bytes() or token.encode() in (entry / "cmdline").read_bytes():
                    found.append(f"process {entry.name} is left")
            except OSError:
                pass
    for text in (folder / "logs" / "coordinator.log").read_text().splitlines():
        if "could not use" in text and "store missing" in text:
            found.append(f"a record that was owed is gone: {text[24:200]}")
    return found


def not_exactly_once(
    ledger: Sequence[dict[str, Any]], failed_path: Path, train: PackBounds, *, validation: int, epochs: int, poison: Sequence[int]
) -> list[str]:
    """Every sample exactly once an epoch, in plan order, with its own states, or named as failed."""
    failed: Counter[tuple[int, int]] = Counter()
    if failed_path.exists():
        for text in failed_path.read_text().splitlines():
            entry = json.loads(text)
            if entry["stage"] == "train":
                failed[entry["epoch"], entry["sample"]] += 1
    found = [f"wrong states: {entry}" for entry in ledger if entry["wrong"]]
    trained = Counter((entry["epoch"], sample) for entry in ledger if entry["kind"] == "train" for sample in entry["samples"])
    packs: dict[int, list[int]] = {}
    checked: dict[int, list[int]] = {}
    for entry in ledger:
        if entry["kind"] == "train":
            packs.setdefault(entry["epoch"], []).append(entry["pack"])
        elif entry["kind"] == "validate":
            checked.setdefault(entry["epoch"], []).extend(entry["samples"])
    for epoch in range(epochs):
        for sample in range(len(train.lengths)):
            times, named = trained[epoch, sample], failed[epoch, sample]
            if times + min(named, 1) != 1 or (sample in poison and times):
                found.append(f"epoch {epoch} sample {sample}: trained {times} times, named as failed {named} times")
        if packs.get(epoch, []) != list(range(len(train.plan(epoch)))):
            found.append(f"epoch {epoch}: {len(packs.get(epoch, []))} packs, or not in the plan's order")
        if epoch in checked and sorted(checked[epoch]) != list(range(validation)):
            found.append(f"validation of epoch {epoch}: {len(checked[epoch])} samples")
    return found
