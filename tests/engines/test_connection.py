"""Frames: what honest peers send arrives whole and in order; anything else ends the connection and nothing more."""

from __future__ import annotations

import json
import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engines.parts import group_config, save_tiny, wait_until
from torchspec.engines.client import Endpoint, TrainerClient
from torchspec.engines.connection import BadFrame, Closed, Connection, Framer
from torchspec.engines.group import EngineGroup
from torchspec.engines.handshake import prove
from torchspec.engines.messages import (
    MAX_FRAME,
    Beat,
    Challenge,
    Hello,
    OpenStage,
    Pack,
    PackReady,
    Pulse,
    RecordRef,
    Sample,
    StatusRequest,
    Stop,
    Submit,
    ToCoordinator,
    ToTrainer,
    Welcome,
)
from torchspec.errors import GroupStopped

MESSAGES = [
    Hello(proof=b"p" * 32, role="trainer", name="rank-0"),
    Submit(stage="train", epoch=3, packs=[Pack(0, [Sample(7, b"\0\1\2\3" * 100)]), Pack(2, [])]),
    StatusRequest(),
    Beat(samples=1, tokens=2, busy_s=0.5, write_s=0.25),
]


@pytest.mark.parametrize("step", [1, 3, 7, 64, 10**6])
def test_messages_arrive_however_the_bytes_are_cut(step: int) -> None:
    sender, receiver = Framer(ToCoordinator), Framer(ToCoordinator)
    data = b"".join(sender.encode(message) for message in MESSAGES)
    got = [message for at in range(0, len(data), step) for message in receiver.decode(data[at : at + step])]
    assert got == MESSAGES


