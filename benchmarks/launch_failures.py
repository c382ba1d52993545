"""Does a training ever end in "unspecified launch failure"? Many short runs of the configuration that once did, and
their count over sessions.

One of fourteen runs of this configuration died on an H200 between steps 894 and 950 at 25eceaa (SmolLM2-135M, replay,
seven runs side by side, three norms, random start, head trained, ``lk_lambda``, K=4, the rates of that time). Forty runs
that end well leave a rate of 1 in 14 a chance of 5 %.

    python main.py extract --config configs/smollm2_h100.yaml --data.target.path T --data.train TRAIN \
        --data.validate VALIDATE --output RECORDS
    python benchmarks/launch_failures.py --target T --train TRAIN --validate VALIDATE --records RECORDS \
        --output OUT --runs 40 --jobs 8

Each session adds a line to ``results/launch_failures.jsonl`` (``--count``), and the sum of all is printed. Exit code 1
when a run of this session failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.files import lines_with, refuse_foreign
from torchspec.paths import expand_all

ROOT = Path(__file__).resolve().parents[1]
COUNT = ROOT / "benchmarks/results/launch_failures.jsonl"
FAILED_ONCE: dict[str, Any] = {
    "trainer.num_sanity_val_steps": 0,
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "trainer.log_every_n_steps": 10,
    "trainer.callbacks": [
        {"class_path": "torchspec.callbacks.vocabulary.VocabularyPruning", "init_args": {"size": 16384}},
        {"class_path": "torchspec.callbacks.last.LastCheckpoint", "init_args": {"every_n_train_steps": 200}},
    ],
    "model.draft": "configs/drafts/eagle3_norms.json",
    "model.unroll_steps": 4,
    "model.step_weights": [1.0, 0.8, 0.64, 0.512],
    "model.loss": {"lk_lambda": 1.0},
    "model.init": "random",
    "model.train_head": True,
    "model.optimizer": {"class_path": "torchspec.models.optim.muon.MuonAdamW", "init_args": {"lr": 1.5e-3, "muon_lr": 0.03, "betas": [0.9, 0.95]}},
    "model.lr_scheduler": {"class_path": "torchspec.models.optim.schedules.Cosine", "init_args": {"warmup_steps": 0.03}},
}


def command(number: int, given: argparse.Namespace) -> list[str]:
    """A run of ``main.py fit``; each has a seed of its own."""
    options = FAILED_ONCE | {
        "seed_everything": given.first_seed + number, "data.seed": given.first_seed + number, "trainer.max_steps": given.steps, "trainer.max_epochs": -1,
        "trainer.default_root_dir": str(Path(given.output) / f"run-{number}"), "data.target.path": given.target, "data.train": given.train,
        "data.validate": given.validate, "data.engine": "replay", "data.records": given.records,
    }  # fmt: skip
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    return [sys.executable, str(ROOT / "main.py"), "fit", f"--config={ROOT / 'configs/smollm2_h100.yaml'}", *words, *given.more]


def run(number: int, given: argparse.Namespace, until: float) -> dict[str, Any] | None:
    """How a run ended; None where its time had come before it began."""
    if time.monotonic() > until:
        return None
    log = Path(given.output) / f"run-{number}.log"
    with log.open("w") as handle:
        try:
            code: int | str = subprocess.run(command(number, given), stdout=handle, stderr=subprocess.STDOUT, cwd=ROOT, timeout=given.timeout).returncode
        except subprocess.TimeoutExpired:
            code = f"no end within {given.timeout:.0f} s"
    said = log.read_text(errors="replace").strip().splitlines()
    found = {"run": number, "exit_code": code, "last": "" if code == 0 else " | ".join(said[-2:])[-400:]}
    print(json.dumps(found), flush=True)
    return found


def total(rows: list[dict[str, Any]]) -> str:
    """The count over sessions, in words: what it rules out of a rate of 1 in 14."""
    runs, failed = sum(row["runs"] for row in rows), sum(len(row["failed"]) for row in rows)
    return f"{runs} runs in {len(rows)} sessions, {failed} failed; at 1 in 14 all would end well with a chance of {(13 / 14) ** runs:.1%}"


def _told(*words: str) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "train", "validate", "records", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=8, help="runs side by side")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further run begins")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds of a run")
    parser.add_argument("--first_seed", type=int, default=0, help="of the first run; give another in another session")
    parser.add_argument("--commit", default="", help="what is tested, where there is no git")
    parser.add_argument("--count", default=str(COUNT), help="JSON lines, one a session")
    parser.add_argument("more", nargs="*", help="passed on to fit, after --")
    given = expand_all(parser.parse_args())
    count = Path(given.count)
    refuse_foreign(count, lines_with("runs", "failed", "steps"), field="count", what="count of runs")
    Path(given.output).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    began = time.monotonic()
    until = began + 60 * given.minutes
    with ThreadPoolExecutor(given.jobs) as pool:
        ended = [found for found in pool.map(lambda number: run(number, given, until), range(given.runs)) if found is not None]
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": given.commit or _told("git", "rev-parse", "--short", "HEAD"),
        "device": _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0] or "cpu",
        "steps": given.steps,
        "side_by_side": given.jobs,
        "runs": len(ended),
        "failed": [found for found in ended if found["exit_code"] != 0],
        "seconds": round(time.monotonic() - began),
    }
    with count.open("a") as handle:
        handle.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    print(total([json.loads(line) for line in count.read_text().splitlines() if line.strip()]), flush=True)
    raise SystemExit(1 if row["failed"] else 0)


if __name__ == "__main__":
    main()
