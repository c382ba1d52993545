"""The parts of the vLLM backend that need no vLLM: cache layouts, the ring, orders, reports, the sink, arguments."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.parts import read_record, save_tiny, spec_of, wait_until
from torchspec.engines.arguments import check_arguments
from torchspec.engines.capture.engine import PrefillEngine
from torchspec.engines.capture.reports import ReportServer
from torchspec.engines.capture.requests import (
    PARAMETER,
    TOKEN_VARIABLE,
    BadCaptureRequest,
    CaptureRequest,
    Destination,
    Introduce,
    read_destination,
    read_request,
)
from torchspec.engines.capture.sink import Ring, Sink, introduced
from torchspec.engines.connection import Closed, Framer
from torchspec.engines.engine import EngineConfig, Job
from torchspec.engines.messages import Challenge, Failed, Finished, Lease, Wrote
from torchspec.engines.record_writer import CapturedSample
from torchspec.engines.table import ENGINES
from torchspec.engines.vllm.cache import HiddenStateCache, split
from torchspec.engines.vllm.options import OWNED
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer, open_store
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import StoreError

LAYERS, BLOCK, HIDDEN = 3, 8, 16
SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(1, 2), hidden_size=HIDDEN, dtype="float32")


class Inbox:
    """A report server in a loop of its own, and what arrived at it."""

    def __init__(self) -> None:
        self.reports: list[Wrote] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = ReportServer(token="secret", on_report=self.reports.append)
        self.port = asyncio.run_coroutine_threadsafe(self._server.start("127.0.0.1"), self._loop).result()

    def close(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def wait(self, count: int) -> list[Wrote]:
        deadline = time.monotonic() + 20
        while len(self.reports) < count:
            assert time.monotonic() < deadline, f"{len(self.reports)} of {count} reports"
            time.sleep(0.01)
        return self.reports


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    yield made
    made.close()


def paged(states: torch.Tensor, *, layers_first: bool, blocks: list[int]) -> torch.Tensor:
    """A cache of 10 blocks that holds ``states`` [T, layers, D] in these blocks, and noise elsewhere."""
    cache = torch.randn(10, BLOCK, states.shape[1], HIDDEN)
    for place in range(states.shape[0]):
        cache[blocks[place // BLOCK], place % BLOCK] = states[place]
    return cache.transpose(1, 2).contiguous() if layers_first else cache


@pytest.mark.parametrize("layers_first", [True, False], ids=["0.32", "0.26"])
def test_both_layouts_give_the_same_states(layers_first: bool) -> None:
    states = torch.randn(19, LAYERS, HIDDEN)
    cache = HiddenStateCache(paged(states, layers_first=layers_first, blocks=[7, 0, 4]), layers=LAYERS, block_size=BLOCK)
    assert torch.equal(cache.read([7, 0, 4], 19), states)
    assert torch.equal(cache.read([7, 0, 4, 9], 8), states[:8])
    with pytest.raises(ValueError, match="2 blocks of 8 tokens for 19 states"):
        cache.read([7, 0], 19)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(UserError, match=r"keeps hidden states as \[10, 5, 8, 16\]"):
        HiddenStateCache(torch.empty(10, 5, 8, 16), layers=LAYERS, block_size=BLOCK)
    with pytest.raises(UserError, match="known are"):
        HiddenStateCache(torch.empty(10, 8 * 3, 16), layers=LAYERS, block_size=BLOCK)


def test_a_block_as_long_as_there_are_layers_is_told_by_vllms_own_code() -> None:
    pytest.importorskip("vllm")
    states = torch.randn(6, BLOCK, HIDDEN)  # 8 layers, blocks of 8
    cache = HiddenStateCache(paged(states, layers_first=True, blocks=[3]), layers=BLOCK, block_size=BLOCK)  # 0.32 here
    assert torch.equal(cache.read([3], 6), states)


@given(sizes=st.lists(st.integers(1, 60), max_size=60), frees=st.lists(st.booleans(), max_size=200))
def test_places_in_the_ring_never_overlap(sizes: list[int], frees: list[bool]) -> None:
    ring, live, waiting = Ring(100), [], list(sizes)
    for free in frees:
        if free and live:
            ring.free_oldest()
            live.pop(0)
        elif waiting:
            at = ring.take(waiting[0])
            if at is None:
                assert live, "an empty ring has room"
            else:
                size = waiting.pop(0)
                assert 0 <= at and at + size <= 100
                assert all(at + size <= other or other + length <= at for other, length in live)
                live.append((at, size))
    assert ring.take(101) is None


def make_sink(server_address: dict[str, object], inbox: Inbox, *, token: str = "secret") -> Sink:
    destination = Destination(server_address, SPEC, ("127.0.0.1", inbox.port))
    return Sink(destination, token=token, max_tokens=64, producer="test", device=torch.device("cpu"))


def sample_of(key: str, tokens: int, blocks: list[int], cache: HiddenStateCache) -> CapturedSample:
    rows = max(tokens - 1, 1)
    ids = torch.arange(tokens, dtype=torch.int32)
    return CapturedSample(key, ids, rows, lambda: split(cache.read(blocks, rows), (1, 2, 4), SPEC.aux_layers))


def test_a_capture_becomes_a_record(server: StoreServer, inbox: Inbox) -> None:
    states = torch.randn(19, LAYERS, HIDDEN)
    cache = HiddenStateCache(paged(states, layers_first=True, blocks=[5, 1, 2]), layers=LAYERS, block_size=BLOCK)
    sink = make_sink(server.address, inbox)
    copied = sink.copy(sample_of("a", 20, [5, 1, 2], cache))
    assert copied is not None and copied()
    (report,) = inbox.wait(1)
    assert report.key == "a" and report.error == "" and report.rows == 19
    store = open_store(server.address)
    record = read_record(store, "a", report.nbytes, SPEC)
    assert record.input_ids.tolist() == list(range(20))
    assert torch.equal(record.aux, states[:, :2].flatten(1)) and torch.equal(record.last, states[:, 2])
    store.close()
    sink.close()


def test_a_capture_that_cannot_be_read_is_reported_and_the_next_one_is_written(server: StoreServer, inbox: Inbox) -> None:
    cache = HiddenStateCache(torch.randn(10, LAYERS, BLOCK, HIDDEN), layers=LAYERS, block_size=BLOCK)
    sink = make_sink(server.address, inbox)
    assert sink.copy(sample_of("bad", 20, [5], cache)) is not None
    assert sink.copy(sample_of("good", 9, [5], cache)) is not None
    bad, good = inbox.wait(2)
    assert "1 blocks of 8 tokens for 19 states" in bad.error and good.error == ""
    sink.close()


def test_records_that_wait_are_put_in_one_call_and_a_bad_one_takes_no_neighbour_along(
    server: StoreServer, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HiddenStateCache(torch.randn(10, LAYERS, BLOCK, HIDDEN), layers=LAYERS, block_size=BLOCK)
    sink = make_sink(server.address, inbox)
    assert sink._store is not None
    put, calls, begun, proceed = sink._store.put, list[list[str]](), threading.Event(), threading.Event()

    def watched(keys: list[str], values: list[torch.Tensor]) -> None:
        calls.append(list(keys))
        begun.set()
        assert proceed.wait(20)
        if "poison" in keys:
            raise StoreError("io", "poison", "no")
        put(keys, values)

    monkeypatch.setattr(sink._store, "put", watched)
    sink.copy(sample_of("first", 9, [5], cache))
    assert begun.wait(10)
    for key in ("a", "b", "c"):
        sink.copy(sample_of(key, 9, [5], cache))
    proceed.set()
    assert [(report.key, report.error) for report in inbox.wait(4)] == [(key, "") for key in ("first", "a", "b", "c")]
    assert calls == [["first"], ["a", "b", "c"]]
    begun.clear(), proceed.clear(), calls.clear()
    sink.copy(sample_of("second", 9, [5], cache))
    assert begun.wait(10)
    for key in ("d", "poison", "e"):
        sink.copy(sample_of(key, 9, [5], cache))
    sink.copy(sample_of("bad", 20, [5], cache))  # fewer blocks than states
    proceed.set()
    reports = {report.key: report.error for report in inbox.wait(9)[4:]}
    assert list(reports) == ["second", "d", "poison", "e", "bad"] and [bool(error) for error in reports.values()] == [False, False, True, False, True]
    assert calls == [["second"], ["d", "poison", "e"], ["d"], ["poison"], ["e"]]
    store = open_store(server.address)
    for key in ("a", "b", "c", "d", "e"):
        assert torch.equal(read_record(store, key, SPEC.layout(9, 8).total, SPEC).aux, cache.read([5], 8)[:, :2].flatten(1))
    store.close()
    sink.close()


def test_a_store_that_is_gone_is_reported_for_each_record(server: StoreServer, inbox: Inbox) -> None:
    address = dict(server.address)
    server.close()
    cache = HiddenStateCache(torch.randn(10, LAYERS, BLOCK, HIDDEN), layers=LAYERS, block_size=BLOCK)
    sink = make_sink(address, inbox)
    assert sink.copy(sample_of("a", 5, [1], cache)) is not None
    (report,) = inbox.wait(1)
    assert report.error and report.nbytes == 0
    sink.close()


def test_places_of_written_records_are_used_again(server: StoreServer, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchspec.engines.capture.sink._RING", 0)
    cache = HiddenStateCache(torch.randn(10, LAYERS, BLOCK, HIDDEN), layers=LAYERS, block_size=BLOCK)
    sink = make_sink(server.address, inbox)
    offered = [sink.copy(sample_of(f"k{i}", 64, list(range(8)), cache)) for i in range(200)]
    inbox.wait(sum(copied is not None for copied in offered))
    assert sink.copy(sample_of("later", 64, list(range(8)), cache)) is not None, "a place that was returned is given again"
    sink.close()


def test_reports_need_the_token_and_garbage_is_refused(inbox: Inbox, server: StoreServer, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", inbox.port)) as stranger:
        stranger.sendall(b"\xff" * 64)
        while stranger.recv(4096):  # a challenge, and the end
            pass
    sink = make_sink(server.address, inbox, token="wrong")
    cache = HiddenStateCache(torch.randn(10, LAYERS, BLOCK, HIDDEN), layers=LAYERS, block_size=BLOCK)
    sink.copy(sample_of("a", 5, [1], cache))
    deadline = time.monotonic() + 10
    while "wrong token" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "wrong token" in caplog.text and inbox.reports == []
    sink.close()


def test_nobody_listening_is_said(server: StoreServer, inbox: Inbox) -> None:
    inbox.close()
    with pytest.raises(Closed):
        make_sink(server.address, inbox)


def test_orders_are_checked(monkeypatch: pytest.MonkeyPatch, server: StoreServer) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    run = Destination(server.address, SPEC, ("127.0.0.1", 1)).to_dict()
    order = CaptureRequest(key="k", tail=[3], answer=False, ids="", prompt=3, run=run).signed("secret")
    assert read_request(order.to_dict()) == order
    assert read_destination(order.run) == Destination(server.address, SPEC, ("127.0.0.1", 1))
    with pytest.raises(BadCaptureRequest, match="token"):
        read_request(order.signed("guess").to_dict())
    elsewhere = {**run, "report": ["127.0.0.1", 2]}
    for changed in (
        {"key": "another"},
        {"prompt": 4},
        {"tail": []},
        {"ids": "0" * 32},
        {"run": elsewhere},
        {"run": {**run, "alone": True}},
        {"tail": [], "answer": True},
    ):
        with pytest.raises(BadCaptureRequest, match="token"):  # the proof is of the whole order: a logged one is of no use to send states elsewhere
            read_request(dataclasses.replace(order, **changed).to_dict())
    assert read_request(json.loads(json.dumps(order.to_dict()))) == order
    with pytest.raises(BadCaptureRequest, match="2 tokens after the prompt"):
        read_request(dataclasses.replace(order, tail=[1, 2]).to_dict())
    with pytest.raises(BadCaptureRequest, match="1 tokens after the prompt"):  # what follows is for the target to say
        read_request(dataclasses.replace(order, answer=True).to_dict())
    for broken in ({}, {**order.to_dict(), "more": 1}, {**order.to_dict(), "tail": "x"}, [1], {**order.to_dict(), "key": None}):
        with pytest.raises(BadCaptureRequest, match="malformed"):
            read_request(broken)
    with pytest.raises(BadCaptureRequest, match="malformed"):
        read_destination({"store": {}, "record": {}, "report": []})
    for wrong in ({"report": ["127.0.0.1", 70000]}, {"record": {**run["record"], "dtype": "int8"}}):
        with pytest.raises(BadCaptureRequest, match="malformed"):
            read_destination({**run, **wrong})
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(BadCaptureRequest, match="token"):  # no token, no service
        read_request(order.signed("").to_dict())


@pytest.mark.parametrize("name", sorted(OWNED))
def test_owned_arguments_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UserError, match=f"data.engines.engine_args.{name}"):
        check_arguments(EngineConfig(engine_args={name: 1}), owned=OWNED)


def test_versions() -> None:
    for version in ("0.26.0", "0.32.0", "0.32.1+cpu"):
        ENGINES["vllm"].check_version(version, allow_unknown=False)
    for version in ("0.31.0", "1.0.0", "0.3.2"):
        with pytest.raises(UserError, match="allow_unknown_version"):
            ENGINES["vllm"].check_version(version, allow_unknown=False)
        ENGINES["vllm"].check_version(version, allow_unknown=True)


class Absent(PrefillEngine):
    """An engine without a vLLM: the connector's part is played by the test, and what ``ask`` answers is given."""

    said: dict[str, Any]

    def launch(self) -> dict[str, Any]:
        self.token = "secret"
        self.said = {}
        return {}

    async def ask(self, ids: list[int], pictures: list[Any], parameters: dict[str, Any], key: str, sampling: Any) -> dict[str, Any] | None:
        return {PARAMETER: self.said}

    def gone(self) -> bool:
        return False

    def end(self) -> None:
        pass


