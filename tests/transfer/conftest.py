"""One real server of each kind for the tests of a module, and a client of it; keys that no other test uses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchspec.transfer import Store, StoreConfig, StoreServer, make_server, open_store

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
