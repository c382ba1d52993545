"""How long does one training step of a draft take on this machine, and how much memory?

A step is forward, backward, clipping by norm and fused AdamW on fp32 masters, over random states of a target; no engine, no store. One JSON line a case:
milliseconds (median of ``--steps``, by CUDA events on a GPU), tokens/s, peak memory and its parts, the FLOPs of the step as the paper's algorithm needs
them, their time at this machine's own rate of large matrix products (``floor_ms``) and the share of that rate which the step reached. Default sizes are
an EAGLE-3 draft of Qwen3-8B.

    python benchmarks/train_step.py --tokens 4096 --draft_vocab 32000
    python benchmarks/train_step.py --tokens 8192 --lengths lognormal --draft_vocab 32000       # a pack of real lengths
    python benchmarks/train_step.py --tokens 512 --reference                                     # beside a plain version, in the same run
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.plain_step import PlainStep
from torchspec.batch import PackedBatch
from torchspec.files import dumps
from torchspec.hardware import working_dtype
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.network import Eagle3Draft, RMSNorm
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.optim.clipping import clip
from torchspec.models.target_head import TargetHead
from torchspec.supervision import Unroll, as_unroll, turns

_GIB = 2**30


def lengths_of(tokens: int, how: str, seed: int) -> list[int]:
    """Conversation lengths that fill a pack: one of ``tokens``, or log-normal ones (median 500, mean about 900, at most 4096; the last one is cut)."""
    if how == "dense":
        return [tokens]
    generator = np.random.default_rng(seed)
    found: list[int] = []
    while sum(found) < tokens:
        found.append(int(np.clip(generator.lognormal(np.log(500.0), 1.08), 16, 4096)))
    found[-1] -= sum(found) - tokens
    return found


def make_batch(config: DraftConfig, lengths: list[int], *, steps: int, dtype: torch.dtype, device: torch.device, seed: int) -> PackedBatch:
    """A pack of random tokens and states in which every position is supervised."""
    generator = torch.Generator(device).manual_seed(seed)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    total = int(bounds[-1])
    turn = turns(np.ones(total, dtype=np.uint8), bounds)
    counts = Unroll(steps).counts(np.ones(total, dtype=np.uint8), bounds).sum(axis=0)
    batch = PackedBatch(
        input_ids=torch.randint(0, config.vocab_size, (total,), generator=generator, device=device),
        position=torch.from_numpy(np.arange(total) - np.repeat(bounds[:-1], lengths)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        turn=torch.from_numpy(turn),
        aux=torch.randn(total, len(config.aux_layers) * config.target_hidden_size, generator=generator, device=device, dtype=dtype),
        last=torch.randn(total, config.target_hidden_size, generator=generator, device=device, dtype=dtype),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        sample_ids=tuple(range(len(lengths))),
        counts=torch.from_numpy(np.maximum(counts, 1).astype(np.float32)),
        rows=Unroll(steps).rows(turn, bounds),
    )
    return batch.to(device)


def make_task(config: DraftConfig, *, steps: int, dtype: torch.dtype, device: torch.device, recompute: bool = False, fp8: Fp8 = Fp8.NONE) -> DraftTask:
    """Random weights at the scale of a fresh draft."""
    torch.manual_seed(0)
    with torch.device(device):
        draft = Eagle3Draft(config, compute_dtype=dtype, recompute=recompute, fp8=fp8).to(device)
        draft.initialise()
        weight = torch.randn(config.vocab_size, config.target_hidden_size, dtype=dtype) * 0.02
        table = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype) * 0.02
    with torch.device("meta"):
        norm = RMSNorm(config.target_hidden_size, config.rms_norm_eps)
    head = TargetHead(weight, None, norm_module=norm, norm_tensors={"weight": torch.ones(config.target_hidden_size, dtype=dtype, device=device)})
    if not config.owns_embedding:
        draft.set_embedding(table)
    pruned = config.draft_vocab_size < config.vocab_size
    ids = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values if pruned else None
    return DraftTask(draft, head, draft_ids=ids, step_weights=[0.8**k for k in range(steps)]).to(device)


def step_flops(config: DraftConfig, batch: PackedBatch) -> dict[str, float]:
    """Floating-point operations of a step by part: a product counts 2, and its backward twice as much (attention: 2.5 times)."""
    heads, size, width = config.num_heads, config.head_dim, config.hidden_size
    unroll = as_unroll(batch.rows)
    rows = sum(index.shape[0] for index in unroll.index)
    projections = 2 * width * (heads + 2 * config.num_kv_heads) * size + heads * size * width
    layer = projections + 3 * width * config.intermediate_size
    lengths = batch.cu_seqlens.diff().double()
    fc = batch.num_tokens * len(config.aux_layers) * config.target_hidden_size * width
    return {
        "backbone": 6.0 * (rows * layer * config.num_layers + fc),
        "draft_head": 6.0 * rows * width * config.draft_vocab_size,
        "target_head": 2.0 * batch.rows.base.shape[0] * config.target_hidden_size * config.vocab_size,
        "attention": 3.5 * 2 * heads * size * float(lengths.square().sum()) * unroll.steps * config.num_layers,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on random data, median of 10."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2.0 * n**3 / statistics.median(timed(lambda: torch.matmul(a, b), device, repeat=10, warm=3))


def timed(run: Callable[[], Any], device: torch.device, *, repeat: int, warm: int) -> list[float]:
    """Seconds of each repetition."""
    for _ in range(warm):
        run()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return seconds
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    torch.cuda.synchronize()
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def size(tensors: list[Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: PackedBatch, forward: Callable[[], Tensor]) -> dict[str, float]:
    """Peak of a step in GiB and its parts. What a forward leaves for the backward is measured, the rest is counted."""
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward()
    held, forward_peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    clip(optimizer, 1.0)
    optimizer.step()
    step_peak = torch.cuda.max_memory_allocated()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fields = [getattr(batch, name) for name in ("input_ids", "position", "sequence", "turn", "aux", "last")]
    rows = as_unroll(batch.rows)
    lists = [rows.base, rows.at, rows.step, rows.where, *rows.index, *rows.keep, *rows.onto]
    parts = {
        "masters": size([p.data for p in parameters]),
        "moments": size([t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]),
        "gradients": size([p.grad for p in parameters if p.grad is not None]),
        "frozen_tables": size(list(model.buffers())),
        "batch": size([*fields, *lists]),
        "held_for_backward": held - before,
        "forward_peak": forward_peak,
        "backward_peak": backward_peak,
        "optimizer_peak": step_peak,
    }
    optimizer.zero_grad(set_to_none=True)
    return {name: round(value / _GIB, 3) for name, value in parts.items()}


def measure(name: str, model: torch.nn.Module, loss_of: Callable[[], Tensor], args: argparse.Namespace, batch: PackedBatch, facts: dict[str, Any]) -> None:
    """Time a step and print its line."""
    device = batch.input_ids.device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, betas=(0.9, 0.95), fused=True)
    losses: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        if name == "plain":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            assert clip(optimizer, 1.0) is not None
        optimizer.step()
        losses.append(loss.detach())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, device, repeat=args.steps, warm=args.warm)
    median = statistics.median(seconds)
    flops = facts["flops"]
    report = {
        "version": name,
        **facts["case"],
        "ms": round(1e3 * median, 2),
        "ms_range": [round(1e3 * min(seconds), 2), round(1e3 * max(seconds), 2)],
        "tokens_per_s": round(batch.num_tokens / median),
        "tflop": {part: round(value / 1e12, 3) for part, value in flops.items()},
        "floor_ms": round(1e3 * sum(flops.values()) / facts["rate"], 2),
        "share_of_matmul_rate": round(sum(flops.values()) / median / facts["rate"], 3),
        "first_loss": round(float(losses[0]), 5),
    }
    if device.type == "cuda":
        report["peak_gib"] = round(torch.cuda.max_memory_allocated() / _GIB, 2)
        report["gib"] = memory(model, optimizer, batch, loss_of)
    print(dumps(report), flush=True)
    if args.profile:
        _profile(step, device, args.profile)


def _profile(step: Callable[[], None], device: torch.device, rows: int) -> None:
    """Where the time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        for _ in range(2):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = [e for e in found.key_averages() if (e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total) > 0]
    own = (lambda e: e.self_device_time_total) if device.type == "cuda" else (lambda e: e.self_cpu_time_total)
    if device.type == "cuda":
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=own, reverse=True)[:rows]:
        print(f"{own(event) / 2e3:9.3f} ms  {event.count / 2:7.1f} x  {event.key[:150]}", flush=True)
    print(f"{sum(map(own, events)) / 2e3:9.3f} ms  {sum(e.count for e in events) / 2:7.1f} x  in all, a step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="tokens of a pack; several make several cases")
    parser.add_argument("--lengths", choices=("dense", "lognormal"), default="dense", help="one conversation a pack, or real lengths")
    parser.add_argument("--draft_vocab", type=int, nargs="+", default=[32000], help="W; equal to --vocab for the whole one")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=4096, help="H and D")
    parser.add_argument("--intermediate", type=int, default=12288)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--unroll_steps", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a case")
    parser.add_argument("--warm", type=int, default=3, help="steps before them")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of products; a CPU without bf16 instructions takes fp32")
    parser.add_argument("--recompute", action="store_true", help="make the MLP's inner activations again in the backward")
    parser.add_argument(
        "--matmul", choices=("bf16", "fp8", "fp8_all"), default="bf16", help="products of the MLP, the head and attention; fp8_all: weight gradients too"
    )
    parser.add_argument("--reference", action="store_true", help="also time a plain version (dense only)")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="then print the kernels that take most of a step")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = working_dtype(torch.bfloat16, device) if args.dtype == "bf16" else torch.float32
    rate = matmul_rate(device, dtype)
    for width in args.draft_vocab:
        config = DraftConfig(
            hidden_size=args.hidden, intermediate_size=args.intermediate, num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim,
            vocab_size=args.vocab, draft_vocab_size=width, target_hidden_size=args.hidden, aux_layers=(2, 18, 33),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=2**18,
        )  # fmt: skip
        for tokens in args.tokens:
            lengths = lengths_of(tokens, args.lengths, seed=0)
            batch = make_batch(config, lengths, steps=args.unroll_steps, dtype=dtype, device=device, seed=1)
            case = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
                "matmul_tflops": round(rate / 1e12, 2),
                "tokens": tokens, "conversations": len(lengths), "W": width, "V": args.vocab, "K": args.unroll_steps, "dtype": str(dtype)[6:],
                "recompute": args.recompute, "matmul": args.matmul,
            }  # fmt: skip
            facts = {"case": case, "rate": rate, "flops": step_flops(config, batch)}
            task = make_task(config, steps=args.unroll_steps, dtype=dtype, device=device, recompute=args.recompute, fp8=Fp8.of(args.matmul))
            measure("torchspec", task, lambda task=task, batch=batch: task(batch).loss, args, batch, facts)  # type: ignore[misc]
            if args.reference and args.lengths == "dense":
                plain = PlainStep(task, dtype=dtype)
                measure("plain", plain, lambda plain=plain, batch=batch: plain(batch), args, batch, facts)  # type: ignore[misc]
                del plain
            del task, batch
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
