"""Who is let in as a worker, under which name, and what is said of those that are of no use: the coordinator's side, without sockets and processes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from torchspec.engines.attendance import Attendance
from torchspec.engines.client import Endpoint
from torchspec.engines.desk import Desk
from torchspec.engines.engine import EngineConfig
from torchspec.engines.exchange import Exchange
from torchspec.engines.group import GroupConfig
from torchspec.engines.handshake import prove
from torchspec.engines.ledger import Ledger
from torchspec.engines.messages import Hello, Ready, Stop, Unfit, Welcome
from torchspec.engines.supervisor import Supervisor, WorkerProcess
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import StoreConfig

RECORD = RecordSpec(target="t", tokenizer="", aux_layers=(1, 2), hidden_size=4, dtype="float32")
SPEC = RECORD.to_dict()
TOKEN = "of the run"


class Line:
    """The coordinator's end of a connection, without a socket."""

    def __init__(self) -> None:
        self.name, self.host = "?", "10.0.0.7"
        self.heard: list[Any] = []
        self.open = True

    def send(self, message: Any) -> None:
        self.heard.append(message)

    def accept(self, expected: Any) -> None:
        pass

    def close(self) -> None:
        self.open = False

    abort = close


class Deleter:
    call = 0

    def delete(self, keys: list[str]) -> None:
        pass


class House:
    """An exchange with a clock that the test turns, and all that it says."""

    def __init__(self, folder: Path, *, workers: int, min_workers: int = 1) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.stops: list[tuple[str, list[str] | None]] = []
        group = GroupConfig(
            target=TargetConfig("t"),
            spec=RECORD,
            store=StoreConfig(),
            engine="transformers",
            engines=EngineConfig(workers=0, start_timeout=600.0, silence_timeout=30.0, max_restarts=3, lease_timeout=300.0),
            budget=10**6,
            reserve=0,
            max_length=8,
            log_dir=folder,
            run="r",
            token=TOKEN,
        )
        config = group.resolved()
        names = [f"worker-{i}" for i in range(workers)]
        self.processes = [WorkerProcess(name, "cpu", folder / name, secret="of the process") for name in names]
        attendance = Attendance(names, (), min_workers=min_workers, timeout=None, say=self.lines.append, stop=self._stop)
        self.supervisor = Supervisor(
            self.processes, limits=config.engines, on_end=lambda name, how: self.exchange.worker_ended(name, how), on_given_up=attendance.given_up
        )
        ledger = Ledger(prefix="r/0", budget=10**6, reserve=0, nbytes=lambda tokens: tokens, max_attempts=3, max_failed_fraction=1.0, lease_timeout=300.0)
        desk = Desk(config, ledger, now=lambda: self.now, workers=self.supervisor, attendance=attendance, say=self.lines.append)
        self.exchange = Exchange(desk, stop=self._stop)
        self.exchange.store_is_up({"kind": "shm"}, Deleter())  # type: ignore[arg-type]

    def _stop(self, error: str, user: list[str] | None = None) -> None:
        self.stops.append((error, user))

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            self.exchange.tick(self.now, 1.0)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, workers=1)


@pytest.fixture
def exchange(house: House) -> Exchange:
    return house.exchange


def greeted(exchange: Exchange, name: str, secret: str = "", token: str = TOKEN) -> Line:
    line: Any = Line()
    exchange._made(line)
    proof = prove(token, line.heard[0].nonce, "worker", name, secret=secret)
    exchange._received(line, Hello(proof=proof, role="worker", name=name))
    return line


@pytest.mark.parametrize("loading", [True, False])
def test_a_name_of_a_supervised_worker_is_refused_by_hand(exchange: Exchange, loading: bool) -> None:
    if not loading:
        own = greeted(exchange, "worker-0", "of the process")
    hand = greeted(exchange, "worker-0")
    assert not hand.open and isinstance(hand.heard[-1], Stop) and "worker-0 is a worker that this run started itself" in hand.heard[-1].error
    if loading:
        own = greeted(exchange, "worker-0", "of the process")
    assert own.open and isinstance(own.heard[-1], Welcome)
    exchange._received(own, Ready(spec=SPEC, info={}, max_tokens=100))
    assert exchange.views["worker-0"].peer is own and exchange.views["worker-0"].ready


def test_other_names_and_wrong_tokens_are_as_before(exchange: Exchange) -> None:
    assert isinstance(greeted(exchange, "by-hand").heard[-1], Welcome)
    for line in (greeted(exchange, "worker-0", "of an earlier process"), greeted(exchange, "worker-0", token="guess"), greeted(exchange, "x", token="guess")):
        assert not line.open and "wrong run token" in line.heard[-1].error


