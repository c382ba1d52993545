"""Faults on purpose: real coordinator, real store, real workers, loaders and clients; kills, stops, drops and delays; and a ledger that nothing escapes.

    python benchmarks/chaos.py --seeds 100
    python benchmarks/chaos.py --seeds 1 --plant lose      # also duplicate, leak, evict: must report violations

A seed is 1,000 conversations, 3 epochs, 2 workers and 2 ranks (1 after some resumes), a validation after each epoch. The engine alone is synthetic
(``chaos_parts.py``). Workers are killed or stopped, ranks are stopped or killed (all then resume from the last whole step, as after a crash), connections
through a proxy stall and break, engines fail, corrupt and hang. Prints one JSON line; ``violations`` counts every breach of docs/delivery.md: a sample
that was not trained exactly once an epoch in plan order (nor named in failed_samples.jsonl), wrong states, a key, credit, process or file that is left, more bytes than the
budget, books that do not agree, no progress.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ["TORCHSPEC_AUDIT"] = "1"  # the coordinator checks its books after every event
os.environ.setdefault("OMP_NUM_THREADS", "1")

import chaos_parts as parts  # noqa: E402
import torch  # noqa: E402

from torchspec.data.failures import cut_failures  # noqa: E402
from torchspec.engines import worker  # noqa: E402
from torchspec.engines.client import TrainerClient  # noqa: E402
from torchspec.engines.connection import Closed  # noqa: E402
from torchspec.engines.engine import EngineConfig  # noqa: E402
from torchspec.engines.group import EngineGroup, GroupConfig  # noqa: E402
from torchspec.engines.parent import die_with  # noqa: E402
from torchspec.errors import GroupStopped  # noqa: E402
from torchspec.target import TargetConfig  # noqa: E402
from torchspec.transfer import StoreConfig, open_store  # noqa: E402

SAMPLES, EPOCHS, WORKERS, VALIDATION = 1000, 3, 2, 40
LEASE_S, SILENCE_S, PATIENCE_S = 3.0, 1.5, 40.0
"""Deadline of a lease, silence that ends a worker, and seconds without a step that count as a hang."""
POISON = [13, 500, 777]
worker.ENGINES["synthetic"] = "chaos_parts:SyntheticEngine"


class Child:
    """A forked process, and a pipe each way."""

    def __init__(self, run: Callable[[Callable[[dict[str, Any]], None], int], None], log: Path) -> None:
        up, down = os.pipe(), os.pipe()
        owner = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                die_with(owner)
                os.setsid()
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.closerange(3, min(up[1], down[0]))
                run(lambda facts: _all(up[1], parts.line(facts)), down[0])
                code = 0
            except BaseException as error:
                traceback.print_exception(error) if not isinstance(error, (GroupStopped, Closed)) else None
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(code)
        os.close(up[1])
        os.close(down[0])
        self.reads, self.writes, self._rest = up[0], down[1], b""
        self.stopped_until = 0.0

    def said(self) -> list[dict[str, Any]]:
        """What came up the pipe; raises EOFError when the process has ended."""
        if not select.select([self.reads], [], [], 0)[0]:
            return []
        data = os.read(self.reads, 1 << 16)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(text) for text in lines]

    def tell(self, data: bytes) -> None:
        try:
            os.write(self.writes, data)
        except OSError:
            pass

    def stop(self, seconds: float) -> None:
        self.stopped_until = time.monotonic() + seconds
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self) -> None:
        for end in (self.reads, self.writes):
            os.close(end)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Seed:
    """One run under faults."""

    def __init__(self, seed: int, *, kind: str, plant: str | None, folder: Path) -> None:
        self.random = random.Random(seed)
        self.seed, self.plant, self.folder = seed, plant, folder
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        self.train, self.validate = parts.Conversations(SAMPLES, seed), parts.Conversations(VALIDATION, seed + 10**6)
        self.steps = self.train.plan(0).steps
        reserve = 2 * self.validate.largest_pack
        self.budget = reserve + 4 * self.train.largest_pack
        self.ledger: list[dict[str, Any]] = []
        """Committed micro-batches, in the order of their steps."""
        (folder / "shm").mkdir()
        chances = {"fail": 0.01, "corrupt": 0.004, "hang": 0.0005, "hang_s": 1.5 * LEASE_S, "poison": POISON}
        args = {"seed": seed, "keys": str(folder / "keys"), "plant": plant, **chances}
        engines = EngineConfig(workers=0, lease_timeout=LEASE_S, silence_timeout=SILENCE_S, max_attempts=8, max_failed_fraction=0.1, engine_args=args)
        self.group = EngineGroup(
            GroupConfig(
                target=TargetConfig("synthetic"),
                spec=parts.SPEC,
                store=StoreConfig(kind=kind, shm_dir=str(folder / "shm")),  # type: ignore[arg-type]
                engine="synthetic",
                engines=engines,
                budget=self.budget,
                reserve=reserve,
                max_length=parts.MAX_LENGTH,
                log_dir=folder / "logs",
                token=secrets.token_hex(8),
            )
        )
        self.workers: dict[str, Child] = {}
        self.ranks: dict[int, Child] = {}
        self.said: dict[int, list[dict[str, Any]]] = {}
        self.waiting: set[int] = set()
        self.done: set[int] = set()
        self.made = 0

    # -- the run

    def run(self) -> None:
        """From start to end, then look at what is left."""
        self.endpoint = self.group.start()
        try:
            observer = TrainerClient(self.endpoint, "observer", role="observer")
            self.store = open_store(observer.welcome.store)
            self.proxy = Child(self._proxy, self.folder / "proxy.log")
            while not (ports := self.proxy.said()):
                time.sleep(0.01)
            self.behind = [replace(self.endpoint, port=port) for port in ports[0]["ports"]]
            for _ in range(WORKERS):
                self._hire()
            self._begin(2)
            self._until_trained()
            self._settle(observer)
        except GroupStopped as error:
            self.violations.append(f"the group stopped: {error}")
        finally:
            for child in [*self.workers.values(), *self.ranks.values(), self.proxy]:
                child.kill()
            self.group.close()
        self._look_at_what_is_left()
        self._prove()

    def _proxy(self, say: Callable[[dict[str, Any]], None], commands: int) -> None:
        asyncio.run(parts.proxy(self.endpoint, lambda ports: say({"ports": ports}), commands))

    def _hire(self) -> None:
        self.made += 1
        name = f"worker-{self.made}"
        to = self.behind[0]
        self.workers[name] = Child(lambda say, commands: worker.work(to.host, to.port, token=to.token, name=name, device="cpu"), self.folder / "workers.log")

    def _begin(self, world: int) -> None:
        """Start the ranks from the last whole step."""
        position = sum(entry["kind"] == "train" for entry in self.ledger) // parts.PACKS_PER_STEP
        epoch, step = divmod(position, self.steps)
        cut_failures(self.folder / "failed.jsonl", epoch=epoch, pack=step * parts.PACKS_PER_STEP)
        if (
            self.ledger and self.ledger[-1]["kind"] == "train" and not step
        ):  # validation of that epoch was not whole: the run goes on without, as Lightning's does
            self.faults["validation skipped"] += 1
        self.waiting, self.done, self.said = set(), set(), {rank: [] for rank in range(world)}
        self.last_step = time.monotonic()
        for rank in range(world):
            job = parts.RankJob(rank, world, EPOCHS, position, self.budget, self.folder / "failed.jsonl", self.plant if not self.ledger else None)
            self.ranks[rank] = Child(lambda say, commands, job=job: self._rank(job, say, commands), self.folder / "ranks.log")  # type: ignore[misc]

    def _rank(self, job: parts.RankJob, say: Callable[[dict[str, Any]], None], commands: int) -> None:
        def go() -> None:
            say({"kind": "whole"})
            if not os.read(commands, 1):
                os._exit(0)

        parts.run_rank(job, self.behind[1], self.train, self.validate, say=say, go=go)

    def _until_trained(self) -> None:
        next_fault = time.monotonic() + 0.3
        while len(self.done) < len(self.ranks):
            select.select([child.reads for child in self.ranks.values()], [], [], 0.02)
            now = time.monotonic()
            self.group.check()
            for child in [*self.workers.values(), *self.ranks.values()]:
                if 0 < child.stopped_until <= now:
                    os.kill(child.pid, signal.SIGCONT)
                    child.stopped_until = 0.0
            self._replace_workers()
            self._check_budget()
            try:
                self._hear()
            except EOFError:  # a rank is gone: the run is, and resumes
                self._resume()
            if now >= next_fault:
                next_fault = now + self.random.uniform(0.05, 0.5)
                self._fault()
            if now - self.last_step > PATIENCE_S:
                self.violations.append(
                    f"no step for {PATIENCE_S:.0f} s: {[len(s) for s in self.said.values()]} micro-batches wait, ranks {self.waiting} are ready"
                )
                return

    def _hear(self) -> None:
        for rank, child in self.ranks.items():
            if rank in self.done:
                continue
            for facts in child.said():
                if facts["kind"] == "whole":
                    self.waiting.add(rank)
                elif facts["kind"] == "end":
                    self.done.add(rank)
                else:
                    self.said[rank].append(facts)
        if self.waiting == self.ranks.keys():  # every rank has the step: it is trained
            self.ledger += sorted((facts for said in self.said.values() for facts in said), key=lambda f: f["pack"])
            self.said = {rank: [] for rank in self.ranks}
            self.waiting = set()
            self.last_step = time.monotonic()
            for child in self.ranks.values():
                child.tell(b".")

    def _resume(self) -> None:
        for child in self.ranks.values():
            child.kill()
        self.ranks.clear()
        self.faults["resume"] += 1
        self._begin(self.random.choice([1, 2]))

    def _replace_workers(self) -> None:
        for name, child in list(self.workers.items()):
            if os.waitpid(child.pid, os.WNOHANG)[0]:
                os.close(child.reads)
                os.close(child.writes)
                del self.workers[name]
                self._hire()

    def _fault(self) -> None:
        what = self.random.choices(
            ["worker killed", "worker stopped", "rank stopped", "worker dropped", "workers stalled", "ranks stalled", "rank killed", "rank dropped", "evict"],
            [4, 2, 2, 2, 2, 2, 0.3, 0.3, 6 if self.plant == "evict" else 0],
        )[0]
        self.faults[what] += 1
        workers = [child for child in self.workers.values() if not child.stopped_until]
        ranks = [child for rank, child in self.ranks.items() if not child.stopped_until and rank not in self.done]
        if what == "worker killed" and workers:
            os.kill(self.random.choice(workers).pid, signal.SIGKILL)
        elif what == "worker stopped" and workers:
            self.random.choice(workers).stop(self.random.choice([0.2, 1.3 * SILENCE_S]))
        elif what == "rank stopped" and ranks:
            self.random.choice(ranks).stop(self.random.uniform(0.05, 0.6))
        elif what == "rank killed" and ranks:
            os.kill(self.random.choice(ranks).pid, signal.SIGKILL)
        elif what.endswith("dropped"):
            self.proxy.tell(f"drop {int(what.startswith('rank'))}\n".encode())
        elif what.endswith("stalled"):
            self.proxy.tell(f"stall {int(what.startswith('rank'))} {self.random.uniform(0.1, 0.8):.2f}\n".encode())
        elif what == "evict":
            keys = (self.folder / "keys").read_text().splitlines()[-40:] if (self.folder / "keys").exists() else []
            self.store.delete(keys)

    # -- the proof

    def _check_budget(self) -> None:
        """Records in shared memory against the budget. A worker that was cut off while it wrote may add what it held: its key is deleted once more later."""
        used = 0
        for path in (self.folder / "shm").glob("*/r*"):
            try:
                used += path.stat().st_size
            except FileNotFoundError:
                pass
        allowed = self.budget + WORKERS * WORKER_BYTES
        if used > allowed:
            self.violations.append(f"{used} bytes in the store, {allowed} allowed")

    def _settle(self, observer: TrainerClient) -> None:
        """All is trained: within a lease's time and a little, nothing may be left in store and books."""
        deadline = time.monotonic() + 2 * LEASE_S + 3
        while time.monotonic() < deadline:
            for child in self.workers.values():
                if child.stopped_until:
                    os.kill(child.pid, signal.SIGCONT)
            state = observer.ask()
            keys = (self.folder / "keys").read_text().splitlines()
            left = [key for key, there in zip(keys, self.store.exists(keys), strict=True) if there]
            if not left and not state["bytes_alive"] and not state["leased"] and not state["ready_for_work"]:
                break
            time.sleep(0.05)
        else:
            self.violations.append(f"left: {len(left)} keys such as {left[:2]}, { ({k: v for k, v in state.items() if k != 'workers'}) }")
        observer.close()
        self.store.close()

    def _look_at_what_is_left(self) -> None:
        if files := os.listdir(self.folder / "shm"):
            self.violations.append(f"files left in shared memory: {files[:3]}")
        token = self.group.config.token.encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if b"TORCHSPEC_TOKEN=" + token in (entry / "environ").read_bytes() or token in (entry / "cmdline").read_bytes():
                        self.violations.append(f"process {entry.name} is left")
                except OSError:
                    pass
        for text in (self.folder / "logs" / "coordinator.log").read_text().splitlines():
            if "could not use" in text and "store missing" in text:
                self.violations.append(f"a record that was owed is gone: {text[24:200]}")

    def _prove(self) -> None:
        """Every sample exactly once an epoch, in plan order, with its own states, or named as failed."""
        failed: Counter[tuple[int, int]] = Counter()
        if (self.folder / "failed.jsonl").exists():
            for text in (self.folder / "failed.jsonl").read_text().splitlines():
                entry = json.loads(text)
                if entry["stage"] == "train":
                    failed[entry["epoch"], entry["sample"]] += 1
        trained = Counter((entry["epoch"], sample) for entry in self.ledger if entry["kind"] == "train" for sample in entry["samples"])
        for epoch in range(EPOCHS):
            for sample in range(SAMPLES):
                times, named = trained[epoch, sample], failed[epoch, sample]
                if times + min(named, 1) != 1 or (sample in POISON and times):
                    self.violations.append(f"epoch {epoch} sample {sample}: trained {times} times, named as failed {named} times")
            packs = [entry["pack"] for entry in self.ledger if entry["kind"] == "train" and entry["epoch"] == epoch]
            if packs != list(range(len(self.train.plan(epoch)))):
                self.violations.append(f"epoch {epoch}: packs out of order or number: {len(packs)}")
            checked = [sample for entry in self.ledger if entry["kind"] == "validate" and entry["epoch"] == epoch for sample in entry["samples"]]
            if checked and sorted(checked) != list(range(VALIDATION)):
                self.violations.append(f"validation of epoch {epoch}: {len(checked)} samples")
        self.violations += [f"wrong states: {entry}" for entry in self.ledger if entry["wrong"]]


