"""The mutation check (``benchmarks/mutations.py``) stays runnable: every error can still be planted, and some are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.mutations import MUTATIONS, ROOT, Mutation, occurrences


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.of}: {m.what}")
def test_the_text_to_change_is_there_once(mutation: Mutation) -> None:
    assert occurrences(mutation) == 1


def test_every_defect_has_a_mutation() -> None:
    assert {mutation.of for mutation in MUTATIONS} == {*range(1, 17), "twins"}


@pytest.mark.slow
@pytest.mark.nightly
def test_a_planted_defect_is_caught() -> None:
    done = subprocess.run([sys.executable, "benchmarks/mutations.py", "7"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"planted": 2, "caught": 2}
