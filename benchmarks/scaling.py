"""How does a training step scale over ranks, and where does the rest go?

Started by torchrun; every rank trains its own pack of the same size. ``single`` steps alone on each GPU (the baseline, all GPUs equally busy), ``ddp`` and
``fsdp2`` as ``main.py fit`` sets them up. One JSON line a case from rank 0: milliseconds (median over the steps of the slowest rank), tokens/s of all ranks,
peak memory of a rank, and efficiency: the time of ``single`` over the case's. ``--profile`` then takes one optimizer step of ``--accumulate`` micro-batches
apart: the collectives called, and the time of their kernels with how much of it no other kernel covers (one strategy a process: a second profile was seen to
miss kernels of NCCL's streams). ``--stops`` times what tells ranks of a SIGTERM in every batch:
Lightning's broadcast, and ours.

    torchrun --standalone --nproc_per_node 2 benchmarks/scaling.py --tokens 4096 8192 --draft_vocab 32000 151936
    torchrun --standalone --nproc_per_node 2 benchmarks/scaling.py --accumulate 2 --profile --stops
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train_step import lengths_of, make_batch, make_task
from torchspec.agreement import Agreement, Vote
from torchspec.batch import PackedBatch
from torchspec.files import dumps
from torchspec.hardware import working_dtype
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.optim.clipping import clip
from torchspec.models.training.parallelize import ddp_options, parallelize, sync_gradients

_GIB = 2**30
COLLECTIVES = {"all_gather": ("allgather", "all_gather"), "reduce_scatter": ("reducescatter", "reduce_scatter"), "all_reduce": ("allreduce", "all_reduce")}
"""Parts of a kernel's name (NCCL) or an operation's (gloo), lower case."""
_MARKS = ("nccl:", "FSDP::", "Optimizer", "DistributedDataParallel", "record_", "##", "Torch")
"""Beginnings of profiler entries that are no kernels: regions that others marked."""
COPIES = ("split_with_sizes_copy", "chunk_cat", "foreach_copy")
"""Kernels that fill and empty FSDP2's buffers."""