@pytest.fixture
def absent(server: StoreServer, tmp_path: Path) -> Iterator[Absent]:
    target = save_tiny(tmp_path / "target")
    engine = Absent(Job(TargetConfig(str(target)), spec_of(target), server.address, EngineConfig(), max_length=64, device="cpu"))
    engine.start()
    yield engine
    engine.close()


def lease_of(key: str) -> Lease:
    return Lease(0, key, "train", 0, struct.pack("<3i", 5, 6, 7))


def test_a_record_that_comes_after_its_lease_was_settled_is_deleted(absent: Absent, server: StoreServer) -> None:
    absent.said = {"error": "refused"}
    absent.submit([lease_of("late")])
    assert absent.poll(10.0) == ([], [Failed(0, "refused")])
    store = open_store(server.address)
    store.put(["late"], [torch.zeros(64, dtype=torch.uint8)])
    reports = introduced(tuple(absent._run["report"]), "secret")
    reports.send(Wrote(key="late", nbytes=64, rows=1))
    wait_until(lambda: store.exists(["late"]) == [False], timeout=10, what="the deletion")
    reports.close()
    store.close()


def test_a_record_that_is_owed_is_not_deleted_when_it_is_reported_twice(absent: Absent, server: StoreServer) -> None:
    """A gateway that answers 502 for a request that was carried out has it carried out twice."""
    store = open_store(server.address)
    store.put(["owed", "never leased"], [torch.zeros(64, dtype=torch.uint8)] * 2)
    reports = introduced(tuple(absent._run["report"]), "secret")
    absent.submit([lease_of("owed")])
    wait_until(lambda: "owed" in absent._reports, timeout=10, what="the request")
    reports.send(Wrote(key="owed", nbytes=64, rows=2))
    assert absent.poll(10.0) == ([Finished(0, 64, 2)], [])
    for key in ("owed", "never leased", "owed"):
        reports.send(Wrote(key=key, nbytes=64, rows=2))
    absent.said = {"error": "refused"}
    absent.submit([lease_of("marker")])
    assert absent.poll(10.0)[1]
    store.put(["marker"], [torch.zeros(64, dtype=torch.uint8)])
    reports.send(Wrote(key="marker", nbytes=64, rows=2))  # settled after those above
    wait_until(lambda: store.exists(["marker"]) == [False] and not absent._deletions, timeout=10, what="the deletion")
    assert store.exists(["owed", "never leased"]) == [True, True]
    reports.close()
    store.close()


def test_the_secret_is_sent_to_nobody(server: StoreServer) -> None:
    """What a sink says to whoever challenges it is worth nothing elsewhere; to one who does not challenge it says nothing."""
    heard = bytearray()

    def listen(listener: socket.socket, first: bytes) -> None:
        with listener, listener.accept()[0] as thief:
            thief.sendall(first)
            thief.settimeout(5.0)
            while data := thief.recv(4096):
                heard.extend(data)

    challenging = Framer(Introduce).encode(Challenge(nonce=b"n" * 32))
    for first, what in ((challenging, None), (b"", "does not take reports")):
        heard.clear()
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=listen, args=(listener, first))
        address = listener.getsockname()
        thread.start()
        if what is None:
            introduced(address, "the secret").close()
        else:
            with pytest.raises(Closed, match=what):
                introduced(address, "the secret")
        thread.join()
        assert b"the secret" not in heard and bool(heard) is (what is None)


def test_values_that_make_another_model_of_the_target_are_refused() -> None:
    with pytest.raises(UserError, match="random weights"):
        check_arguments(EngineConfig(engine_args={"load_format": "dummy"}), owned=OWNED)
    check_arguments(EngineConfig(engine_args={"load_format": "safetensors"}), owned=OWNED)
