"""CPU of every process while it waits: no side may spin, whichever is slow.

    python benchmarks/waiting.py

Prints one JSON line a case, with the CPU of each process in percent of a core: ``slow trainer``, where ranks take no more batches and everybody waits for
their acknowledgements, with the bytes alive beside the budget; ``slow engine``, where the workers are stopped and coordinator and ranks wait for records.
Real coordinator, store, worker loops and loaders, the synthetic engine of ``chaos_parts.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import chaos_run  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from torchspec.engines.client import TrainerClient  # noqa: E402

_SETTLES = 1.5
"""Seconds until everybody has done what there is to do."""


class Waiting(chaos_run.Seed):
    """A run whose only faults are two waits."""

    ledger: list[dict[str, Any]]
    chances = {"fail": 0.0, "corrupt": 0.0, "hang": 0.0, "hang_s": 0.0}
    read_hangs = 0.0

    def __init__(self, seconds: float, *, kind: str, folder: Path) -> None:
        super().__init__(0, kind=kind, plant=None, folder=folder)
        self.seconds = seconds
        self.cases: list[dict[str, Any]] = []
        config = self.group.config
        self.group.config = replace(config, engines=replace(config.engines, silence_timeout=600.0, lease_timeout=600.0))

    def _until_trained(self) -> None:
        self._train(steps=3)
        time.sleep(_SETTLES)  # ranks have a step and are not told to go on
        self._measure("slow trainer", self._pids() | {name: child.pid for name, child in self.workers.items()})
        self._train(steps=2)
        for child in self.workers.values():
            os.kill(child.pid, signal.SIGSTOP)
        starved = time.monotonic() + _SETTLES
        while time.monotonic() < starved:
            self._hear()
            starved = max(starved, self.last_step + _SETTLES)
            time.sleep(0.02)
        self._measure("slow engine", self._pids())
        for child in self.workers.values():
            os.kill(child.pid, signal.SIGCONT)

    def _train(self, *, steps: int) -> None:
        until = len(self.ledger) + steps * chaos_run.parts.PACKS_PER_STEP
        while len(self.ledger) < until:
            select.select([child.reads for child in self.ranks.values()], [], [], 0.02)
            self.group.check()
            self._hear()

    def _pids(self) -> dict[str, int]:
        assert self.group._process is not None
        return {"coordinator": self.group._process.pid} | {f"rank-{rank}": child.pid for rank, child in self.ranks.items()}

    def _measure(self, case: str, pids: dict[str, int]) -> None:
        def busy() -> dict[str, float]:
            return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}

        before, started = busy(), time.monotonic()
        time.sleep(self.seconds)
        elapsed, after = time.monotonic() - started, busy()
        observer = TrainerClient(self.endpoint, "observer", role="observer")
        state = observer.ask()
        observer.close()
        percent = {name: round(100 * (after[name] - before[name]) / elapsed, 2) for name in pids}
        self.cases.append({"case": case, "seconds": self.seconds, "cpu_percent": percent, "bytes_alive": state["bytes_alive"], "budget": state["budget"]})

    def _settle(self, observer: TrainerClient) -> None:
        self.epochs, self.ledger = 0, []  # what was trained is not the question here
        for child in self.ranks.values():
            child.kill()
        self.ranks.clear()
        super()._settle(observer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each wait")
    parser.add_argument("--store", choices=["shm", "mooncake"], default="shm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="waiting-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    run = Waiting(options.seconds, kind=options.store, folder=folder)
    run.run()
    shutil.rmtree(folder)
    for case in run.cases:
        print(json.dumps({"store": options.store, **case, "violations": run.violations}))
    return int(bool(run.violations))


if __name__ == "__main__":
    sys.exit(main())
