"""Who is there, what is said of it and when the run ends: the rules alone, with a clock that the test turns."""

from __future__ import annotations

import random

import pytest

from torchspec.engines.attendance import Attendance


class Heard:
    """Attendance, with what it said and why it stopped."""

    def __init__(self, ours: int = 0, answering: int = 0, *, min_workers: int = 1, timeout: float | None = None) -> None:
        self.lines: list[str] = []
        self.stops: list[tuple[str, list[str] | None]] = []
        names = [f"worker-{i}" for i in range(ours)]
        answerers = [f"vllm_answers-{i}" for i in range(answering)]
        self.of = Attendance(names, answerers, min_workers=min_workers, timeout=timeout, say=self.lines.append, stop=self._stop)
        self.of.logs, self.of.joins = "logs in L", "more may join by J"

    def _stop(self, error: str, user: list[str] | None = None) -> None:
        self.stops.append((error, user))

    def wait(self, seconds: float) -> list[str]:
        """What is said in so many seconds."""
        before = len(self.lines)
        for _ in range(round(seconds * 10)):
            self.of.tick(0.1)
        return self.lines[before:]


def test_no_worker_is_said_after_ten_seconds_and_every_minute() -> None:
    heard = Heard()
    assert heard.wait(9.5) == []
    assert heard.wait(1.0) == ["no worker alive for 10 s: more may join by J"]
    assert heard.wait(48) == []
    assert heard.wait(65) == ["no worker alive for 60 s: more may join by J", "no worker alive for 120 s: more may join by J"]
    heard.of.joined("hand", "h")
    assert heard.wait(200) == [] and heard.lines[-1] == "worker hand joined (host h): 1 alive"
    heard.of.left("hand", "its connection ended")
    assert heard.lines[-1] == "worker hand left (host h, its connection ended): 0 alive"
    assert heard.wait(11) == ["no worker alive for 10 s: more may join by J"]
    assert not heard.stops


def test_those_of_ours_that_load_are_spoken_of() -> None:
    heard = Heard(ours=2)
    assert heard.wait(29) == []
    assert heard.wait(2) == ["waiting for 2 workers to load the target, 30 s so far: logs in L"]
    assert heard.wait(30) == ["waiting for 2 workers to load the target, 60 s so far: logs in L"]


def test_joins_and_leaves_are_said_once() -> None:
    heard = Heard(ours=2)
    heard.of.joined("worker-0", "a")
    heard.of.joined("worker-1", "a")
    heard.of.left("worker-0", "ended with signal 9")
    heard.of.left("worker-0", "ended with signal 9")
    heard.of.left("stranger", "its connection ended")  # never ready
    assert heard.lines == [
        "worker worker-0 joined (host a): 1 alive",
        "worker worker-1 joined (host a): 2 alive",
        "worker worker-0 left (host a, ended with signal 9): 1 alive",
    ]


def test_one_bad_worker_of_many_is_no_end_and_the_last_one_is() -> None:
    heard = Heard(ours=3)
    heard.of.given_up("worker-1", "worker-1 ended with code 1", None)
    heard.of.joined("worker-0", "a")
    assert heard.lines[0] == "worker worker-1 is not started again, 2 of 3 are left: worker-1 ended with code 1" and not heard.stops
    heard.of.given_up("worker-2", "worker-2 ended with code 1", None)
    assert not heard.stops
    heard.of.left("worker-0", "ended with signal 9")  # it is started again
    assert not heard.stops
    heard.of.given_up("worker-0", "worker-0 ended with signal 9 after 3 restarts", None)
    assert heard.stops == [("0 of 3 workers are left, data.engines.min_workers is 1; the last: worker-0 ended with signal 9 after 3 restarts", None)]


def test_min_workers_ends_the_run_earlier_and_workers_by_hand_count() -> None:
    heard = Heard(ours=3, min_workers=2)
    heard.of.given_up("worker-0", "r0", None)
    heard.of.joined("hand", "h")
    heard.of.given_up("worker-1", "r1", None)
    assert not heard.stops
    heard.of.left("hand", "its connection ended")
    assert heard.stops == [("1 of 3 workers are left, data.engines.min_workers is 2; the last: hand left (its connection ended)", None)]


