"""A test that fails half-way leaves no run behind to slow the next ones down."""

from collections.abc import Iterator

import pytest

from tests.e2e.runs import STARTED


@pytest.fixture(autouse=True)
def no_run_left() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()  # the coordinator sees the end of its pipe and ends the rest
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    STARTED.clear()
