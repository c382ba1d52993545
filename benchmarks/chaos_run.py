"""One seed of ``chaos.py``: the processes, the faults that befall them, and the ledger of what was trained. ``chaos_proof.py`` judges it."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import random
import secrets
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import chaos_parts as parts
import chaos_proof as proof

from torchspec.data.failures import cut_failures
from torchspec.engines import worker
from torchspec.engines.client import TrainerClient
from torchspec.engines.connection import Closed
from torchspec.engines.engine import EngineConfig
from torchspec.engines.group import EngineGroup, GroupConfig
from torchspec.engines.parent_death import die_with
from torchspec.errors import GroupStopped
from torchspec.target import TargetConfig
from torchspec.transfer import Store, StoreConfig, open_store

SAMPLES, EPOCHS, WORKERS, VALIDATION = 1000, 3, 2, 40
LEASE_S, SILENCE_S, PATIENCE_S = 3.0, 1.5, 40.0
"""Deadline of a lease, silence that ends a worker, and seconds without a step that count as a hang."""
POISON = [13, 500, 777]
EVICTIONS = 60
"""Records that ``--plant evict`` deletes at least: of those in the store some were already read."""


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
                faulthandler.register(signal.SIGUSR1)  # a process that hangs is asked where
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


def _delete_found(store: Store, keys: list[str]) -> int:
    """Delete the keys that are there, and count them."""
    there = [key for key, found in zip(keys, store.exists(keys), strict=True) if found]
    store.delete(there)
    return len(there)


def _all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


class Seed:
    """One run under faults."""

    chances = {"fail": 0.01, "corrupt": 0.004, "hang": 0.0005, "hang_s": 1.5 * LEASE_S}
    """Of an engine, at each sample."""
    read_hangs = parts.READ_HANGS
    """Of a rank, at each read."""
    over = False
    """Ends the run before its last epoch."""

    def __init__(self, seed: int, *, kind: str, plant: str | None, folder: Path) -> None:
        self.random = random.Random(seed)
        self.epochs = EPOCHS if plant is None else 1  # a breach shows in one
        self.seed, self.plant, self.folder = seed, plant, folder
        self.faults: Counter[str] = Counter()
        self.violations: list[str] = []
        self.train, self.validate = parts.PackBounds(SAMPLES, seed), parts.PackBounds(VALIDATION, seed + 10**6)
        self.steps = self.train.plan(0).steps
        reserve = 2 * self.validate.largest_pack
        self.budget = reserve + 4 * self.train.largest_pack
        self.ledger: list[dict[str, Any]] = []
        """Committed micro-batches, in the order of their steps."""
        (folder / "shm").mkdir()
        args = {"seed": seed, "keys": str(folder / "keys"), "plant": plant, "poison": POISON, **self.chances}
        engines = EngineConfig(workers=0, lease_timeout=LEASE_S, silence_timeout=SILENCE_S, max_attempts=8, max_failed_fraction=0.1, engine_args=args)
        self.group = EngineGroup(
            GroupConfig(
                target=TargetConfig("synthetic"),
                spec=parts.SPEC,
                store=StoreConfig(kind=kind, shm_dir=str(folder / "shm")),  # type: ignore[arg-type]
                engine="chaos_parts:SYNTHETIC",
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
        self.evicted = 0

    # -- the run

    def run(self) -> None:
        """From start to end, then look at what is left."""
        self.endpoint = self.group.start()
        try:
            observer = TrainerClient(self.endpoint, "observer", role="observer")
            self.store = observer.welcome.store
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
        self.violations += proof.left_behind(self.folder, self.group.config.token)
        self.violations += proof.not_exactly_once(
            self.ledger, self.folder / "failed.jsonl", self.train, validation=VALIDATION, epochs=self.epochs, poison=POISON
        )

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
            plant = self.plant if not self.ledger else None
            job = parts.RankJob(rank, world, self.epochs, position, self.budget, self.folder / "failed.jsonl", plant, self.read_hangs)
            self.ranks[rank] = Child(lambda say, commands, job=job: self._rank(job, say, commands), self.folder / "ranks.log")  # type: ignore[misc]

    def _rank(self, job: parts.RankJob, say: Callable[[dict[str, Any]], None], commands: int) -> None:
        def go() -> None:
            say({"kind": "whole"})
            if not os.read(commands, 1):
                os._exit(0)

        parts.run_rank(job, self.behind[1], self.train, self.validate, say=say, go=go)

    def _until_trained(self) -> None:
        next_fault = time.monotonic() + 0.3
        while len(self.done) < len(self.ranks) and not self.over:
            select.select([child.reads for child in self.ranks.values()], [], [], 0.02)
            now = time.monotonic()
            self.group.check()
            for child in [*self.workers.values(), *self.ranks.values()]:
                if 0 < child.stopped_until <= now:
                    os.kill(child.pid, signal.SIGCONT)
                    child.stopped_until = 0.0
            self._replace_workers()
            self.violations += proof.over_budget(self.folder, self.budget + WORKERS * parts.WORKER_BYTES)
            try:
                self._hear()
            except EOFError:  # a rank is gone: the run is, and resumes
                self._resume()
            if now >= next_fault:
                next_fault = now + self.random.uniform(0.1, 0.8)
                self._fault()
            if now - self.last_step > PATIENCE_S:
                self.violations.append(
                    f"no step for {PATIENCE_S:.0f} s: {[len(s) for s in self.said.values()]} micro-batches wait, ranks {self.waiting} are ready"
                )
                for child in [*self.workers.values(), *self.ranks.values()]:
                    os.kill(child.pid, signal.SIGUSR1)  # their stacks, in their logs
                time.sleep(1.0)
                return

    def _hear(self) -> None:
        for rank, child in self.ranks.items():
            if rank in self.done:
                continue
            for facts in child.said():
                if facts["kind"] == "whole":
                    self.waiting.add(rank)
                elif facts["kind"] == "fault":
                    self.faults[facts["what"]] += 1
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
        if self.plant == "evict" and self.evicted < EVICTIONS and (self.folder / "keys").exists():
            what = "evict"  # however short the run is, it has them
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
            self._evict(ranks)

    def _evict(self, ranks: list[Child]) -> None:
        """Delete the newest records behind everybody's back, when some have piled up that no rank takes away."""
        if not (self.folder / "keys").exists():
            return
        for child in ranks:
            child.stop(0.6)
        time.sleep(0.4)
        keys = (self.folder / "keys").read_text().splitlines()[-40:]
        self.evicted += self._with_store(lambda store: _delete_found(store, keys))

    def _with_store(self, do: Callable[[Store], Any]) -> Any:
        """Its result, from a process of its own: one that has opened a Mooncake store must not be forked any more."""
        child = Child(lambda say, commands: say({"result": do(open_store(self.store))}), self.folder / "store.log")
        try:
            while not (said := child.said()):
                if not select.select([child.reads], [], [], PATIENCE_S)[0]:
                    raise TimeoutError("a process that looks at the store has not answered")
            return said[0]["result"]
        finally:
            child.kill()

    def _settle(self, observer: TrainerClient) -> None:
        """All is trained: within a few leases' time nothing may be left in store and books."""
        deadline = time.monotonic() + 4 * LEASE_S
        left, state = [""], observer.ask()
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            for child in self.workers.values():
                if child.stopped_until:
                    os.kill(child.pid, signal.SIGCONT)
            state = observer.ask()
            if not state["bytes_alive"] and not state["leased"] and not state["ready_for_work"]:
                keys = (self.folder / "keys").read_text().splitlines()
                left = self._with_store(lambda store, keys=keys: [key for key, there in zip(keys, store.exists(keys), strict=True) if there])  # type: ignore[misc]
        if left:
            self.violations.append(f"left: {len(left)} keys such as {left[:2]}, { ({k: v for k, v in state.items() if k != 'workers'}) }")
        observer.close()
