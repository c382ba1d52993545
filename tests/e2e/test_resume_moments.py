"""Killed with SIGKILL at chosen moments and resumed, four times in a row: inside an accumulation, inside a validation, where an epoch ends.

On one rank every loss has the bits of the unbroken run; sharded (fsdp2) on 2, 1, 2 and 1 ranks every step trains the same packs to the same loss.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.e2e.moments import trained
from tests.e2e.runs import descendants, make, metrics, run, save_world, start, store_files
from tests.engines.parts import still_running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHANGES = {"trainer__max_epochs": 2, "data__packs_per_step": 4}
Steps = dict[int, list[tuple[int, tuple[int, ...]]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=60, validate=16)


def words(folder: Path, moment: str, at: int, *more: str) -> list[str]:
    witness = ["--trainer.callbacks+=tests.e2e.moments.Witness", f"--trainer.callbacks.folder={folder}"]
    return [*witness, f"--trainer.callbacks.moment={moment}", f"--trainer.callbacks.at={at}", *more]


@pytest.fixture(scope="module")
def whole(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Steps]:
    """Losses and packs of an unbroken run over two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = run("fit", "--config", str(make(folder, world, **CHANGES)), *words(folder, "never", 0))
    assert code == 0, output
    losses, steps = metrics(folder, "train/loss"), trained(folder)
    assert len(losses) == len(steps) and all(len(packs) == 4 for packs in steps.values())
    return losses, steps


def killed(folder: Path, world: dict[str, Path], moment: str, at: int, *more: str) -> None:
    """A run that ends at a moment."""
    process = start("fit", "--config", str(make(folder, world, **CHANGES)), *words(folder, moment, at, *more))
    seen: set[psutil.Process] = set()
    while process.poll() is None:
        seen.update(descendants(process.pid))
        try:
            process.wait(0.2)
        except Exception:
            continue
    assert process.returncode == -9, process.stdout.read() if process.stdout else ""
    left = still_running(list(seen), timeout=15)
    assert not left


def chain(folder: Path, world: dict[str, Path], whole: tuple[list[float], Steps], ranks: list[list[str]]) -> list[tuple[int, list[float]]]:
    """Four runs, one after the other, of which three are killed; checks the packs and returns where each began and its losses."""
    losses, steps = whole
    epoch = len(losses) // 2
    moments = [("accumulation", 3), ("validation", epoch), ("epoch", 1), ("never", 0)]
    runs = []
    for number, ((moment, at), strategy) in enumerate(zip(moments, ranks, strict=True)):
        more = [*strategy, *(["--ckpt_path", "last"] if number else [])]
        if moment == "never":
            code, output = run("fit", "--config", str(make(folder, world, **CHANGES)), *words(folder, moment, at, *more))
            assert code == 0, output
        else:
            killed(folder, world, moment, at, *more)
        ours = trained(folder)
        begun = min(ours)
        whole_steps = [step for step in ours if step < at] if moment == "accumulation" else list(ours)
        assert {step: ours[step] for step in whole_steps} == {step: steps[step] for step in range(begun, begun + len(whole_steps))}
        if moment == "accumulation":
            assert 0 < len(ours[at]) < 4 and set(ours[at]) < set(steps[at])
        found = metrics(folder, "train/loss")
        assert len(found) == len(whole_steps)
        runs.append((begun, found))
        starts = [begun for begun, _ in runs]
    assert starts[0] == 0 and starts[1] == 2 and starts[1:] == sorted(starts[1:])
    last_begun, last = runs[-1]
    assert last_begun + len(last) == len(losses)
    return runs


def test_on_one_rank_every_resume_has_the_bits_of_the_unbroken_run(world: dict[str, Path], whole: tuple[list[float], Steps], tmp_path: Path) -> None:
    for begun, losses in chain(tmp_path, world, whole, [[]] * 4):
        assert losses == whole[0][begun : begun + len(losses)]
    assert store_files(tmp_path) == []


def test_sharded_on_two_ranks_one_two_and_one(world: dict[str, Path], whole: tuple[list[float], Steps], tmp_path: Path) -> None:
    ranks = [["--trainer.strategy", "fsdp2", "--trainer.devices", devices] for devices in ("2", "1", "2", "1")]
    for begun, losses in chain(tmp_path, world, whole, ranks):
        assert losses == pytest.approx(whole[0][begun : begun + len(losses)], rel=2e-4)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_dir() and store_files(tmp_path) == []
