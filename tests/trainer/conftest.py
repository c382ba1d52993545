"""One world for all files here: records are made once. What a run leaves in its process is taken back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.trainer.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """The command line's seed in the environment, torch's deterministic mode, process groups."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
