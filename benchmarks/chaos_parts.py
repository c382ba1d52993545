"""The processes of ``chaos.py``: a synthetic engine in the real worker loop, a rank that uses the real loader, and a proxy that drops and delays.

Each is forked from a process that has torch imported, so that one costs milliseconds. The engine writes real records whose states follow from sample and
token, so that a rank can tell whether it was given the right ones; it fails, corrupts and hangs by chance.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchspec.batch import PackedBatch
from torchspec.data.loader import LoaderConfig, PackLoader, Pass
from torchspec.data.plan import Plan
from torchspec.engines.client import Endpoint, TrainerClient
from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease, Sample
from torchspec.engines.record_writer import put_when_room
from torchspec.engines.table import EngineKind
from torchspec.supervision import Unroll
from torchspec.transfer import open_store
from torchspec.transfer.mooncake import MooncakeStore
from torchspec.transfer.record import RecordSpec, seal, views
from torchspec.transfer.shm import ShmStore

MAX_LENGTH, MAX_TOKENS, PACKS_PER_STEP, STEPS = 48, 192, 4, 2
SPEC = RecordSpec(target="synthetic", tokenizer="", aux_layers=(1, 3), hidden_size=8, dtype="float32")
WORKER_SAMPLES, WORKER_TOKENS = 8, 256
"""Room of a worker."""
SYNTHETIC = EngineKind(worker="chaos_parts:SyntheticEngine")
READ_LIMIT, READ_HANGS = 2.0, 0.003
"""Seconds that a rank waits for a read, and the chance that one hangs for twice as long."""


WORKER_BYTES = WORKER_SAMPLES * SPEC.nbytes(MAX_LENGTH)
"""What it may be writing at most."""


class PackBounds:
    """So many conversations of random tokens (see ``torchspec.data.sample_source.Samples``)."""

    def __init__(self, count: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.lengths = generator.integers(8, MAX_LENGTH + 1, count)
        self.content = f"synthetic-{count}-{seed}"
        self._ids = [generator.integers(0, 1000, n).astype("<i4") for n in self.lengths]

    @property
    def largest_pack(self) -> int:
        """Bytes that no pack of any epoch exceeds."""
        sizes = np.array([SPEC.nbytes(int(n)) for n in self.lengths])
        return int(np.ceil((sizes / self.lengths).max() * MAX_TOKENS))

    def ids(self, index: int) -> np.ndarray:
        """[T] int32."""
        return self._ids[index]

    def request(self, index: int, *, epoch: int) -> Sample:
        return Sample(index, self._ids[index].tobytes())

    def mismatch(self, index: int, ids: Tensor) -> str:
        return "" if np.array_equal(ids.numpy(), self._ids[index]) else f"holds the tokens of another sample than {index}"

    def loss_mask(self, index: int, tokens: int) -> np.ndarray:
        return np.ones(tokens, dtype=np.uint8)

    def positions(self, index: int, tokens: int) -> None:
        return None

    def key(self, index: int) -> int:
        return index

    def place(self, index: int) -> str:
        return f"synthetic:{index}"

    def plan(self, epoch: int, *, shuffle: bool = True) -> Plan:
        """The plan of an epoch."""
        counts = np.repeat(self.lengths[:, None], STEPS, axis=1)
        return Plan(self.lengths, seed=0, epoch=epoch, max_tokens=MAX_TOKENS, packs_per_step=PACKS_PER_STEP, counts=counts, shuffle=shuffle)


def states(ids: np.ndarray, index: int) -> tuple[Tensor, Tensor]:
    """(aux [T, n*D], last [T, D]) that a sample must have."""
    column = torch.from_numpy(ids.astype(np.float32) + index / 4096)[:, None]
    width = len(SPEC.aux_layers) * SPEC.hidden_size
    return column.expand(-1, width), -column.expand(-1, SPEC.hidden_size)


class SyntheticEngine:
    """See the module. ``engine_args``: ``seed``, ``keys`` (file in which a key is noted before it is written), ``poison`` (samples that fail), chances."""

    def __init__(self, job: Job) -> None:
        self.spec, self.max_tokens = job.spec, job.max_length
        self._args = job.config.engine_args
        self._store = open_store(job.store)
        self._buffer = self._store.buffer(job.spec.nbytes(job.max_length))
        self._queue: deque[Lease] = deque()
        self._random = random.Random(f"{self._args['seed']}/{os.getpid()}")
        self._samples = self._tokens = 0

    def start(self) -> dict[str, Any]:
        return {"engine": "synthetic"}

    def room(self) -> tuple[int, int]:
        return max(WORKER_SAMPLES - len(self._queue), 0), WORKER_TOKENS

    def submit(self, leases: Sequence[Lease]) -> None:
        self._queue.extend(leases)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        dropped = [lease.id for lease in self._queue if lease.id in leases]
        self._queue = deque(lease for lease in self._queue if lease.id not in leases)
        return dropped

    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        finished: list[Finished] = []
        failed: list[Failed] = []
        for _ in range(min(len(self._queue), self._random.randint(1, 4))):
            lease = self._queue.popleft()
            chance = self._random.random
            if lease.index in self._args["poison"] and lease.stage == "train":
                failed.append(Failed(lease.id, "poison"))
            elif chance() < self._args["fail"]:
                failed.append(Failed(lease.id, "bad luck"))
            else:
                if chance() < self._args["hang"]:
                    time.sleep(self._args["hang_s"])
                finished.append(Finished(lease.id, *self._write(lease)))
        return finished, failed

    def _write(self, lease: Lease) -> tuple[int, int]:
        ids = np.frombuffer(lease.ids, dtype="<i4")
        tokens = ids.shape[0]
        rows = tokens - lease.index % 2  # both forms of a record
        into_ids, aux, last = views(self._buffer, self.spec, tokens, rows)
        into_ids.copy_(torch.from_numpy(ids.copy()))
        for view, wanted in zip((aux, last), states(ids, lease.index), strict=True):
            view.copy_(wanted[:rows])
        record = seal(self._buffer, self.spec, tokens, rows, producer="synthetic")
        if self._random.random() < self._args["corrupt"]:
            record[-70:].random_(0, 256)  # past the checksum's making
        keys = [lease.key]
        if self._args["plant"] == "leak" and lease.index % 100 == 7:
            keys.append(f"{lease.key}.more")
        with Path(self._args["keys"]).open("a") as notes:
            notes.write("".join(f"{key}\n" for key in keys))
        for key in keys:
            put_when_room(self._store, [key], [record])
        self._samples += 1
        self._tokens += tokens
        return record.numel(), rows

    def stats(self) -> EngineStats:
        return EngineStats(samples=self._samples, tokens=self._tokens, busy_s=0.0, write_s=0.0)

    def close(self) -> None:
        self._store.close()


@dataclass(frozen=True)
class RankJob:
    """One rank from a position of the run to its end."""

    rank: int
    world: int
    epochs: int
    step: int
    """Optimizer steps done, over all epochs."""
    window: int
    failed_path: Path
    plant: str | None
    read_hangs: float
    """Chance that a read from the store hangs."""


def run_rank(job: RankJob, endpoint: Endpoint, train: PackBounds, validate: PackBounds, say: Callable[[dict[str, Any]], None], go: Callable[[], None]) -> None:
    """Train each step from ``job.step`` on, validate after each epoch: say each micro-batch, then wait for ``go`` (what a collective does in a real run)."""
    plan = train.plan(0)
    at = [job.step]
    config: dict[str, Any] = {
        "rank": job.rank,
        "world": job.world,
        "spec": SPEC,
        "window_bytes": job.window,
        "supervision": Unroll(STEPS),
        "prefetch_packs": 2,
        "failed_path": job.failed_path,
        "pin": False,
    }
    config |= {"health": lambda: None, "interrupted": lambda: False, "read_limit": READ_LIMIT}
    if job.read_hangs:
        _let_reads_hang(job.read_hangs, say)

    def begin_training() -> Pass:
        epoch, step = divmod(at[0], plan.steps)
        return Pass(train.plan(epoch), epoch, step * PACKS_PER_STEP, len(plan) if epoch < job.epochs else step * PACKS_PER_STEP)

    def begin_validation() -> Pass:
        checked = validate.plan(0, shuffle=False)
        return Pass(checked, at[0] // plan.steps, 0, len(checked))

    def connect(name: str) -> TrainerClient:
        return TrainerClient(endpoint, name)

    training = PackLoader(LoaderConfig(stage="train", dataset=train, **config), connect=connect, begin=begin_training, length=lambda: 0)
    validation = PackLoader(LoaderConfig(stage="validate", dataset=validate, **config), connect=connect, begin=begin_validation, length=lambda: 0)
    planted = iter([True] if job.plant in ("lose", "duplicate") and job.rank == 0 else [])
    while at[0] < job.epochs * plan.steps:
        batches = 0
        for batch in training:
            epoch = at[0] // plan.steps
            if len(batch.sample_ids) > 1 and next(planted, False):
                if job.plant == "lose":
                    batch = _without_last(batch)
                else:
                    say(_facts("train", epoch, batch, train))
            say(_facts("train", epoch, batch, train))
            batches += 1
            if batches % (PACKS_PER_STEP // job.world) == 0:
                go()
                at[0] += 1
        for batch in validation:
            say(_facts("validate", at[0] // plan.steps - 1, batch, validate))
        go()
    training.close()
    validation.close()
    say({"kind": "end"})


def _let_reads_hang(chance: float, say: Callable[[dict[str, Any]], None]) -> None:
    """From now on some reads of this process hang, and end when nobody waits for them any more."""
    luck = random.Random(os.getpid())
    for kind in (ShmStore, MooncakeStore):

        def get(self: Any, keys: Sequence[str], outs: Sequence[Tensor], inner: Any = kind.get) -> list[int]:
            if luck.random() < chance:
                say({"kind": "fault", "what": "read hung"})
                time.sleep(2 * READ_LIMIT)
            return inner(self, keys, outs)  # type: ignore[no-any-return]

        kind.get = get  # type: ignore[method-assign,assignment]


def _without_last(batch: PackedBatch) -> PackedBatch:
    """The planted loss: a micro-batch whose last sample is forgotten."""
    from dataclasses import replace

    return replace(batch, sample_ids=batch.sample_ids[:-1])


def _facts(stage: str, epoch: int, batch: PackedBatch, data: PackBounds) -> dict[str, Any]:
    """What was trained, and whether its states are those of its samples."""
    wrong = []
    bounds = batch.cu_seqlens.tolist()
    for i, index in enumerate(batch.sample_ids):
        low, high = bounds[i], bounds[i + 1]
        aux, last = states(data.ids(index), index)
        rows = high - low - index % 2
        if not torch.equal(batch.aux[low : low + rows], aux[:rows]) or not torch.equal(batch.last[low : low + rows], last[:rows]):
            wrong.append(index)
    return {"kind": stage, "epoch": epoch, "pack": batch.pack_index, "samples": list(batch.sample_ids), "wrong": wrong}


async def proxy(upstream: Endpoint, ports: Callable[[list[int]], None], commands: int) -> None:
    """Forward two loopback ports (workers, ranks) to the coordinator; ``commands`` is a descriptor with lines like ``drop 0`` and ``stall 1 0.4``."""
    open_now: list[set[asyncio.StreamWriter]] = [set(), set()]
    until = [0.0, 0.0]

    async def pump(side: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                while (left := until[side] - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                cut = len(data) // 2  # no message arrives in the pieces it was sent in
                writer.write(data[:cut])
                await writer.drain()
                writer.write(data[cut:])
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(side: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(upstream.host, upstream.port)
        except OSError:
            writer.close()
            return
        open_now[side].add(writer)
        await asyncio.gather(pump(side, reader, back), pump(side, there, writer))
        open_now[side].discard(writer)

    def obey() -> None:
        said = os.read(commands, 4096).decode()
        if not said:
            os._exit(0)
        for line in said.splitlines():
            what, side, *more = line.split()
            if what == "stall":
                until[int(side)] = time.monotonic() + float(more[0])
            elif open_now[int(side)]:
                random.choice(sorted(open_now[int(side)], key=id)).transport.abort()

    servers = [await asyncio.start_server(lambda r, w, side=side: accept(side, r, w), "127.0.0.1", 0) for side in (0, 1)]  # type: ignore[misc]
    asyncio.get_running_loop().add_reader(commands, obey)
    ports([server.sockets[0].getsockname()[1] for server in servers])
    await asyncio.Event().wait()


def line(facts: dict[str, Any]) -> bytes:
    """One line of a pipe."""
    return json.dumps(facts).encode() + b"\n"
