"""Reads that hang are left behind: the next one takes a new client, and a store that answers nobody is given up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspec.transfer import Store, StoreConfig, StoreError, StoreServer, make_server, open_store
from torchspec.transfer.reader import Stopped, StoreReader

LIMIT = 0.6


def no() -> bool:
    return False


class Hang:
    """Makes chosen calls of ``get`` wait until it is released."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.closed = threading.Event(), threading.Event()
        self.which: Callable[[list[str]], bool] = lambda keys: False
        self.hung: list[list[str]] = []
        kind, get, close = type(store), type(store).get, type(store).close

        def slow_get(this: Any, keys: list[str], outs: list[torch.Tensor]) -> list[int]:
            if self.which(list(keys)):
                self.hung.append(list(keys))
                self.released.wait(60)
            return get(this, keys, outs)

        def seen_close(this: Any) -> None:
            close(this)
            if self.released.is_set():
                self.closed.set()

        monkeypatch.setattr(kind, "get", slow_get)
        monkeypatch.setattr(kind, "close", seen_close)


@pytest.fixture
def hang(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    made = Hang(store, monkeypatch)
    yield made
    made.released.set()


@pytest.fixture
def values(store: Store, new_key: Callable[[], str]) -> dict[str, torch.Tensor]:
    made = {new_key(): torch.full((1000 + i,), i + 1, dtype=torch.uint8) for i in range(3)}
    store.put(list(made), list(made.values()))
    return made


def read(reader: StoreReader, values: dict[str, torch.Tensor], stopped: Callable[[], bool] = no) -> tuple[list[bool], dict[int, str]]:
    """Which values arrived as they were put, and the problems."""
    slots, problems = reader.read(list(values), [v.numel() for v in values.values()], stopped=stopped)
    return [torch.equal(slot, value) for slot, value in zip(slots, values.values(), strict=True)], problems


def test_a_read_that_hangs_once_is_repeated_with_a_new_client(server: StoreServer, values: dict[str, torch.Tensor], hang: Hang) -> None:
    reader = StoreReader(server.address, limit=LIMIT)
    assert read(reader, values) == ([True] * 3, {})
    hang.which = lambda keys: not hang.hung
    started = time.monotonic()
    slots, problems = reader.read(list(values), [v.numel() for v in values.values()], stopped=no)
    assert problems == {} and reader.late == 1 and time.monotonic() - started < LIMIT + 5
    kept = [slot.clone() for slot in slots]
    for slot in slots:
        slot.zero_()
    hang.released.set()  # the late call ends: it writes into memory that nobody has any more, and closes its client
    assert hang.closed.wait(10)
    assert all(not slot.any() for slot in slots) and all(torch.equal(k, v) for k, v in zip(kept, values.values(), strict=True))
    assert read(reader, values) == ([True] * 3, {}) and reader.late == 1
    reader.close()


def test_a_value_whose_read_always_hangs_is_named_and_the_others_arrive(server: StoreServer, values: dict[str, torch.Tensor], hang: Hang) -> None:
    reader = StoreReader(server.address, limit=LIMIT)
    bad = list(values)[1]
    hang.which = lambda keys: bad in keys
    arrived, problems = read(reader, values)
    assert arrived[0] and arrived[2] and problems.keys() == {1} and "did not return within 0.6 s" in problems[1]
    assert reader.late == 2
    reader.close()


def test_a_store_that_answers_no_read_is_given_up(server: StoreServer, values: dict[str, torch.Tensor], hang: Hang) -> None:
    reader = StoreReader(server.address, limit=LIMIT)
    hang.which = lambda keys: True
    started = time.monotonic()
    with pytest.raises(StoreError, match="3 times in a row") as given_up:
        read(reader, values)
    assert given_up.value.reason == "unreachable" and LIMIT * 3 < time.monotonic() - started < LIMIT * 3 + 6
    reader.close()


def test_a_wait_for_a_read_that_hangs_ends_when_told_and_close_does_not_wait(server: StoreServer, values: dict[str, torch.Tensor], hang: Hang) -> None:
    reader = StoreReader(server.address, limit=60)
    hang.which = lambda keys: True
    started = time.monotonic()
    with pytest.raises(Stopped):
        read(reader, values, stopped=lambda: time.monotonic() - started > 0.3)
    reader.close()
    reader.close()
    assert time.monotonic() - started < 3


def test_what_is_missing_is_no_late_call(server: StoreServer, values: dict[str, torch.Tensor], store: Store) -> None:
    reader = StoreReader(server.address, limit=LIMIT)
    store.delete([next(iter(values))])
    arrived, problems = read(reader, values)
    assert arrived[1:] == [True, True] and problems.keys() == {0} and "missing" in problems[0] and reader.late == 0
    reader.close()


def test_a_mooncake_whose_memory_holder_stands_still_is_given_up(tmp_path: Path, new_key: Callable[[], str]) -> None:
    """Alive and silent: its sockets take what is sent, and no answer comes."""
    pytest.importorskip("mooncake.store")
    server = make_server(StoreConfig(kind="mooncake"), run="still", budget=16 << 20, log_dir=tmp_path)
    server.start()
    try:
        store, key, reader = open_store(server.address), new_key(), StoreReader(server.address, limit=1.0)
        store.put([key], [torch.ones(1000, dtype=torch.uint8)])
        assert reader.read([key], [1000], stopped=no)[1] == {}
        os.kill(server.pids[0], signal.SIGSTOP)  # type: ignore[attr-defined]
        started = time.monotonic()
        with pytest.raises(StoreError, match="3 times in a row"):
            for _ in range(2):
                assert "did not return" in reader.read([key], [1000], stopped=no)[1][0]
        assert time.monotonic() - started < 10
    finally:
        os.kill(server.pids[0], signal.SIGCONT)  # type: ignore[attr-defined]
        server.close()


def test_a_buffer_that_was_outgrown_is_given_back(server: StoreServer, store: Store, new_key: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[Any] = []
    buffer = type(store).buffer

    def seen(this: Any, nbytes: int, **device: str) -> torch.Tensor:
        clients.append(this)
        return buffer(this, nbytes, **device)

    monkeypatch.setattr(type(store), "buffer", seen)
    keys = {size: new_key() for size in (100, 5000, 20_000, 300, 30_000)}
    for size, key in keys.items():
        store.put([key], [torch.full((size,), size % 251, dtype=torch.uint8)])
    clients.clear()
    reader = StoreReader(server.address)
    for size, key in keys.items():
        slots, problems = reader.read([key], [size], stopped=no)
        assert not problems and slots[0].eq(size % 251).all()
    assert len(clients) == 4 and [kept.numel() for kept in clients[0]._buffers] == [30_000]
    reader.close()
    store.delete(list(keys.values()))