WORKER_BYTES = parts.WORKER_SAMPLES * parts.SPEC.nbytes(parts.MAX_LENGTH)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--plant", choices=["lose", "duplicate", "leak", "evict"], help="a breach that must be found")
    parser.add_argument("--seconds", type=float, help="begin no further seed after so many")
    parser.add_argument("--store", choices=["mixed", "shm", "mooncake"], default="mixed", help="mixed: every fourth seed on Mooncake, where it is installed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    faults: Counter[str] = Counter()
    violations: list[str] = []
    count = 0
    for seed in range(options.first, options.first + options.seeds):
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            break
        kind = options.store if options.store != "mixed" else ("auto" if seed % 4 == 3 else "shm")
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        run = Seed(seed, kind=kind, plant=options.plant, folder=folder)
        run.run()
        count += 1
        faults += run.faults
        violations += [f"seed {seed}: {text}" for text in run.violations]
        if run.violations and options.plant is None:
            print(f"seed {seed} left its logs in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    seconds = round(time.monotonic() - started, 1)
    numbers = {"seeds": count, "samples": count * SAMPLES * EPOCHS, "faults": faults.total(), "violations": len(violations), "seconds": seconds}
    print(json.dumps({**numbers, "kinds": dict(faults), "first_violations": violations[:5], "plant": options.plant}))
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
