"""The names of workers that a coordinator starts are theirs alone: whoever comes by hand with one is told so, whether the real one is there already or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchspec.engines.exchange import Exchange
from torchspec.engines.greeting import prove
from torchspec.engines.ledger import Ledger
from torchspec.engines.messages import Hello, Ready, Stop, Welcome
from torchspec.engines.supervisor import Supervisor, WorkerProcess

TOKEN = "of the run"


class Line:
    """The coordinator's end of a connection, without a socket."""

    def __init__(self) -> None:
        self.name = "?"
        self.heard: list[Any] = []
        self.open = True

    def send(self, message: Any) -> None:
        self.heard.append(message)

    def accept(self, expected: Any) -> None:
        pass

    def close(self) -> None:
        self.open = False


class Deleter:
    call = 0

    def delete(self, keys: list[str]) -> None:
        pass


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    limits = {"start_timeout": 600.0, "silence_timeout": 30.0, "max_restarts": 3, "lease_timeout": 300.0}
    config = {"token": TOKEN, "engines": limits, "max_length": 8, "run": "r", "incarnation": 0, "target": {}, "engine": "transformers"}
    config |= {"on_policy": None, "images": False}
    process = WorkerProcess("worker-0", "cpu", tmp_path / "log", word="of the process")
    supervisor = Supervisor([process], limits=limits, on_end=lambda name: None, on_fatal=pytest.fail)
    ledger = Ledger(prefix="r/0", budget=10**6, reserve=0, nbytes=lambda tokens: tokens, max_attempts=3, max_failed_fraction=1.0, lease_timeout=300.0)
    made = Exchange(config, ledger, spec={}, now=lambda: 0.0, workers=supervisor, stop=pytest.fail)
    made.store_is_up({"kind": "shm"}, Deleter())  # type: ignore[arg-type]
    return made


def greeted(exchange: Exchange, name: str, word: str = "", token: str = TOKEN) -> Line:
    line: Any = Line()
    exchange._made(line)
    proof = prove(token, line.heard[0].nonce, "worker", name, word=word)
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
    exchange._received(own, Ready(spec={}, info={}, max_tokens=100))
    assert exchange.views["worker-0"].peer is own and exchange.views["worker-0"].ready


def test_other_names_and_wrong_tokens_are_as_before(exchange: Exchange) -> None:
    assert isinstance(greeted(exchange, "by-hand").heard[-1], Welcome)
    for line in (greeted(exchange, "worker-0", "of an earlier process"), greeted(exchange, "worker-0", token="guess"), greeted(exchange, "x", token="guess")):
        assert not line.open and "wrong run token" in line.heard[-1].error
    assert "connected already" in greeted(exchange, "by-hand").heard[-1].error
