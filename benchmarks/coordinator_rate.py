"""The coordinator alone: lease-to-acknowledge cycles a second over its sockets, its CPU while everybody waits, and how fast it wakes them.

    python benchmarks/coordinator_rate.py

Prints one JSON line a case. A real coordinator process with a shared-memory store; one trainer and one worker connection, driven by this process. A cycle is
one sample: submitted with its ids, granted credit, leased, reported, announced, acknowledged, its key deleted. Nothing is written, so a deletion finds no file.
``cycles_per_cpu_s`` is what one core of the coordinator does: cycles over the CPU time of that process, all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torchspec.engines.client import Endpoint  # noqa: E402
from torchspec.engines.connection import Connection  # noqa: E402
from torchspec.engines.engine import EngineConfig  # noqa: E402
from torchspec.engines.group import EngineGroup, GroupConfig  # noqa: E402
from torchspec.engines.handshake import greet  # noqa: E402
from torchspec.engines.messages import (  # noqa: E402
    Acknowledge,
    Finished,
    OpenStage,
    Pack,
    PackReady,
    Pull,
    Ready,
    Report,
    Sample,
    Submit,
    ToTrainer,
    ToWorker,
    Work,
)
from torchspec.target import TargetConfig  # noqa: E402
from torchspec.transfer import StoreConfig  # noqa: E402
from torchspec.transfer.spec import RecordSpec  # noqa: E402

SPEC = RecordSpec(target="none", tokenizer="", aux_layers=(2, 4), hidden_size=4096, dtype="bfloat16")
LONGEST = 1 << 62


class Pair:
    """One trainer and one worker connection to a coordinator."""

    def __init__(self, endpoint: Endpoint, packs: int) -> None:
        self.trainer = Connection((endpoint.host, endpoint.port), ToTrainer)
        self.worker = Connection((endpoint.host, endpoint.port), ToWorker)
        greet(self.trainer, token=endpoint.token, role="trainer", name="rank-0")
        greet(self.worker, token=endpoint.token, role="worker", name="worker-0")
        self.worker.send(Ready(spec=SPEC.to_dict(), info={}, max_tokens=1 << 20))
        self.trainer.send(OpenStage(stage="train", epoch=0, first_pack=0, num_packs=packs, rank=0, world=1))

    def submit(self, index: int, samples: int, ids: bytes) -> None:
        self.trainer.send(Submit(stage="train", epoch=0, packs=[Pack(index, [Sample(index * samples + i, ids) for i in range(samples)])]))

    def acknowledge(self, pack: int) -> None:
        self.trainer.send(Acknowledge(stage="train", epoch=0, packs=[pack]))

    def announced(self, timeout: float) -> PackReady | None:
        """The next pack that is ready."""
        while (message := self.trainer.receive(timeout)) is not None:
            if isinstance(message, PackReady):
                return message
        return None

    def leased(self, timeout: float) -> Work | None:
        """The next work."""
        while (message := self.worker.receive(timeout)) is not None:
            if isinstance(message, Work):
                return message
        return None

    def report(self, work: Work) -> None:
        self.worker.send(Report(finished=[Finished(lease.id, SPEC.nbytes(len(lease.ids) // 4), len(lease.ids) // 4) for lease in work.leases], failed=[]))


def rate(pair: Pair, process: psutil.Process, *, samples: int, tokens: int, seconds: float, ahead: int) -> dict[str, Any]:
    """Cycles with ``ahead`` packs of ``samples`` under way."""
    ids = b"\0" * (4 * tokens)
    submitted = done = 0
    before, started = sum(process.cpu_times()[:2]), time.monotonic()
    pair.worker.send(Pull(samples=samples, tokens=LONGEST))
    while time.monotonic() < started + seconds or done < submitted:
        while submitted - done < ahead and time.monotonic() < started + seconds:
            pair.submit(submitted, samples, ids)
            submitted += 1
        if (work := pair.leased(0.001)) is not None:
            pair.report(work)
            pair.worker.send(Pull(samples=samples, tokens=LONGEST))
        while (ready := pair.announced(0.0)) is not None:
            pair.acknowledge(ready.pack)
            done += 1
    elapsed = time.monotonic() - started
    busy = sum(process.cpu_times()[:2]) - before
    cycles = done * samples
    facts = {"batch": samples, "tokens": tokens, "cycles": cycles, "cycles_per_s": round(cycles / elapsed), "coordinator_cpu": round(busy / elapsed, 2)}
    return {"case": "rate", **facts, "cycles_per_cpu_s": round(cycles / busy)}


def waiting(pair: Pair, process: psutil.Process, *, seconds: float) -> dict[str, Any]:
    """A worker waits for packs and a trainer for records: what the coordinator does meanwhile."""
    pair.worker.send(Pull(samples=1, tokens=LONGEST))
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return {"case": "waiting", "coordinator_cpu": round((sum(process.cpu_times()[:2]) - before) / seconds, 4)}


def wake(pair: Pair, *, tokens: int, times: int) -> list[dict[str, Any]]:
    """Milliseconds until a waiting worker has a lease or a waiting trainer its pack. The budget must hold one sample of ``tokens``, not two."""
    took: dict[str, list[float]] = {"submit_to_lease": [], "report_to_ready": [], "acknowledge_to_lease": []}
    ids = b"\0" * (4 * tokens)

    def pulled() -> None:
        pair.worker.send(Pull(samples=1, tokens=LONGEST))

    def lease() -> Work:
        work = pair.leased(10.0)
        assert work is not None, "no lease within 10 s"
        return work

    def ready() -> PackReady:
        found = pair.announced(10.0)
        assert found is not None, "no pack within 10 s"
        return found

    pulled()
    for index in range(0, 2 * times, 2):
        time.sleep(0.005)  # everybody waits
        began = time.monotonic()
        pair.submit(index, 1, ids)
        first = lease()
        took["submit_to_lease"].append(time.monotonic() - began)
        pair.submit(index + 1, 1, ids)  # its credit is missing
        pulled()
        time.sleep(0.005)
        began = time.monotonic()
        pair.report(first)
        done = ready()
        took["report_to_ready"].append(time.monotonic() - began)
        began = time.monotonic()
        pair.acknowledge(done.pack)
        second = lease()
        took["acknowledge_to_lease"].append(time.monotonic() - began)
        pair.report(second)
        pulled()
        pair.acknowledge(ready().pack)
    return [
        {"case": name, "median_ms": round(1000 * statistics.median(t), 2), "p99_ms": round(1000 * sorted(t)[len(t) * 99 // 100], 2)} for name, t in took.items()
    ]


def group_of(folder: Path, budget: int) -> EngineGroup:
    """A coordinator that waits for our worker."""
    folder.mkdir()
    return EngineGroup(
        GroupConfig(
            target=TargetConfig("none"),
            spec=SPEC,
            store=StoreConfig(kind="shm", shm_dir=str(folder)),
            engine="none",
            engines=EngineConfig(workers=0, lease_timeout=600.0, silence_timeout=600.0),
            budget=budget,
            reserve=0,
            max_length=1,
            log_dir=folder / "logs",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate, and of the wait")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64], help="samples of a pack and of a pull")
    parser.add_argument("--tokens", type=int, default=64, help="token ids of a sample")
    parser.add_argument("--times", type=int, default=200, help="wake-ups measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        room = 16 * max(options.batches) * SPEC.nbytes(options.tokens)  # never written: the store is only asked whether it has so much
        for case, batch in enumerate(options.batches):
            _with(Path(name) / str(case), room, lambda pair, process, batch=batch: print(json.dumps(_rate(pair, process, options, batch)), flush=True))  # type: ignore[misc]
        _with(Path(name) / "wait", room, lambda pair, process: print(json.dumps(waiting(pair, process, seconds=options.seconds)), flush=True))
        tight = SPEC.nbytes(options.tokens) * 3 // 2
        _with(
            Path(name) / "wake",
            tight,
            lambda pair, process: print("\n".join(map(json.dumps, wake(pair, tokens=options.tokens, times=options.times))), flush=True),
        )


def _rate(pair: Pair, process: psutil.Process, options: argparse.Namespace, batch: int) -> dict[str, Any]:
    return rate(pair, process, samples=batch, tokens=options.tokens, seconds=options.seconds, ahead=8)


def _with(folder: Path, budget: int, do: Callable[[Pair, psutil.Process], None]) -> None:
    group = group_of(folder, budget)
    try:
        pair = Pair(group.start(), packs=1 << 30)
        assert group._process is not None
        do(pair, psutil.Process(group._process.pid))
        pair.trainer.close()
        pair.worker.close()
    finally:
        group.close()


if __name__ == "__main__":
    main()
