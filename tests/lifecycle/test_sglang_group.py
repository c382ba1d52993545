"""A group whose engine is SGLang: what is killed in the midst of its work comes back, and every sample arrives once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.engines.parts import Rank, group_config, of_run, random_packs, save_tiny, spec_of, still_running, store_files
from torchspec.engines.group import EngineGroup

pytestmark = [pytest.mark.skipif(find_spec("sglang") is None, reason="no SGLang"), pytest.mark.slow, pytest.mark.alone]
BUDGET = 1 << 20
"""Bytes of a few packs: there is always work that waits."""


def processes(token: str) -> dict[str, psutil.Process]:
    """The worker, and what it started by the titles that SGLang gives them."""
    (worker,) = [p for p in of_run(token) if "torchspec.engines.worker" in p.cmdline()]
    below = {p.cmdline()[0].removeprefix("sglang::"): p for p in worker.children(recursive=True) if p.cmdline()}
    return {"worker": worker, **below}


@pytest.mark.parametrize("killed", [("scheduler",), pytest.param(("worker", "detokenizer"), marks=pytest.mark.nightly)])
def test_killed_parts(killed: tuple[str, ...], tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", hidden=128)
    engines = {"batch_tokens": 64, "max_failed_fraction": 1.0}
    config = group_config(tmp_path, target, engines=engines, engine="sglang", spec=spec_of(target), budget=BUDGET)
    group = EngineGroup(config)
    try:
        rank = Rank(group.start(), config.spec, random_packs(40 + 40 * len(killed)))
        for count, name in enumerate(killed):
            for _ in range(30):  # more than were finished when one died
                rank.take(timeout=180)
            assert rank.client.ask()["restarts"] == count
            before = processes(config.token)
            before[name].kill()
            for _ in range(10):
                rank.take(timeout=180)
            assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before.values())
        while rank.waiting:
            rank.take(timeout=180)
        state = rank.settled()
        assert state["restarts"] == len(killed) and not rank.failed
        assert rank.records.keys() == rank.ids.keys()
        last = processes(config.token)
        rank.close()
    finally:
        group.close()
    assert not still_running([*last.values()], timeout=20) and not of_run(config.token)
    assert store_files(tmp_path) == []