def test_a_name_that_is_there_already_is_made_another(exchange: Exchange) -> None:
    """Somebody's second worker, or one that was started again while its old connection is not given up yet: refusing it would cost its host for that long."""
    first, second, third = (greeted(exchange, "by-hand") for _ in range(3))
    assert list(exchange.views) == ["by-hand", "by-hand.2", "by-hand.3"]
    for line in (first, second, third):
        assert isinstance(line.heard[-1], Welcome)
        exchange._received(line, Ready(spec=SPEC, info={}, max_tokens=100))
    exchange._lost(first)  # type: ignore[arg-type]
    assert exchange.views["by-hand.2"].peer is second and set(exchange.views) == {"by-hand.2", "by-hand.3"}


@pytest.mark.parametrize("name", ["", "two\nlines", "x" * 200, "\x1b[31m"])
def test_a_name_that_is_no_word_is_refused(exchange: Exchange, name: str) -> None:
    assert "no printable word" in greeted(exchange, name).heard[-1].error


OTHER = {
    "another type": ({**SPEC, "dtype": "bfloat16"}, 100, "dtype is 'bfloat16', the trainer expects 'float32'"),
    "other layers": ({**SPEC, "aux_layers": [1, 3]}, 100, "aux_layers is [1, 3], the trainer expects [1, 2]"),
    "nothing of it": ({}, 100, "dtype is None"),
    "too short": (SPEC, 4, "takes at most 4 tokens, data.max_length is 8"),
}


@pytest.mark.parametrize(("spec", "tokens", "why"), OTHER.values(), ids=OTHER.keys())
def test_a_late_worker_of_another_kind_is_refused_and_the_run_goes_on(house: House, spec: dict[str, Any], tokens: int, why: str) -> None:
    own = greeted(house.exchange, "worker-0", "of the process")
    house.exchange._received(own, Ready(spec=SPEC, info={"host": "a"}, max_tokens=100))
    hand = greeted(house.exchange, "hand")
    house.exchange._received(hand, Ready(spec=spec, info={"host": "b"}, max_tokens=tokens))
    stop = hand.heard[-1]
    assert isinstance(stop, Stop) and stop.refused and why in stop.error and not hand.open
    assert house.lines[-1].startswith("worker hand (10.0.0.7) is refused, the run goes on without it: it ") and why in house.lines[-1]
    house.exchange._lost(hand)  # type: ignore[arg-type]
    assert not house.stops and list(house.exchange.views) == ["worker-0"] and len(house.lines) == 2


def test_one_of_ours_of_another_kind_ends_the_run_and_is_not_started_again(house: House) -> None:
    own = greeted(house.exchange, "worker-0", "of the process")
    house.exchange._received(own, Ready(spec={**SPEC, "dtype": "bfloat16"}, info={}, max_tokens=100))
    house.processes[0].process = Dead(-9)  # type: ignore[assignment]
    house.supervisor.watch(1.0, {})
    house.supervisor.watch(1.1, {})
    assert [error for error, _ in house.stops] == ["worker-0 would write other records than this run needs: dtype is 'bfloat16', the trainer expects 'float32'"]
    assert house.processes[0].given_up


class Dead:
    """A process that has ended."""

    pid = 2**22 + 1  # above what Linux gives

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def test_why_a_worker_cannot_serve_reaches_the_user(tmp_path: Path) -> None:
    """Of ours it ends the run, as the error that it was; of others it is said, and the run goes on."""
    house = House(tmp_path, workers=2)
    error = UserError("data.target.path", "t", "does not load", "check it")
    hand = greeted(house.exchange, "hand")
    house.exchange._received(hand, Unfit(words=error.words))
    house.exchange._lost(hand)  # type: ignore[arg-type]
    assert house.lines == [f"worker hand (10.0.0.7) cannot serve, the run goes on without it: {error}"]
    for i, process in enumerate(house.processes):
        assert not house.stops
        own = greeted(house.exchange, f"worker-{i}", "of the process")
        process.process = Dead(2)  # type: ignore[assignment]
        house.supervisor.watch(1.0, {})  # sees that it is dead before its words were read
        house.exchange._received(own, Unfit(words=error.words))
        house.supervisor.watch(1.1, {})
    assert house.lines[-1] == f"worker worker-0 is not started again, 1 of 2 are left: {error}"
    assert house.stops == [(str(error), error.words)]


