"""Frames that are cut, doubled, swapped, dropped, invented or damaged: a receiver takes an honest beginning and nothing more, and the coordinator lives on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from tests.engines.parts import group_config, save_tiny
from torchspec.engines.client import Endpoint, TrainerClient
from torchspec.engines.connection import BadFrame, Framer
from torchspec.engines.group import EngineGroup
from torchspec.engines.handshake import prove
from torchspec.engines.messages import (
    MAX_FRAME,
    Acknowledge,
    CloseStage,
    Damaged,
    Hello,
    OpenStage,
    Pack,
    Reissue,
    Sample,
    StatusRequest,
    Submit,
    ToCoordinator,
    ToTrainer,
)

numbers = st.integers(-(2**63), 2**64 - 1)
small = st.integers(-2, 5)
stages = st.sampled_from(["train", "validate", "validate/x", ""])
samples = st.builds(Sample, small, st.binary(max_size=12))
packs = st.lists(st.builds(Pack, small | numbers, st.lists(samples, max_size=2)), max_size=2)
messages = st.one_of(
    st.just(StatusRequest()),
    st.builds(OpenStage, stage=stages, epoch=small, first_pack=small, num_packs=small | numbers, rank=small, world=small | numbers, step_packs=small),
    st.builds(Submit, stage=stages, epoch=small, packs=packs),
    st.builds(Acknowledge, stage=stages, epoch=small, packs=st.lists(small, max_size=3)),
    st.builds(
        Reissue, stage=stages, epoch=small, pack=small, damaged=st.lists(st.builds(Damaged, small, st.text(max_size=5), st.text(max_size=5)), max_size=2)
    ),
    st.builds(CloseStage, stage=stages, epoch=small),
)


def frame(number: int, body: bytes) -> bytes:
    return struct.pack("<II", len(body), number) + body


def frames(sent: list[Any], first: int = 0) -> list[bytes]:
    return [frame(first + i, msgspec.msgpack.encode(message)) for i, message in enumerate(sent)]


def decoded(data: bytes, cuts: list[int]) -> list[Any]:
    """What a receiver takes of it before it refuses the rest."""
    framer = Framer(ToCoordinator)
    got: list[Any] = []
    at = 0
    try:
        for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
            for message in framer.decode(data[at:cut]):
                got.append(message)
            at = cut
    except BadFrame:
        pass
    return got


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sent=st.lists(messages, min_size=1, max_size=6),
    how=st.sampled_from(["whole", "drop", "double", "swap", "truncate", "invent", "oversize"]),
    place=st.integers(0, 99),
    junk=st.binary(max_size=30),
    cuts=st.lists(st.integers(0, 10**6), max_size=4),
)
def test_what_arrives_is_what_was_sent_up_to_the_first_breach(sent: list[Any], how: str, place: int, junk: bytes, cuts: list[int]) -> None:
    honest = frames(sent)
    at = place % len(honest)
    match how:
        case "whole":
            assert decoded(b"".join(honest), cuts) == sent
            return
        case "drop":
            data = honest[:at] + honest[at + 1 :]
        case "double":
            data = honest[: at + 1] + honest[at:]
        case "swap":
            data = honest[:at] + honest[at + 1 : at + 2] + honest[at : at + 1] + honest[at + 2 :]
        case "truncate":
            data = [*honest[:at], honest[at][: place % len(honest[at])]]
        case "invent":
            data = [*honest[:at], frame(at, b"\xc1" + junk), *honest[at:]]  # 0xc1 begins nothing in MessagePack
        case _:
            data = [*honest[:at], struct.pack("<II", MAX_FRAME + 1 + place, at), *honest[at:]]
    got = decoded(b"".join(data), cuts)
    kept = at + 1 if how == "double" or (how == "swap" and at == len(honest) - 1) else at
    assert got == sent[:kept]


pytestmark = pytest.mark.cold_start  # the memory of the coordinator is measured, and a fork counts what its parent imported


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineGroup]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    made = EngineGroup(group_config(folder, save_tiny(folder / "target"), engines={"workers": 0}))
    yield made
    made.close()


@pytest.fixture(scope="module")
def endpoint(group: EngineGroup) -> Endpoint:
    return group.start()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sent=st.lists(messages, max_size=8), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3), known=st.booleans())
def test_no_message_of_a_client_ends_or_bloats_the_coordinator(
    group: EngineGroup, endpoint: Endpoint, sent: list[Any], flips: list[tuple[int, int]], known: bool
) -> None:
    """Well-formed nonsense and damaged bytes, by strangers and by those who know the token."""
    assert group._process is not None
    with socket.create_connection((endpoint.host, endpoint.port), timeout=20) as connection:
        head = connection.recv(8, socket.MSG_WAITALL)
        challenge = msgspec.msgpack.decode(connection.recv(struct.unpack("<II", head)[0], socket.MSG_WAITALL), type=ToTrainer)
        proof = prove(endpoint.token if known else "guess", challenge.nonce, "trainer", "fuzz")
        data = bytearray(b"".join(frames([Hello(proof=proof, role="trainer", name="fuzz"), *sent])))
        for place, change in flips:
            data[place % len(data)] ^= change
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass
    client = TrainerClient(endpoint, "eyes", role="observer")
    assert client.ask()["leased"] == 0
    client.close()
    assert group._process.poll() is None and psutil.Process(group._process.pid).memory_info().rss < 300 << 20