def frame(number: int, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<II", len(body) if length is None else length, number) + body


ASK = msgspec.msgpack.encode(StatusRequest())
WRONG = {
    "replayed": frame(0, ASK) + frame(0, ASK),
    "out of order": frame(1, ASK),
    "oversized": frame(0, b"", length=MAX_FRAME + 1),
    "garbage": frame(0, b"\xff\x00\xff"),
    "pickle": frame(0, pickle.dumps({"type": "StatusRequest"})),
    "json": frame(0, json.dumps({"type": "StatusRequest"}).encode()),
    "unknown type": frame(0, msgspec.msgpack.encode({"type": "Exec"})),
    "text that is no UTF-8": frame(0, b"\x81\xa4type\xa3\xff\xfe\xfd"),
    "unknown field": frame(0, msgspec.msgpack.encode({"type": "StatusRequest", "more": 1})),
    "wrong type of field": frame(0, msgspec.msgpack.encode({"type": "Beat", "samples": "x", "tokens": 1, "busy_s": 0.0, "write_s": 0.0})),
    "missing field": frame(0, msgspec.msgpack.encode({"type": "Beat"})),
    "bytes after the message": frame(0, ASK + b"\0"),
    "not for this side": frame(0, msgspec.msgpack.encode(Stop())),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_what_no_honest_peer_sends_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        list(Framer(ToCoordinator).decode(data))


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(BadFrame):
        Framer(ToTrainer).encode(Submit(stage="train", epoch=0, packs=[Pack(0, [Sample(0, b"\0" * MAX_FRAME)])]))


def test_random_bytes_never_do_more_than_end_the_connection() -> None:
    generator = random.Random(0)
    honest = b"".join(frame(i, msgspec.msgpack.encode(message)) for i, message in enumerate(MESSAGES))
    for _ in range(2000):
        data = bytearray(honest)
        for _ in range(generator.randint(1, 6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        framer = Framer(ToCoordinator, limit=65536)
        try:
            for at in range(0, len(data), 50):
                list(framer.decode(bytes(data[at : at + 50])))
        except BadFrame:
            pass


@pytest.fixture
def pair_factory() -> Iterator[Callable[[float], tuple[Connection, socket.socket]]]:
    """Makes a client that waits so many seconds for a sign of life, and the bare socket of its peer."""
    made: list[Any] = []

    def make(silence: float) -> tuple[Connection, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            connection = Connection(server.getsockname(), ToTrainer, silence=silence)
            peer, _ = server.accept()
        made.extend([connection, peer])
        return connection, peer

    yield make
    for part in made:
        part.close()


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A client, and the bare socket of its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(server.getsockname(), ToTrainer)
        peer, _ = server.accept()
        yield connection, peer
        connection.close()
        peer.close()


def test_nothing_within_the_timeout_is_none(pair: tuple[Connection, socket.socket]) -> None:
    assert pair[0].receive(0.01) is None


def test_a_peer_that_goes_is_closed_for_both_directions(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    peer.sendall(frame(0, msgspec.msgpack.encode(Stop(error="words")))[:5])
    peer.close()
    with pytest.raises(Closed):
        connection.receive(5.0)
    with pytest.raises(Closed):
        for _ in range(1000):
            connection.send(StatusRequest())


def test_close_wakes_a_thread_that_receives(pair: tuple[Connection, socket.socket]) -> None:
    ended = threading.Event()

    def receive() -> None:
        with pytest.raises(Closed):
            pair[0].receive(30.0)
        ended.set()

    thread = threading.Thread(target=receive)
    thread.start()
    pair[1].close()
    thread.join(10.0)
    assert ended.is_set()


def test_nobody_listening_is_said_with_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Closed, match=f"127.0.0.1:{port}"):
        Connection(("127.0.0.1", port), ToTrainer)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineGroup]:
    """One without engines, which :func:`endpoint` starts."""
    folder = tmp_path_factory.mktemp("group")
    made = EngineGroup(group_config(folder, save_tiny(folder / "target"), engines={"workers": 0}))
    yield made
    made.close()


@pytest.fixture(scope="module")
def endpoint(group: EngineGroup) -> Endpoint:
    return group.start()


def raw(endpoint: Endpoint, *, hello: bool) -> socket.socket:
    """A bare connection, its challenge read, and answered when ``hello``."""
    connection = socket.create_connection((endpoint.host, endpoint.port), timeout=20)
    nonce = challenge_of(connection)
    if hello:
        connection.sendall(frame(0, msgspec.msgpack.encode(Hello(proof=prove(endpoint.token, nonce, "trainer", "fuzz"), role="trainer", name="fuzz"))))
        assert isinstance(next_frame(connection), Welcome)
    return connection


def challenge_of(connection: socket.socket) -> bytes:
    """The nonce that the coordinator greets with."""
    challenge = next_frame(connection)
    assert isinstance(challenge, Challenge) and len(challenge.nonce) == 32
    return challenge.nonce


def next_frame(connection: socket.socket) -> Any:
    head = connection.recv(8, socket.MSG_WAITALL)
    return msgspec.msgpack.decode(connection.recv(struct.unpack("<II", head)[0], socket.MSG_WAITALL), type=ToTrainer)


def last_words(data: bytes) -> Any:
    """The last frame of what the coordinator sent."""
    at, last = 0, None
    while at < len(data):
        (length, _) = struct.unpack_from("<II", data, at)
        last = msgspec.msgpack.decode(data[at + 8 : at + 8 + length], type=ToTrainer)
        at += 8 + length
    return last


def ended(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    try:
        while more := connection.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("hello", [False, True], ids=["stranger", "trainer"])
def test_the_coordinator_refuses_logs_and_lives(group: EngineGroup, endpoint: Endpoint, hello: bool) -> None:
    log = group.config.log_dir / "coordinator.log"
    for name, data in WRONG.items():
        before = log.read_text().count("refused")
        with raw(endpoint, hello=hello) as connection:
            number = int(hello)
            shifted = b"".join(struct.pack("<II", *_head(part, number)) + part[8:] for part in _frames(data))
            connection.sendall(shifted)
            ended(connection)
        wait_until(lambda before=before: log.read_text().count("refused") > before, timeout=5, what=f"a log line for {name}")
    client = TrainerClient(endpoint, "rank-0")
    assert client.ask()["bytes_alive"] == 0
    client.close()


def _frames(data: bytes) -> list[bytes]:
    """A WRONG entry as single frames."""
    length = 8 + len(ASK)
    return [data[:length], data[length:]] if data == WRONG["replayed"] else [data]


def _head(part: bytes, shift: int) -> tuple[int, int]:
    length, number = struct.unpack_from("<II", part)
    return length, number + shift


def test_a_frame_for_a_stranger_is_small(endpoint: Endpoint) -> None:
    with raw(endpoint, hello=False) as connection:
        connection.sendall(frame(0, b"", length=100_000))
        assert ended(connection) == b""


@pytest.mark.parametrize(
    "message",
    [
        OpenStage(stage="train", epoch=0, first_pack=0, num_packs=4, rank=2, world=2),
        Submit(stage="train", epoch=0, packs=[]),
        OpenStage(stage="train", epoch=0, first_pack=5, num_packs=4, rank=0, world=1),
    ],
    ids=["rank outside the world", "submit before open", "pass that ends before it begins"],
)
def test_a_client_that_breaks_the_rules_is_told_and_dropped(endpoint: Endpoint, message: OpenStage | Submit) -> None:
    with raw(endpoint, hello=True) as connection:
        connection.sendall(frame(1, msgspec.msgpack.encode(message)))
        last = last_words(ended(connection))
    assert isinstance(last, Stop) and last.error.startswith("coordinator: ")


@pytest.mark.parametrize(
    ("token", "changes", "words"),
    [
        ("", {}, "wrong run token"),
        ("é", {}, "wrong run token"),
        ("OK", {"role": "worker"}, "wrong run token"),
        ("OK", {"name": "somebody else"}, "wrong run token"),
        ("OK", {"proof": b""}, "wrong run token"),
        ("OK", {"protocol": 99}, "protocol 99"),
    ],
    ids=["no token", "token of other letters", "proof for another role", "proof for another name", "no proof", "protocol"],
)
def test_a_stranger_is_told_why(endpoint: Endpoint, token: str, changes: dict[str, Any], words: str) -> None:
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as connection:
        proof = prove(endpoint.token if token == "OK" else token, challenge_of(connection), "trainer", "x")
        hello = msgspec.structs.replace(Hello(proof=proof, role="trainer", name="x"), **changes)
        connection.sendall(frame(0, msgspec.msgpack.encode(hello)))
        last = last_words(ended(connection))
    assert isinstance(last, Stop) and words in last.error


def test_a_role_that_does_not_exist_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(GroupStopped, match="unknown role 'root'"):
        TrainerClient(endpoint, "x", role="root")


def test_a_recorded_greeting_is_worth_nothing(endpoint: Endpoint) -> None:
    """The whole conversation of an honest client, played again on a new connection."""
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as honest:
        recorded = frame(0, msgspec.msgpack.encode(Hello(proof=prove(endpoint.token, challenge_of(honest), "trainer", "x"), role="trainer", name="x")))
        honest.sendall(recorded)
        assert isinstance(next_frame(honest), Welcome)
    assert endpoint.token.encode() not in recorded
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as thief:
        thief.sendall(recorded)
        last = last_words(ended(thief))
    assert isinstance(last, Stop) and "wrong run token" in last.error


def test_two_processes_with_one_rank_are_noticed(endpoint: Endpoint) -> None:
    """The second one goes on, the first is told: neither waits for ever."""
    first, second = TrainerClient(endpoint, "a"), TrainerClient(endpoint, "b")
    for client in (first, second):
        client.open_stage("train", 0, first_pack=0, num_packs=2, rank=0, world=1)
        client.submit("train", 0, [Pack(0, [])])
        ready = client.poll(10.0)
        assert ready is not None and ready.pack == 0
    with pytest.raises(GroupStopped, match="every rank must have its own number"):
        first.poll(10.0)
    second.close()


def test_what_was_on_its_way_for_an_earlier_pass_is_dropped(endpoint: Endpoint) -> None:
    """Two passes of the same stage and epoch: an announcement of the first must not be taken for one of the second."""
    client = TrainerClient(endpoint, "rank-0")
    client.open_stage("train", 0, first_pack=0, num_packs=4, rank=0, world=1)
    client.submit("train", 0, [Pack(0, []), Pack(1, []), Pack(2, [])])
    wait_until(lambda: client.ask()["finished"] == 0 and len(client._ready) == 3, timeout=10, what="the announcements")
    client.submit("train", 0, [Pack(3, [])])  # its announcement is somewhere between
    client.open_stage("train", 0, first_pack=1, num_packs=4, rank=0, world=1)
    assert client.poll(0.5) is None
    client.submit("train", 0, [Pack(1, [])])
    ready = client.poll(10.0)
    assert ready is not None and ready.pack == 1
    client.acknowledge("train", 0, [1])
    client.ask()
    client.close()


def test_a_coordinator_that_says_nothing_is_given_up(pair_factory: Callable[[float], tuple[Connection, socket.socket]]) -> None:
    connection, peer = pair_factory(0.3)
    for number in range(4):  # signs of life
        peer.sendall(frame(number, msgspec.msgpack.encode(Pulse())))
        while connection.receive(0.1) is not None:
            pass
    started = time.monotonic()
    with pytest.raises(Closed, match="said nothing"):
        while True:
            connection.receive(0.1)
    assert 0.1 < time.monotonic() - started < 2.0


def test_a_client_that_does_not_say_who_it_is_is_dropped(group: EngineGroup, endpoint: Endpoint) -> None:
    with raw(endpoint, hello=False) as connection:
        connection.settimeout(15)
        assert ended(connection) == b""
    assert "did not say who it is" in (group.config.log_dir / "coordinator.log").read_text()


def test_an_observer_may_only_ask(endpoint: Endpoint) -> None:
    client = TrainerClient(endpoint, "eyes", role="observer")
    assert client.ask()["workers"] == {}
    with pytest.raises(Exception, match=r"closed|lost"):
        client.open_stage("train", 0, first_pack=0, num_packs=1, rank=0, world=1)
        client.poll(10.0)


def test_a_record_reference_survives_the_wire() -> None:
    ready = PackReady(stage="train", epoch=1, pack=2, records=[RecordRef(1, "k", 2**40, 3, 2)], failed=[])
    assert list(Framer(ToTrainer).decode(Framer(ToTrainer).encode(ready))) == [ready]


def test_config_holds_no_path_of_the_caller(tmp_path: Path) -> None:
    """The coordinator may run in another folder: the log folder goes over as an absolute path."""
    config = group_config(tmp_path, save_tiny(tmp_path / "target"))
    assert Path(config.resolved().log_dir).is_absolute()