def test_a_worker_that_ends_before_it_is_ready_is_spoken_of(house: House) -> None:
    hand = greeted(house.exchange, "hand")
    house.exchange._lost(hand)  # type: ignore[arg-type]
    assert house.lines == ["worker hand (10.0.0.7) ended before it was ready; what it printed says why"] and not house.stops


def test_a_worker_that_never_becomes_ready_is_let_go(house: House) -> None:
    hand = greeted(house.exchange, "hand")
    house.wait(599)
    assert hand.open
    house.wait(3)
    assert not hand.open and "was not ready after data.engines.start_timeout=600 s" in hand.heard[-1].error and hand.heard[-1].refused
    assert not house.stops and sum("start_timeout" in line for line in house.lines) == 1


def test_a_worker_that_dies_before_its_first_lease_is_no_trouble(tmp_path: Path) -> None:
    house = House(tmp_path, workers=0)
    for _ in range(2):
        hand = greeted(house.exchange, "hand")
        house.exchange._received(hand, Ready(spec=SPEC, info={"host": "n\n1"}, max_tokens=100))
        house.exchange._lost(hand)  # type: ignore[arg-type]
    assert house.lines == ["worker hand joined (host 10.0.0.7): 1 alive", "worker hand left (host 10.0.0.7, its connection ended): 0 alive"] * 2
    house.wait(10)
    assert house.lines[-1].startswith("no worker alive for 10 s") and not house.stops


def test_a_silent_worker_leaves_with_the_reason(tmp_path: Path) -> None:
    house = House(tmp_path, workers=0)
    hand = greeted(house.exchange, "hand")
    house.exchange._received(hand, Ready(spec=SPEC, info={"host": "n1"}, max_tokens=100))
    house.wait(32)
    assert not hand.open
    house.exchange._lost(hand)  # type: ignore[arg-type]
    assert house.lines[-1] == "worker hand left (host n1, silent for more than 30 s (data.engines.silence_timeout)): 0 alive"


def test_a_wrong_token_is_said_once_a_minute(house: House) -> None:
    for _ in range(5):
        line = greeted(house.exchange, "hand", token="guess")
        assert "wrong run token" in line.heard[-1].error and not line.open
    assert house.lines == ["worker 'hand' (10.0.0.7) is refused, the run goes on without it: wrong run token"]
    house.wait(61)
    house.lines.clear()
    greeted(house.exchange, "hand", token="guess")
    assert len(house.lines) == 1


def test_another_protocol_is_refused_in_words_that_it_can_read(house: House) -> None:
    """A ``Stop`` of every version so far has one field."""
    line: Any = Line()
    house.exchange._made(line)
    house.exchange._received(line, Hello(proof=b"", role="worker", name="old", protocol=3))
    assert msgspec.to_builtins(line.heard[-1]).keys() == {"type", "error"}
    assert "speaks protocol 3, this run 5: install the same version" in line.heard[-1].error and "protocol 3" in house.lines[-1]


def test_who_leaves_when_the_run_ends_is_no_news(house: House) -> None:
    own = greeted(house.exchange, "worker-0", "of the process")
    house.exchange._received(own, Ready(spec=SPEC, info={"host": "a"}, max_tokens=100))
    late = greeted(house.exchange, "late")
    house.exchange.close("")
    for line in (own, late):
        assert line.heard[-1] == Stop() and not line.open
        house.exchange._lost(line)  # type: ignore[arg-type]
    assert house.lines == ["worker worker-0 joined (host a): 1 alive"]


def test_a_worker_that_was_ready_is_started_again_and_given_up_after_its_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it says that it cannot serve: a server of somebody else's may come back."""
    house = House(tmp_path, workers=1)
    (process,) = house.processes
    started: list[float] = []
    monkeypatch.setattr(
        WorkerProcess, "start", lambda self, endpoint, *, now: (started.append(now), setattr(self, "process", Dead(2)), self.__dict__.update(seen_dead=False))
    )
    house.supervisor.start(Endpoint("h", 1, "t"), now=0.0)
    process.ready = process.was_ready = True
    error = UserError("data.engines.engine_args.url", "u", "does not answer", "start it")
    now = 0.0
    while not house.stops and now < 100:
        now += 0.1
        house.supervisor.watch(now, {})
        process.user = error.words
    assert len(started) == 4 and [round(b - a, 1) for a, b in pairwise(started)] == pytest.approx([0.7, 1.2, 2.2], abs=0.11)
    assert house.stops == [(str(error), error.words)]
