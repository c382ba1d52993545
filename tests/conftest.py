"""For all tests: processes that start warm (:mod:`tests.forks`), and at the end where the CPU's seconds went."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests import forks

_SHOWN = 15
_COLLECTION = "(imports and collection)"


class Seconds:
    """CPU seconds by test file, of this process and of all that it started and waited for."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self._before = 0.0

    def count(self, name: str) -> None:
        """What was used since the last call was for this."""
        now = sum(os.times()[:4])
        self.of[name] = self.of.get(name, 0.0) + now - self._before
        self._before = now

    def add(self, other: dict[str, float]) -> None:
        """What another process has counted."""
        for name, seconds in other.items():
            self.of[name] = self.of.get(name, 0.0) + seconds


SECONDS = pytest.StashKey[Seconds]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SECONDS] = Seconds()
    if not Path("/dev/nvidia0").exists() and "TORCHSPEC_TESTS_COLD" not in os.environ:
        forks.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: side by side, short ones then fill the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[SECONDS].count(_COLLECTION)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    try:
        with forks.cold() if item.get_closest_marker("cold_start") else nullcontext():
            return (yield)
    finally:
        item.config.stash[SECONDS].count(item.nodeid.split("::")[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (told := getattr(session.config, "workeroutput", None)) is not None:  # of xdist: a process that runs tests for another one
        told["cpu_seconds"] = session.config.stash[SECONDS].of


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    node.config.stash[SECONDS].add(getattr(node, "workeroutput", {}).get("cpu_seconds", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    of = config.stash[SECONDS].of
    terminalreporter.section(f"CPU seconds: {sum(of.values()):.0f} in {len(of)} files")
    for name in sorted(of, key=lambda name: -of[name])[:_SHOWN]:
        terminalreporter.write_line(f"{of[name]:8.1f}  {name}")
