"""Drafts on their way to the workers that answer: which of them are on disk, which one a worker takes, and what it reports meanwhile."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engines.parts import save_tiny, spec_of
from torchspec.callbacks import on_policy
from torchspec.callbacks.on_policy import ServeDraft
from torchspec.engines.engine import EngineConfig, Job, OnPolicy
from torchspec.engines.messages import Answered, Failed, Lease, NewDraft, PartialAnswer, Report, Stop, Work
from torchspec.engines.vllm.answering import AnsweringEngine
from torchspec.engines.vllm.draft_weights import DraftWeights
from torchspec.engines.worker import _loop
from torchspec.models.eagle3.family import EAGLE3
from torchspec.target import TargetConfig


class Training:
    """As much of a trainer as the callback asks for."""

    is_global_zero = True
    global_step = 0

    def __init__(self, folder: Path) -> None:
        self.default_root_dir = str(folder)
        self.announced: list[Path] = []
        self.strategy = SimpleNamespace(barrier=lambda name: None)
        client = SimpleNamespace(new_draft=lambda path, step, speculative: self.announced.append(Path(path)), close=lambda: None)
        self.datamodule = SimpleNamespace(connect=lambda name: client)

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def serve(callback: ServeDraft, trainer: Any, steps: list[int]) -> None:
    """A fit that begins at the first step and reaches the others."""
    module = SimpleNamespace(target=None, family=EAGLE3)
    for step in steps:
        trainer.global_step = step
        if step == steps[0]:
            callback.on_train_start(trainer, module)
        else:
            callback.on_train_batch_end(trainer, module, None, None, 0)
        there = {path.name for path in trainer.announced if path.is_dir()}
        assert there == {f"step-{served}" for served in steps[: steps.index(step) + 1][-2:]}, (step, there)
        assert {path.name for path in (Path(trainer.default_root_dir) / "serve").iterdir()} == there
    callback.teardown(trainer, module, "fit")


@pytest.mark.parametrize("again", ["another process", "the same one"])
def test_the_draft_just_announced_is_there_whatever_an_earlier_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    monkeypatch.setattr(on_policy, "export_checkpoint", lambda checkpoint, target, out: out.mkdir())
    first = ServeDraft(50)
    serve(first, Training(tmp_path), [0, 50, 100, 150])
    (tmp_path / "serve" / "step-200.ckpt").touch()  # it was killed as it exported
    serve(first if again == "the same one" else ServeDraft(50), Training(tmp_path), [75, 100, 150])  # resumed
    serve(ServeDraft(50), Training(tmp_path), [0, 50])  # begun anew


class Line:
    """A connection to a coordinator that says these batches, one a turn, and then stops."""

    def __init__(self, *batches: list[Any]) -> None:
        self._turns: list[Any] = [message for batch in batches for message in [*batch, None]] + [Stop()]
        self.sent: list[Any] = []

    def receive(self, timeout: float) -> Any:
        return self._turns.pop(0)

    def send(self, message: Any) -> None:
        self.sent.append(message)


class Answers:
    """An engine that takes drafts when it holds nothing, and finishes a lease a poll."""

    def __init__(self) -> None:
        self.held: list[Lease] = []
        self.asked: list[str] = []

    def room(self) -> tuple[int, int]:
        return 0, 0

    def submit(self, leases: list[Lease]) -> None:
        self.held += leases

    def cancel(self, leases: list[int]) -> list[int]:
        return []

    def poll(self, timeout: float) -> tuple[list[Answered], list[Failed]]:
        return [Answered(self.held.pop(0).id, b"")], []

    def take_draft(self, path: str, step: int, speculative: dict[str, Any]) -> bool:
        self.asked.append(path)
        return not self.held


def draft(step: int) -> NewDraft:
    return NewDraft(path=f"step-{step}", step=step, speculative=EAGLE3.speculative(f"step-{step}", 3))


def lease(number: int) -> Lease:
    return Lease(number, "", "train", number, struct.pack("<3i", 5, 6, 7), generate_from=PartialAnswer(4, 0))


def test_of_several_drafts_the_newest_is_taken() -> None:
    engine = Answers()
    _loop(Line([draft(0), draft(50), draft(100)], [], []), engine)  # type: ignore[arg-type]
    assert engine.asked == ["step-100"]


def test_answers_are_reported_while_a_draft_waits_for_the_last_of_them() -> None:
    engine, line = Answers(), Line([Work(leases=[lease(0), lease(1)]), draft(50)], [], [draft(100)], [])
    _loop(line, engine)  # type: ignore[arg-type]
    assert [done.lease for report in line.sent if isinstance(report, Report) for done in report.answered] == [0, 1]
    assert engine.asked == ["step-50", "step-50", "step-100"]


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[AnsweringEngine]:
    target = save_tiny(tmp_path / "target")
    job = Job(TargetConfig(str(target)), spec_of(target), {"kind": "shm"}, EngineConfig(), max_length=64, device="cpu", on_policy=OnPolicy())
    made = AnsweringEngine(job)
    yield made
    made.close()


def test_a_vllm_that_cannot_take_a_draft_first_finishes_what_it_holds(answering: AnsweringEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    ended: list[Any] = []

    def launch(speculative: dict[str, Any]) -> None:
        path = speculative["model"]
        launched.append(path)
        answering._llm = SimpleNamespace(shutdown=lambda: ended.append(path))

    monkeypatch.setattr(answering, "_launch", launch)
    monkeypatch.setattr(answering, "_reload", lambda path: "shares its head")
    assert answering.room() == (0, 0)
    assert answering.take_draft("a", 0, EAGLE3.speculative("a", 3)) and answering.room()[0] > 0
    answering._held[0] = 7
    for path in ("b", "b", "c"):
        assert not answering.take_draft(path, 1, EAGLE3.speculative(path, 3)) and answering.room() == (0, 0)
    assert launched == ["a"] and ended == []
    answering._results.put(Answered(0, b""))
    assert answering.poll(1.0) == ([Answered(0, b"")], [])
    assert answering.take_draft("c", 2, EAGLE3.speculative("c", 3)) and answering.room()[0] > 0
    assert launched == ["a", "c"] and ended == ["a"]


def test_a_draft_that_is_not_there_is_not_taken(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    worker = DraftWeights()
    model = SimpleNamespace(lm_head=object(), model=SimpleNamespace())
    worker.model_runner = SimpleNamespace(drafter=SimpleNamespace(model=model), get_model=lambda: SimpleNamespace(lm_head=object()))
    assert worker.take_draft(str(tmp_path / "gone")) == f"there are no weights in {tmp_path / 'gone'}"
