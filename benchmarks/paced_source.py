"""A source of records at a set pace, for ``pipeline.py``: a real worker and a real record writer, with random states in place of a target.

It connects to a run's coordinator as any worker does, takes leases, and writes their records into the run's store so that tokens arrive evenly at
``--rate``. What it could not write while nobody granted it credit is not made up for later.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.engines import worker
from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease, result_of
from torchspec.engines.record_writer import CapturedSample, RecordWriter
from torchspec.engines.table import ENGINES, EngineKind

RATE = "TORCHSPEC_SOURCE_RATE"
"""Environment variable: tokens/s; 0 for as fast as it can."""
_BATCH = 2048
"""Tokens of a write, about."""
_AHEAD = 8
"""Batches of leases that it holds."""
_SLACK = 0.1
"""Seconds of delay that are made up for."""


class PacedEngine:
    """An engine (``torchspec.engines.engine.Engine``) that computes nothing."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec, self.max_tokens = job, job.spec, job.max_length
        self._rate = float(os.environ.get(RATE, "0"))
        self._queue: deque[Lease] = deque()
        self._due = 0.0
        self._stats = EngineStats(0, 0, 0.0, 0.0)
        self._writer: RecordWriter | None = None
        self._writing: dict[str, Lease] = {}

    def start(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        width = len(self.spec.aux_layers) * self.spec.hidden_size
        self._aux = torch.randn(self.max_tokens, width).to(self.spec.torch_dtype)
        self._last = torch.randn(self.max_tokens, self.spec.hidden_size).to(self.spec.torch_dtype)
        self._writer = RecordWriter(self.job.store, self.spec, producer="paced source", device="cpu")
        return {"engine": "paced source", "versions": {}, "device": "cpu", "num_layers": 0}

    def room(self) -> tuple[int, int]:
        tokens = _AHEAD * max(_BATCH, self.max_tokens) - sum(len(lease.ids) // 4 for lease in self._queue)
        return (256 if tokens > 0 else 0), max(tokens, 0)

    def submit(self, leases: Sequence[Lease]) -> None:
        self._queue.extend(leases)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        dropped = [lease.id for lease in self._queue if lease.id in set(leases)]
        self._queue = deque(lease for lease in self._queue if lease.id not in set(dropped))
        return dropped

    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        assert self._writer is not None
        if not self._queue or not self._wait(timeout):
            return self._results(0.0 if self._queue else timeout)
        batch: list[Lease] = []
        tokens = 0
        while self._queue and (not batch or tokens + len(self._queue[0].ids) // 4 <= _BATCH):
            batch.append(self._queue.popleft())
            tokens += len(batch[-1].ids) // 4
        started = time.monotonic()
        ids = [torch.frombuffer(bytearray(lease.ids), dtype=torch.int32) for lease in batch]
        n = len(batch)
        self._writing |= {lease.key: lease for lease in batch}
        self._writer.write([CapturedSample(lease.key, x, x.numel(), partial(self._states, x.numel())) for lease, x in zip(batch, ids, strict=True)])
        s = self._stats
        self._stats = EngineStats(s.samples + n, s.tokens + tokens, s.busy_s + time.monotonic() - started, s.write_s)
        if self._rate:
            self._due = max(self._due, started - _SLACK) + tokens / self._rate
        return self._results(0.0)

    def _wait(self, timeout: float) -> bool:
        """Sleep until the next batch is due; False when that is later than ``timeout`` seconds from now."""
        left = self._due - time.monotonic()
        if left > 0:
            time.sleep(min(left, timeout))
        return left <= timeout

    def _results(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        assert self._writer is not None
        results = [result_of(self._writing.pop(wrote.key), wrote) for wrote in self._writer.results(timeout)]
        return [r for r in results if isinstance(r, Finished)], [r for r in results if isinstance(r, Failed)]

    def _states(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same random states for every conversation."""
        return self._aux[:tokens], self._last[:tokens]

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT")
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    ENGINES["transformers"] = EngineKind(worker="benchmarks.paced_source:PacedEngine")  # the run asks for that engine
    worker.main(["--coordinator", args.coordinator, "--name", args.name])


if __name__ == "__main__":
    main()
