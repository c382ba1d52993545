"""One real server of each kind for the tests of a module, and a client of it; keys that no other test uses; Mooncake in parts, and of somebody else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchspec.transfer import Store, StoreConfig, StoreServer, make_server, mooncake, mooncake_server, open_store, segment

BUDGET = 256 << 20
_numbers = itertools.count()


@pytest.fixture(scope="module", params=["shm", "mooncake"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    made = make_server(StoreConfig(kind=kind), run=f"test{next(_numbers)}-{Path(tmp_path_factory.getbasetemp()).name}", budget=BUDGET)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def store(server: StoreServer) -> Iterator[Store]:
    client = open_store(server.address)
    yield client
    client.close()


@pytest.fixture
def new_key() -> Callable[[], str]:
    return lambda: f"run/0/train/0/{next(_numbers)}/1"


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts in which the memory is held and clients behind one of ours: as on a small machine, and as on a large one."""
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: request.param)
    monkeypatch.setattr(mooncake, "_WORTH", 0)
    monkeypatch.setattr(mooncake_server, "_PART", 1 << 20)
    return int(request.param)


@pytest.fixture
def master() -> Iterator[tuple[str, int]]:
    """A master of somebody else: its address and process id."""
    process, port = segment.start_master("127.0.0.1", abandon_seconds=1)
    yield f"127.0.0.1:{port}", process.pid
    process.kill()
    process.wait()