class Case:
    """A task on this rank, wrapped by a strategy, with the step that is timed."""

    def __init__(self, strategy: str, config: DraftConfig, tokens: int, args: argparse.Namespace, device: torch.device) -> None:
        self.strategy, self.accumulate = strategy, args.accumulate
        dtype = working_dtype(torch.bfloat16, device)
        rank = dist.get_rank()
        lengths = lengths_of(tokens, args.lengths, seed=0)
        self.batches = [
            make_batch(config, lengths, steps=args.unroll_steps, dtype=dtype, device=device, seed=1 + rank + 100 * i) for i in range(self.accumulate)
        ]
        task = make_task(config, steps=args.unroll_steps, dtype=dtype, device=device)
        self.world = 1 if strategy == "single" else dist.get_world_size()
        self.model: nn.Module = task
        if strategy == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self.model = DistributedDataParallel(task, device_ids=None if device.type == "cpu" else [device.index], **ddp_options())
        elif strategy == "fsdp2":
            mesh = dist.device_mesh.init_device_mesh(device.type, (self.world,))
            parallelize(task, mesh=mesh, compute_dtype=dtype)
        self.trained = [p for p in task.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.before: Callable[[], Any] = lambda: None
        """Run before every micro-batch."""

    def step(self) -> None:
        """One optimizer step, as Lightning does it: gradients are exchanged in the last micro-batch alone."""
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(self.batches):
            self.before()
            self._micro_batch(batch, last=number == self.accumulate - 1)
        if clip(self.optimizer, 1.0) is None:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def _micro_batch(self, batch: PackedBatch, *, last: bool) -> None:
        if self.strategy == "fsdp2":
            sync_gradients(self.model, last)
        if self.strategy == "ddp" and not last:
            with self.model.no_sync():  # type: ignore[operator]
                self._backward(self.model(batch).loss)
            return
        self._backward(self.model(batch).loss)

    def _backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_steps(case: Case, device: torch.device, *, warm: int, steps: int) -> float:
    """Median seconds of a step on the slowest rank. Ranks begin together; the clock is the host's around ``steps`` single steps on a CPU, else the device's."""
    for _ in range(warm):
        case.step()
    synchronize(device)
    dist.barrier()
    seconds = []
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            case.step()
            mark.record()
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    else:
        for _ in range(steps):
            started = time.perf_counter()
            case.step()
            seconds.append(time.perf_counter() - started)
    return most(statistics.median(seconds), device)


def most(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    word = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    return float(word)


def say(row: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        print(dumps(row), flush=True)


def lightnings_broadcast(device: torch.device) -> Callable[[], Any]:
    """What Lightning 2.6.6 does before every batch when there are several ranks."""

    def tell() -> None:
        word = torch.tensor([0], device=device)
        dist.broadcast(word, src=0)
        word.item()

    return tell


def time_stops(case: Case, facts: dict[str, Any], device: torch.device, args: argparse.Namespace) -> None:
    """Steps with neither way of telling, then with each of them, and once more with neither."""
    agreement = Agreement(dist.get_world_size())
    agreement(Vote.GO)
    ways = {"none": lambda: None, "lightning": lightnings_broadcast(device), "agreement": lambda: agreement(Vote.GO), "none again": lambda: None}
    for name, way in ways.items():
        case.before = way
        say({"stop": name, **facts, "ms": round(1e3 * time_steps(case, device, warm=2, steps=args.steps), 2)})
    case.before = lambda: None


def intervals(events: list[Any], names: Callable[[str], bool]) -> list[tuple[float, float]]:
    """Merged [begin, end] of the events that ``names`` takes, in microseconds."""
    merged: list[list[float]] = []
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in events if names(e.name.lower())):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return [(a, b) for a, b in merged]


def covered(spans: list[tuple[float, float]], by: list[tuple[float, float]]) -> float:
    """How much of ``spans`` lies inside ``by``."""
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in spans for c, d in by)


def kind_of(name: str) -> str | None:
    return next((kind for kind, parts in COLLECTIVES.items() if any(part in name for part in parts)), None)


def take_apart(case: Case, facts: dict[str, Any], device: torch.device) -> None:
    """Profile one optimizer step."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        case.step()
        synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    prefix = "nccldevkernel" if cuda else "gloo:"
    events = [e for e in found.events() if e.device_type == kind and (not e.name.startswith(_MARKS) if cuda else e.name.startswith(prefix))]
    talk = lambda name: prefix in name  # noqa: E731
    compute = intervals(events, lambda name: not talk(name))
    row: dict[str, Any] = {"profile": case.strategy, **facts}
    row["calls"] = dict(Counter(e.name.removeprefix("c10d::").strip("_") for e in found.events() if e.name.startswith("c10d::")))
    for what in COLLECTIVES:
        mine = [e for e in events if talk(e.name.lower()) and kind_of(e.name.lower()) == what]
        spans = intervals(mine, lambda name: True)
        total = sum(b - a for a, b in spans)
        row[what] = {"kernels": len(mine), "ms": round(total / 1e3, 3), "exposed_ms": round((total - covered(spans, compute)) / 1e3, 3)}
    if cuda:
        row["fsdp_copies_ms"] = round(sum(e.time_range.elapsed_us() for e in events if any(part in e.name.lower() for part in COPIES)) / 1e3, 3)
        every = intervals(events, lambda name: "memcpy htod" not in name)
        row["span_ms"] = round((every[-1][1] - every[0][0]) / 1e3, 3)
        row["idle_ms"] = round((every[-1][1] - every[0][0] - sum(b - a for a, b in every)) / 1e3, 3)
    say(row)


def run(args: argparse.Namespace, device: torch.device) -> None:
    world = dist.get_world_size()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for width in args.draft_vocab:
        config = DraftConfig(
            hidden_size=args.hidden, intermediate_size=args.intermediate, num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim,
            vocab_size=args.vocab, draft_vocab_size=width, target_hidden_size=args.hidden, aux_layers=(2, 18, 33),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=2**18,
        )  # fmt: skip
        for tokens in args.tokens:
            alone = 0.0
            for strategy in args.strategies:
                gc.collect()  # wrappers of the case before hold on to it in cycles
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                case = Case(strategy, config, tokens, args, device)
                seconds = time_steps(case, device, warm=args.warm, steps=args.steps)
                alone = seconds if strategy == "single" else alone
                facts = {"strategy": strategy, "ranks": world, "tokens": tokens, "W": width, "accumulate": args.accumulate}
                row = {"device": name, **facts, "ms": round(1e3 * seconds, 2), "tokens_per_s": round(world * args.accumulate * tokens / seconds)}
                if device.type == "cuda":
                    row["peak_gib"] = round(most(torch.cuda.max_memory_allocated() / _GIB, device), 2)
                if alone:
                    row["efficiency"] = round(alone / seconds, 4)
                say(row)
                if args.profile and strategy != "single":
                    take_apart(case, facts, device)
                if args.stops and strategy != "single":
                    time_stops(case, facts, device, args)
                del case


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--strategies", nargs="+", choices=("single", "ddp", "fsdp2"), default=["single", "ddp", "fsdp2"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="tokens of a rank's pack")
    parser.add_argument("--lengths", choices=("dense", "lognormal"), default="dense", help="one conversation a pack, or real lengths")
    parser.add_argument("--draft_vocab", type=int, nargs="+", default=[32000], help="W")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=4096, help="H and D")
    parser.add_argument("--intermediate", type=int, default=12288)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--unroll_steps", type=int, default=7)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a case")
    parser.add_argument("--warm", type=int, default=3, help="steps before them")
    parser.add_argument("--profile", action="store_true", help="also take a step of ddp and fsdp2 apart")
    parser.add_argument("--stops", action="store_true", help="also time the ways to tell ranks of a SIGTERM")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        run(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
