"""A coordinator that stands still: for a moment it harms nobody, for long it is given up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.parts import Rank, group_config, random_packs, save_tiny
from torchspec.engines import client
from torchspec.engines.group import EngineGroup
from torchspec.errors import GroupStopped

pytestmark = pytest.mark.alone


@pytest.fixture
def group(tmp_path: Path) -> Iterator[EngineGroup]:
    made = EngineGroup(group_config(tmp_path, save_tiny(tmp_path / "target"), budget=3 * 66_000, engines={"lease_timeout": 3.0, "silence_timeout": 2.0}))
    yield made
    assert made._process is None or made._process.poll() is not None or os.kill(made._process.pid, signal.SIGCONT) is None
    made.close()


def test_a_coordinator_that_was_stopped_finds_nobody_overdue(group: EngineGroup) -> None:
    rank = Rank(group.start(), group.config.spec, random_packs(12))
    rank.take()
    assert group._process is not None
    os.kill(group._process.pid, signal.SIGSTOP)
    time.sleep(4.0)  # longer than any deadline
    os.kill(group._process.pid, signal.SIGCONT)
    rank.take_all()
    state = rank.settled()
    assert state["restarts"] == 0 and state["failed"] == 0
    rank.close()


def test_a_coordinator_that_stays_stopped_is_given_up(group: EngineGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE", 6.5)
    rank = Rank(group.start(), group.config.spec, random_packs(4))
    rank.take()
    assert group._process is not None
    os.kill(group._process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(GroupStopped, match="said nothing"):
        while True:
            rank.client.poll(0.5)
    assert time.monotonic() - started < 10.0
