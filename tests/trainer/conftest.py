"""One world for all files here: records are made once."""

from __future__ import annotations

import pytest

from tests.trainer.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))
