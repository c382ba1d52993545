"""Memory over time: a run of ``chaos.py`` without faults, for as long as asked, and what every process of it weighs at its start and at its end.

    python benchmarks/soak.py --minutes 30

Prints one JSON line: samples trained, and for coordinator, workers and ranks the resident memory (RSS) after the first tenth of the time and at the
end, in MiB, with their growth an hour between the medians of the second and the last quarter. Everything else of the chaos benchmark holds too:
``violations`` must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import chaos_run  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from torchspec.engines.client import TrainerClient  # noqa: E402

MIB = 2**20


class Soak(chaos_run.Seed):
    """A seed whose faults are looks at the memory."""

    ledger: list[dict[str, Any]]
    chances = {"fail": 0.001, "corrupt": 0.001, "hang": 0.0, "hang_s": 0.0}
    read_hangs = 0.0

    def __init__(self, seconds: float, *, kind: str, folder: Path) -> None:
        super().__init__(0, kind=kind, plant=None, folder=folder)
        self.epochs = 10**6
        self.seconds = seconds
        self.weights: dict[str, list[float]] = {}
        self.started = time.monotonic()

    def _fault(self) -> None:
        assert self.group._process is not None
        pids = {"coordinator": self.group._process.pid, "proxy": self.proxy.pid, "driver": os.getpid()}
        pids |= {name: child.pid for name, child in self.workers.items()} | {f"rank-{rank}": child.pid for rank, child in self.ranks.items()}
        for name, pid in pids.items():
            self.weights.setdefault(name, []).append(psutil.Process(pid).memory_info().rss / MIB)
        self.over = time.monotonic() - self.started > self.seconds

    def _settle(self, observer: TrainerClient) -> None:
        print(json.dumps(self.report()), file=sys.stderr, flush=True)
        self.trained = sum(len(entry["samples"]) for entry in self.ledger if entry["kind"] == "train")
        self.epochs = sum(entry["kind"] == "train" for entry in self.ledger) // (self.steps * chaos_run.parts.PACKS_PER_STEP)
        self.ledger = [entry for entry in self.ledger if entry["epoch"] < self.epochs]
        for child in self.ranks.values():  # the epoch that is going on is not finished
            child.kill()
        self.ranks.clear()
        super()._settle(observer)

    def report(self) -> dict[str, dict[str, float]]:
        """RSS of each process that lived from the first tenth to the end."""
        looks = len(self.weights["coordinator"])
        found = {}
        for name, weights in self.weights.items():
            if len(weights) == looks and looks >= 20:
                quarter = looks // 4
                early, late = statistics.median(weights[quarter : 2 * quarter]), statistics.median(weights[-quarter:])
                hours = self.seconds / 3600 * 0.5  # between the middles of these two quarters
                found[name] = {"start_mib": round(weights[looks // 10], 1), "end_mib": round(weights[-1], 1), "mib_per_hour": round((late - early) / hours, 1)}
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--store", choices=["shm", "mooncake"], default="shm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    run = Soak(60 * options.minutes, kind=options.store, folder=folder)
    run.run()
    shutil.rmtree(folder)
    facts = {"minutes": options.minutes, "store": options.store, "samples": run.trained, "epochs": run.epochs, "violations": len(run.violations)}
    print(json.dumps({**facts, "first_violations": run.violations[:3], "processes": run.report()}))
    return int(bool(run.violations))


if __name__ == "__main__":
    sys.exit(main())
