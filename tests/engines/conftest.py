"""A store for the records of an engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspec.transfer import StoreConfig, StoreServer, make_server


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    folder: Path = tmp_path_factory.mktemp("shm")
    made = make_server(StoreConfig(kind="shm", shm_dir=str(folder)), run=secrets.token_hex(4), budget=64 << 20)
    made.start()
    yield made
    made.close()
