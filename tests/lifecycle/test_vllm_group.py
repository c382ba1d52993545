"""A group whose engine is vLLM: what is killed comes back, and every sample arrives once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.engines.parts import Rank, group_config, of_run, random_packs, save_tiny, spec_of, store_files
from torchspec.engines.group import EngineGroup

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
BUDGET = 1 << 20
"""Bytes of a few packs: there is always work that waits."""


def processes(token: str) -> dict[str, psutil.Process]:
    """The worker, and what it started by the last word of the title that vLLM gives it (which overwrites the environment that carries the token)."""
    (worker,) = [p for p in of_run(token) if "torchspec.engines.worker" in p.cmdline()]
    below = {p.cmdline()[0].removeprefix("VLLM::"): p for p in worker.children(recursive=True) if p.cmdline()}
    return {"worker": worker, **below}


def test_a_killed_engine_core_and_a_killed_worker_lose_nothing(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", hidden=128)
    config = group_config(tmp_path, target, engines={"batch_tokens": 64}, engine="vllm", spec=spec_of(target), budget=BUDGET)
    group = EngineGroup(config)
    try:
        rank = Rank(group.start(), config.spec, random_packs(60))
        rank.take(timeout=120)
        first = processes(config.token)
        first["EngineCore"].kill()
        for _ in range(40):  # more than were finished when it died
            rank.take(timeout=120)
        assert rank.client.ask()["restarts"] == 1
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in first.values())
        second = processes(config.token)
        second["worker"].kill()
        while rank.waiting:
            rank.take(timeout=120)
        third = processes(config.token)
        state = rank.settled()
        assert state["restarts"] == 2 and state["failed"] == 0 and rank.failed == {}
        assert rank.records.keys() == rank.ids.keys()
        rank.close()
    finally:
        group.close()
    _, left = psutil.wait_procs([*second.values(), *third.values()], timeout=10)
    assert not left and not of_run(config.token)
    assert store_files(tmp_path) == []
