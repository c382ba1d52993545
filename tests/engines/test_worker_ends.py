"""How a worker ends: what it says, whom it tells, with which kind of error. The coordinator is played by a thread on a real socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest

import torchspec
from torchspec.engines import worker
from torchspec.engines.connection import Closed, Framer
from torchspec.engines.engine import EngineConfig, EngineStats, Job
from torchspec.engines.messages import Beat, Challenge, Hello, Message, Ready, Stop, ToCoordinator, Unfit, Welcome
from torchspec.engines.table import EngineKind
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer.spec import RecordSpec

SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(1,), hidden_size=4, dtype="float32")
JOB = {
    "version": torchspec.__version__,
    "target": asdict(TargetConfig("t")),
    "engine": f"{__name__}:PLAYED",
    "engines": asdict(EngineConfig()),
    "max_length": 8,
}
JOB |= {"on_policy": None, "images": False}


PLAYED = EngineKind(worker=f"{__name__}:Engine")


class Engine:
    """One that does nothing."""

    max_tokens = 8
    closed = 0

    def __init__(self, job: Job) -> None:
        self.spec = job.spec

    def start(self) -> dict[str, Any]:
        return {"engine": "played"}

    def room(self) -> tuple[int, int]:
        return 0, 0

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0.0, 0.0)

    def close(self) -> None:
        type(self).closed += 1


class Coordinator:
    """The other side: what it was told, and what it says when."""

    last: Coordinator

    def __init__(self, *, to_hello: list[Message], to_ready: list[Message], job: dict[str, Any]) -> None:
        type(self).last = self
        self.heard: list[Any] = []
        self._said = {Hello: to_hello or [Welcome(run="r", incarnation=0, store={"kind": "shm"}, spec=SPEC.to_dict(), job=job)], Ready: to_ready}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            framer = Framer(ToCoordinator)
            connection.sendall(framer.encode(Challenge(nonce=b"n" * 32)))
            while data := connection.recv(65536):
                for message in framer.decode(data):
                    self.heard.append(message)
                    for answer in self._said.get(type(message), []):
                        connection.sendall(framer.encode(answer))
                    if any(isinstance(answer, Stop) for answer in self._said.get(type(message), [])):
                        return

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Coordinator]]:
    """Runs a worker against a coordinator to its end; returns the latter, with the worker's error."""
    Engine.closed = 0
    made: list[Coordinator] = []

    def run(*, to_hello: list[Message] | None = None, to_ready: list[Message] | None = None, **job: Any) -> Coordinator:
        made.append(Coordinator(to_hello=to_hello or [], to_ready=to_ready or [], job={**JOB, **job}))
        try:
            worker.work("127.0.0.1", made[-1].port, token="t", name="hand", device="cpu")
        finally:
            made[-1].thread.join(10.0)
            made[-1].heard = [message for message in made[-1].heard if not isinstance(message, Beat)]
        return made[-1]

    yield run
    for coordinator in made:
        coordinator.close()


def test_a_worker_that_is_refused_says_why(meet: Callable[..., Coordinator]) -> None:
    with pytest.raises(UserError, match=r"^coordinator='127.0.0.1:\d+' refused this worker: it would write other records\. Fix: "):
        meet(to_ready=[Stop(error="would write other records", refused=True)])
    assert Engine.closed == 1


@pytest.mark.parametrize("error", ["", "the store died"])
def test_a_run_that_ends_ends_the_worker_in_order(meet: Callable[..., Coordinator], error: str) -> None:
    coordinator = meet(to_ready=[Stop(error=error)])
    assert [type(message) for message in coordinator.heard[:2]] == [Hello, Ready] and coordinator.heard[1].info["host"] == socket.gethostname()


def test_a_worker_that_joins_while_the_run_is_ending_ends_in_order(meet: Callable[..., Coordinator]) -> None:
    assert len(meet(to_hello=[Stop()]).heard) == 1


def test_a_run_that_ended_while_the_engine_was_loading_ends_the_worker_in_order(meet: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed by the time that it says ready; the coordinator's last words are in the socket."""
    welcome = Welcome(run="r", incarnation=0, store={"kind": "shm"}, spec=SPEC.to_dict(), job=JOB)

    def lost(self: Any, message: Message) -> None:
        if isinstance(message, Ready):
            raise Closed("connection to the coordinator lost (reset)")
        send(self, message)

    send = worker.Connection.send
    monkeypatch.setattr(worker.Connection, "send", lost)
    meet(to_hello=[welcome, Stop()])
    with pytest.raises(UserError, match="refused this worker"):
        meet(to_hello=[welcome, Stop(error="was too slow", refused=True)])


def test_a_refusal_at_the_door_is_said(meet: Callable[..., Coordinator]) -> None:
    with pytest.raises(UserError, match="wrong run token"):
        meet(to_hello=[Stop(error="the coordinator refused the connection: wrong run token")])


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"version": "9.9"}, r"torchspec='[\d.]+' is another version than the run's \(9\.9\)\. Fix: install the same version"),
        ({"engines": {**asdict(EngineConfig()), "warp_speed": 9}}, r"torchspec='[\d.]+' does not know all that this run asks for \(.*warp_speed"),
    ],
)
def test_a_worker_of_another_version_says_so_on_both_sides(meet: Callable[..., Coordinator], job: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        meet(**job)
    assert Coordinator.last.heard[1:] == [Unfit(words=refused.value.words)]


def test_an_engine_that_cannot_be_built_is_told_to_the_run(meet: Callable[..., Coordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("data.target.path", "t", "does not load", "check it")

    def fail(kind: str, job: Job) -> Engine:
        raise error

    monkeypatch.setattr(worker, "build", fail)
    with pytest.raises(UserError) as refused:
        meet()
    assert refused.value is error and Coordinator.last.heard[1:] == [Unfit(words=error.words)]


def test_something_else_that_listens_is_called_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True).start()
        with pytest.raises(UserError, match="does not speak as a coordinator"):
            worker.work("127.0.0.1", server.getsockname()[1], token="t", name="hand", device="cpu")
