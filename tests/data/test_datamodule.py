"""The datamodule under a real trainer: delivery, accumulation, limits, exact resume on any number of ranks, refusals; engines are stood in for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data import toy
from tests.tiny import save_conversations, save_target
from torchspec.data.progress import check_cursor
from torchspec.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ROWS = 61


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "target": str(save_target(folder / "target")),
        "train": str(save_conversations(folder / "train.jsonl", ROWS)),
        "validate": str(save_conversations(folder / "validate.jsonl", 13, seed=1)),
    }


def arguments(folder: Path, world: dict[str, str], **changes: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"data": {}, "trainer": {}, "checkpoint": {}, "resume": None, "die_at": None, **changes}
    return {"folder": str(folder), **world, **parts}


def fit(folder: Path, world: dict[str, str], **changes: Any) -> toy.Toy:
    return toy.fit(**arguments(folder, world, **changes))


def fit_on_two(folder: Path, world: dict[str, str], **changes: Any) -> str:
    trainer = {"devices": 2, "strategy": "ddp", **changes.pop("trainer", {})}
    words = json.dumps(arguments(folder, world, trainer=trainer, **changes))
    done = subprocess.run([sys.executable, "-m", "tests.data.toy", words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 or changes.get("die_at") is not None, done.stdout + done.stderr
    return done.stdout + done.stderr


def packs_by_step(*entries: list[dict[str, Any]]) -> dict[int, set[int]]:
    steps: dict[int, set[int]] = {}
    for entry in (e for group in entries for e in group):
        steps.setdefault(entry["step"], set()).add(entry["pack"])
    return steps


def weights(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["weight"] for entry in toy.notes(folder, "step", rank=0)}


@pytest.fixture(scope="module")
def whole(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs without a break."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    fit(folder, {**world, "validate": None}, trainer={"max_epochs": 3})  # type: ignore[dict-item]
    return folder


def test_every_sample_is_trained_once_an_epoch(whole: Path) -> None:
    trained = toy.notes(whole, "train")
    for epoch in range(3):
        mine = [e for e in trained if e["epoch"] == epoch]
        assert Counter(i for e in mine for i in e["samples"]) == Counter(range(ROWS))
        assert [e["pack"] for e in mine] == list(range(len(mine))) and len(mine) % 4 == 0
    assert len({tuple(e["samples"]) for e in trained if e["epoch"] == 1} & {tuple(e["samples"]) for e in trained if e["epoch"] == 0}) < 5
    per_step = packs_by_step(trained)
    assert all(len(packs) == 4 for packs in per_step.values()) and len(per_step) == len(toy.notes(whole, "step"))


@pytest.mark.slow
def test_two_ranks_train_the_same_steps(world: dict[str, str], whole: Path, tmp_path: Path) -> None:
    fit_on_two(tmp_path / "two", {**world, "validate": None}, trainer={"max_epochs": 2})  # type: ignore[dict-item]
    one = packs_by_step(toy.notes(whole, "train"))
    two = packs_by_step(toy.notes(tmp_path / "two", "train"))
    assert len(two) * 3 == len(one) * 2 and all(one[step] == packs for step, packs in two.items())
    assert [e["pack"] % 2 for e in toy.notes(tmp_path / "two", "train", rank=1)] == [1] * (len(two) * 2)
    ours, theirs = weights(tmp_path / "two"), weights(whole)
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-5) for step in ours)


@pytest.mark.parametrize("stop", [1, 3, "epoch end", 7])
def test_resume_goes_on_exactly(world: dict[str, str], whole: Path, tmp_path: Path, stop: int | str) -> None:
    steps = len(weights(whole))
    at = steps // 3 if stop == "epoch end" else int(stop)
    alone = {**world, "validate": None}
    fit(tmp_path / "first", alone, trainer={"max_epochs": 3, "max_steps": at})  # type: ignore[arg-type]
    fit(tmp_path / "rest", alone, trainer={"max_epochs": 3}, resume=str(tmp_path / "first" / "last.ckpt"))  # type: ignore[arg-type]
    joined = packs_by_step(toy.notes(tmp_path / "first", "train"), toy.notes(tmp_path / "rest", "train"))
    assert joined == packs_by_step(toy.notes(whole, "train"))
    assert min(weights(tmp_path / "rest")) == at
    assert {**weights(tmp_path / "first"), **weights(tmp_path / "rest")} == weights(whole)


@pytest.mark.parametrize("die_at", [5, 8, 17])
def test_resume_after_a_death_inside_a_step(world: dict[str, str], whole: Path, tmp_path: Path, die_at: int) -> None:
    """The gradient of a half step is lost, so its micro-batches are trained again."""
    alone = {**world, "validate": None}
    with pytest.raises(RuntimeError, match="died here"):
        fit(tmp_path / "first", alone, trainer={"max_epochs": 3}, checkpoint={"save_on_exception": True}, die_at=die_at)  # type: ignore[arg-type]
    saved = next((tmp_path / "first").glob("*exception*"), None) or tmp_path / "first" / "last.ckpt"
    fit(tmp_path / "rest", alone, trainer={"max_epochs": 3}, resume=str(saved))  # type: ignore[arg-type]
    assert min(weights(tmp_path / "rest")) == die_at // 4
    assert {**weights(tmp_path / "first"), **weights(tmp_path / "rest")} == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, "epoch end"])
def test_resume_on_another_number_of_ranks(world: dict[str, str], whole: Path, tmp_path: Path, stop: int | str) -> None:
    at = len(weights(whole)) // 3 if stop == "epoch end" else int(stop)
    alone = {**world, "validate": None}
    expected = packs_by_step(toy.notes(whole, "train"))
    fit(tmp_path / "one", alone, trainer={"max_epochs": 3, "max_steps": at})  # type: ignore[arg-type]
    fit_on_two(tmp_path / "two", alone, trainer={"max_epochs": 3}, resume=str(tmp_path / "one" / "last.ckpt"))  # type: ignore[arg-type]
    assert packs_by_step(toy.notes(tmp_path / "one", "train"), toy.notes(tmp_path / "two", "train")) == expected
    fit_on_two(tmp_path / "two first", alone, trainer={"max_epochs": 3, "max_steps": at})  # type: ignore[arg-type]
    fit(tmp_path / "then one", alone, trainer={"max_epochs": 3}, resume=str(tmp_path / "two first" / "last.ckpt"))  # type: ignore[arg-type]
    assert packs_by_step(toy.notes(tmp_path / "two first", "train"), toy.notes(tmp_path / "then one", "train")) == expected


def test_validation_sees_each_sample_once_each_time(world: dict[str, str], tmp_path: Path) -> None:
    fit(tmp_path / "run", world, trainer={"max_epochs": 2, "val_check_interval": 0.5, "num_sanity_val_steps": -1})
    seen = toy.notes(tmp_path / "run", "validate")
    passes: dict[tuple[bool, int], Counter[int]] = {}
    for entry in seen:
        passes.setdefault((entry["sanity"], entry["step"]), Counter()).update(entry["samples"])
    assert len(passes) == 5 and all(count == Counter(range(13)) for count in passes.values())
    assert Counter(i for e in toy.notes(tmp_path / "run", "train") for i in e["samples"]) == Counter({i: 2 for i in range(ROWS)})


def test_resume_in_the_middle_of_validations(world: dict[str, str], whole: Path, tmp_path: Path) -> None:
    trainer = {"max_epochs": 3, "val_check_interval": 8}
    fit(tmp_path / "whole", world, trainer=trainer)
    for stop in (1, 2, 3):
        first, rest = tmp_path / f"first {stop}", tmp_path / f"rest {stop}"
        fit(first, world, trainer={**trainer, "max_steps": stop})
        fit(rest, world, trainer=trainer, resume=str(first / "last.ckpt"))
        assert packs_by_step(toy.notes(first, "train"), toy.notes(rest, "train")) == packs_by_step(toy.notes(whole, "train"))
        validated = [{e["step"] for e in toy.notes(folder, "validate")} for folder in (first, rest) if any(folder.glob("notes.*"))]
        assert set.union(*validated) == {e["step"] for e in toy.notes(tmp_path / "whole", "validate")}


@pytest.mark.parametrize("stop", [3, "epoch end"])
def test_resume_of_a_run_that_counts_steps_only(world: dict[str, str], whole: Path, tmp_path: Path, stop: int | str) -> None:
    steps = len(weights(whole))
    at = steps // 3 if stop == "epoch end" else int(stop)
    alone = {**world, "validate": None}
    fit(tmp_path / "first", alone, trainer={"max_epochs": -1, "max_steps": at})  # type: ignore[arg-type]
    fit(tmp_path / "rest", alone, trainer={"max_epochs": -1, "max_steps": steps}, resume=str(tmp_path / "first" / "last.ckpt"))  # type: ignore[arg-type]
    assert {**weights(tmp_path / "first"), **weights(tmp_path / "rest")} == weights(whole)


def test_limits_take_what_they_say_and_the_next_epoch_goes_on_from_there(world: dict[str, str], whole: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", world, trainer={"max_epochs": 3, "limit_train_batches": 8, "limit_val_batches": 2})
    trained = toy.notes(tmp_path / "run", "train")
    assert len(trained) == 24
    expected = packs_by_step(toy.notes(whole, "train"))
    assert all(expected[step] == packs for step, packs in packs_by_step(trained).items())
    assert len(toy.notes(tmp_path / "run", "validate")) == 6


def test_fast_dev_run(world: dict[str, str], tmp_path: Path) -> None:
    fit(tmp_path / "run", world, trainer={"fast_dev_run": True})
    assert len(toy.notes(tmp_path / "run", "train")) == 1 and len(toy.notes(tmp_path / "run", "validate")) == 1


@pytest.mark.parametrize(
    ("data", "trainer", "said"),
    [
        ({"max_length": 300}, {}, r"data\.max_length=300 is longer than data\.max_tokens=160"),
        ({"packs_per_step": 0}, {}, r"data\.packs_per_step=0 is below 1"),
        ({}, {"accumulate_grad_batches": 3}, r"trainer\.accumulate_grad_batches=3 contradicts data\.packs_per_step=4 on 1 ranks, which means 4"),
        ({}, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
        ({}, {"overfit_batches": 2}, "overfit_batches"),
        ({}, {"limit_train_batches": 6}, r"trainer\.limit_train_batches=6 means 6 micro-batches"),
        ({}, {"limit_train_batches": 0.5}, r"trainer\.limit_train_batches=0\.5 means 10 micro-batches"),
    ],
)
def test_what_cannot_work_is_refused(world: dict[str, str], tmp_path: Path, data: dict[str, Any], trainer: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit(tmp_path / "run", world, data=data, trainer=trainer)


def test_a_module_that_does_not_say_where_it_learns_is_refused(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(toy.Toy, "supervision")
    with pytest.raises(UserError, match=r"is a Toy, which does not say where it learns. Fix: use DraftModule"):
        fit(tmp_path / "run", world)


def test_the_users_own_accumulation_may_agree(world: dict[str, str], tmp_path: Path) -> None:
    fit(tmp_path / "run", world, trainer={"accumulate_grad_batches": 4, "max_steps": 1})


@pytest.mark.parametrize(
    ("data", "said"),
    [({"packs_per_step": 2}, "packs_per_step"), ({"seed": 5}, "seed"), ({"max_tokens": 170}, "max_tokens"), ({"max_length": 40}, "content")],
)
def test_a_checkpoint_of_another_plan_is_refused(world: dict[str, str], tmp_path: Path, data: dict[str, Any], said: str) -> None:
    alone = {**world, "validate": None}
    fit(tmp_path / "first", alone, trainer={"max_steps": 1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"ckpt_path \({said}\)"):
        fit(tmp_path / "rest", alone, data=data, resume=str(tmp_path / "first" / "last.ckpt"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["packs_per_step", "seed", "max_tokens", "conversations", "content", "plan_fingerprint"])
def test_a_position_that_lacks_what_it_is_of_is_refused(name: str) -> None:
    whole = {"packs_per_step": 4, "seed": 0, "max_tokens": 160, "conversations": 24, "content": "xxh3:1", "plan_fingerprint": "2"}
    check_cursor(whole, whole)
    with pytest.raises(UserError, match=rf"ckpt_path \({name}\)"):
        check_cursor({key: value for key, value in whole.items() if key != name}, whole)


@pytest.mark.slow
def test_an_indivisible_step_is_refused_on_two_ranks(world: dict[str, str], tmp_path: Path) -> None:
    words = json.dumps(arguments(tmp_path / "run", world, trainer={"devices": 2, "strategy": "ddp"}, data={"packs_per_step": 3}))
    done = subprocess.run([sys.executable, "-m", "tests.data.toy", words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0 and "packs_per_step=3 is no multiple of the 2 ranks" in done.stderr
    assert done.stderr.count("UserError: ") == 1 and "rank1" not in done.stderr  # one rank says it
