"""The chaos benchmark finds nothing on an honest run, and finds every planted breach: a zero of it means something. And nobody spins while waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(280)]


def benchmark(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *words], capture_output=True, text=True, timeout=270, check=False)


def chaos(*words: str) -> dict[str, Any]:
    done = benchmark("chaos.py", *words)
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
        pytest.param("lose", "trained 0 times, named as failed 0 times", marks=pytest.mark.nightly),
        ("duplicate", "trained 2 times"),
        pytest.param("leak", "keys such as", marks=pytest.mark.nightly),
        pytest.param("evict", "a record that was owed is gone", marks=pytest.mark.nightly),
    ],
)
def test_a_planted_breach_is_found(plant: str, words: str) -> None:
    facts = chaos("--plant", plant)
    assert facts["violations"] > 0 and words in " ".join(facts["first_violations"]), facts


def test_nobody_spins_while_waiting_and_the_budget_holds() -> None:
    done = benchmark("waiting.py", "--seconds", "3")
    cases = {facts["case"]: facts for facts in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0 and cases.keys() == {"slow trainer", "slow engine"}, done.stderr
    assert cases["slow trainer"]["cpu_percent"].keys() == {"coordinator", "rank-0", "rank-1", "worker-1", "worker-2"}
    for facts in cases.values():
        assert max(facts["cpu_percent"].values()) < 5.0 and 0 < facts["bytes_alive"] <= facts["budget"], facts
