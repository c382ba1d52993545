"""The chaos benchmark finds nothing on an honest run, and finds every planted breach: a zero of it means something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def chaos(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *words], capture_output=True, text=True, timeout=270, check=False)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"violations": -1, "error": done.stderr[-2000:]}
    assert done.returncode == (facts["violations"] != 0), facts
    return facts


@pytest.mark.parametrize("seed", [0])
def test_an_honest_run_under_faults_loses_doubles_and_leaves_nothing(seed: int) -> None:
    facts = chaos("--first", str(seed))
    assert facts["violations"] == 0, facts
    assert facts["samples"] == 3000 and facts["faults"] >= 8


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ("lose", "trained 0 times, named as failed 0 times"),
        ("duplicate", "trained 2 times"),
        ("leak", "keys such as"),
        ("evict", "a record that was owed is gone"),
    ],
)
def test_a_planted_breach_is_found(plant: str, words: str) -> None:
    facts = chaos("--plant", plant)
    assert facts["violations"] > 0 and words in " ".join(facts["first_violations"]), facts