def test_a_single_worker_ends_the_run_with_its_own_words() -> None:
    words = ["data.target.path", "'t'", "does not load", "check it"]
    for ours in (1, 2):
        heard = Heard(ours=ours)
        for i in range(ours):
            heard.of.given_up(f"worker-{i}", "data.target.path='t' does not load. Fix: check it.", words)
        assert heard.stops == [("data.target.path='t' does not load. Fix: check it.", words)]
    heard = Heard(ours=1)
    heard.of.given_up("worker-0", "reason", None)
    assert heard.stops == [("reason", None)]


def test_without_a_least_the_run_waits_for_others() -> None:
    heard = Heard(ours=1, min_workers=0)
    heard.of.given_up("worker-0", "reason", None)
    assert not heard.stops and heard.wait(11) == ["no worker alive for 10 s: more may join by J"]
    heard.of.joined("hand", "h")
    heard.of.left("hand", "its connection ended")
    assert not heard.stops


def test_no_worker_timeout_ends_the_run() -> None:
    heard = Heard(timeout=25)
    assert heard.wait(24) and not heard.stops
    heard.of.joined("hand", "h")
    heard.wait(100)
    heard.of.left("hand", "its connection ended")
    heard.wait(24)
    assert not heard.stops
    heard.wait(2)
    assert heard.stops[0] == ("no worker alive for 25 s, which is data.engines.no_worker_timeout", None)


def test_no_worker_timeout_leaves_those_that_load_their_time() -> None:
    """Each has ``start_timeout`` and ``max_restarts`` of its own."""
    heard = Heard(ours=1, min_workers=0, timeout=5)
    heard.wait(300)
    assert not heard.stops
    heard.of.given_up("worker-0", "reason", None)
    heard.wait(6)
    assert len(heard.stops) >= 1 and "no_worker_timeout" in heard.stops[0][0]


def test_fewer_than_min_workers_by_hand_are_said_and_bounded() -> None:
    heard = Heard(min_workers=3, timeout=90)
    heard.of.joined("a", "h")
    heard.of.joined("b", "h")
    assert heard.wait(11) == ["only 2 workers alive for 10 s (data.engines.min_workers is 3): more may join by J"]
    heard.wait(81)
    assert heard.stops[0][0] == "only 2 workers alive for 90 s (data.engines.min_workers is 3), which is data.engines.no_worker_timeout"


def test_those_that_only_answer_are_counted_apart() -> None:
    heard = Heard(ours=1, answering=2)
    heard.of.joined("worker-0", "a")
    heard.of.joined("vllm_answers-0", "a")
    assert heard.lines[-1] == "answering worker vllm_answers-0 joined (host a): 1 alive"
    heard.of.given_up("vllm_answers-1", "r", None)
    assert not heard.stops
    heard.of.left("vllm_answers-0", "ended with code 1")
    assert heard.wait(31) == ["waiting for 1 answering worker to load the target, 30 s so far: logs in L"]
    heard.of.given_up("vllm_answers-0", "r", None)
    assert heard.stops == [("0 of 2 answering workers are left; the last: r", None)]


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_exactly_when_too_few_are_left(seed: int) -> None:
    """Against a count kept beside it, over random comings and goings."""
    chance = random.Random(seed)
    ours, least = chance.randint(1, 4), chance.randint(0, 3)
    least = min(least, ours)
    heard = Heard(ours=ours, min_workers=least)
    possible, alive = {f"worker-{i}" for i in range(ours)}, set()
    for _ in range(200):
        name = chance.choice([f"worker-{i}" for i in range(ours)] + ["hand-0", "hand-1"])
        if name in alive:
            heard.of.left(name, "died")
            alive.discard(name)
            if name in possible and chance.random() < 0.3:
                heard.of.given_up(name, "reason", None)
                possible.discard(name)
        elif name in possible or name.startswith("hand"):
            heard.of.joined(name, "h")
            alive.add(name)
        assert bool(heard.stops) == (len(possible | alive) < least)
        if heard.stops:
            return
        assert heard.lines[-1].split(": ")[-1] == f"{len(alive)} alive" or "not started again" in heard.lines[-1]
