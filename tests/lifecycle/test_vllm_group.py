"""A group whose engine is vLLM: a put that fails costs its sample alone, what is killed comes back, and every sample arrives once."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.engines.parts import Rank, group_config, of_run, random_packs, save_tiny, spec_of, still_running, store_files
from torchspec.engines.group import EngineGroup

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone]
BUDGET = 1 << 20
"""Bytes of a few packs: there is always work that waits."""


def processes(token: str) -> dict[str, psutil.Process]:
    """The worker, and what it started by the last word of the title that vLLM gives it (which overwrites the environment that carries the token)."""
    (worker,) = [p for p in of_run(token) if "torchspec.engines.worker" in p.cmdline()]
    below = {p.cmdline()[0].removeprefix("VLLM::"): p for p in worker.children(recursive=True) if p.cmdline()}
    return {"worker": worker, **below}


def shared_memory(members: dict[str, psutil.Process]) -> set[Path]:
    """Files of shared memory that these processes map."""
    return {Path(entry.path) for process in members.values() for entry in process.memory_maps() if entry.path.startswith("/dev/shm/")}


def test_failed_puts_a_killed_engine_core_and_a_killed_worker(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", hidden=128)
    engines = {"batch_tokens": 64, "max_failed_fraction": 1.0}
    config = group_config(tmp_path, target, engines=engines, engine="vllm", spec=spec_of(target), budget=BUDGET)
    group = EngineGroup(config)
    try:
        rank = Rank(group.start(), config.spec, random_packs(110))
        rank.take(timeout=120)
        first = processes(config.token)
        files = shared_memory(first)
        (mark,) = (tmp_path / "shm").glob("*/open")
        aside = mark.rename(mark.with_name("aside"))  # to every put the store is gone
        while not rank.failed:  # what was written before comes first, and makes room for more
            rank.take(timeout=120)
        aside.rename(mark)
        assert all("the store's directory was removed" in reason for reason in rank.failed.values())
        for _ in range(20):  # more than had credit: no sample that failed before is out when the engine dies, which counts as an attempt
            rank.take(timeout=120)
        assert rank.client.ask()["restarts"] == 0 and all(process.is_running() for process in first.values())
        first["EngineCore"].kill()
        for _ in range(40):  # more than were finished when it died
            rank.take(timeout=120)
        assert rank.client.ask()["restarts"] == 1
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in first.values())
        second = processes(config.token)
        files |= shared_memory(second)
        second["worker"].kill()
        while rank.waiting:
            rank.take(timeout=120)
        third = processes(config.token)
        files |= shared_memory(third)
        state = rank.settled()
        assert state["restarts"] == 2 and state["failed"] == len(rank.failed)
        assert rank.records.keys() | rank.failed.keys() == rank.ids.keys() and not rank.records.keys() & rank.failed.keys()
        assert all("the store's directory was removed" in reason for reason in rank.failed.values())
        rank.close()
    finally:
        group.close()
    left = still_running([*second.values(), *third.values()], timeout=10)
    assert not left and not of_run(config.token)
    assert store_files(tmp_path) == []
    assert files and not [file for file in files if file.exists()], "vLLM's queues"
