"""Does the trainer wait for data? Engine group, store and trainer as in a run; a paced source of random records (``paced_source.py``) in place of a target.

Two cases a store: ``free``, in which the source writes as fast as credit allows, tells the trainer's own rate (tokens over the time that its device computed);
then records arrive at ``--pace`` times that rate. One JSON line a case, after ``--warm`` steps: ``wait_fraction`` is the share of the time in which the
device stood still for want of data (``torchspec/callbacks/clock.py``), ``loop_wait_fraction`` that in which the trainer's loop waited for a batch: on a GPU
it runs ahead, so this costs nothing as long as the device has work.

    python benchmarks/pipeline.py                                                     # an EAGLE-3 draft of Qwen3-8B (a GPU)
    python benchmarks/pipeline.py --hidden 576 --intermediate 1536 --heads 9 --kv_heads 3 --head_dim 64 --vocab 49152 --draft_vocab 8192 \\
        --unroll_steps 4 --max_tokens 512 --max_length 512 --median 180 --budget 256MiB --stores shm mooncake         # the quickstart's sizes
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lightning.pytorch as pl

from benchmarks.paced_source import RATE
from torchspec.callbacks.clock import Clocked
from torchspec.callbacks.vocabulary import VocabularyPruning
from torchspec.data.datamodule import DraftDataModule
from torchspec.engines.engine import EngineConfig
from torchspec.files import dumps
from torchspec.models.module import DraftModule
from torchspec.network import host_port
from torchspec.paths import expand_all
from torchspec.target import TargetConfig
from torchspec.trainer import Trainer
from torchspec.transfer.store import StoreConfig

_SOURCE = Path(__file__).with_name("paced_source.py")


def make_target(folder: Path, args: argparse.Namespace) -> None:
    """A Llama of the given sizes as far as a trainer reads it: configuration, embedding (tied) and final norm, random."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, head_dim=args.head_dim, vocab_size=args.vocab, max_position_embeddings=2**17, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"], dtype=torch.bfloat16, bos_token_id=0, eos_token_id=1,
    ).save_pretrained(folder)  # fmt: skip
    table = torch.empty(args.vocab, args.hidden, dtype=torch.bfloat16).normal_(std=0.02)
    save_file({"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(args.hidden, dtype=torch.bfloat16)}, folder / "model.safetensors")


def make_data(file: Path, args: argparse.Namespace) -> None:
    """Random tokens, all but the first supervised; log-normal lengths (Qwen3-8B's sizes: median 500, mean about 900)."""
    generator = np.random.default_rng(0)
    left = int(1.1 * (args.warm + args.steps) * args.max_tokens)
    with file.open("w") as out:
        while left > 0:
            n = int(np.clip(generator.lognormal(np.log(args.median), 1.08), 16, args.max_length))
            left -= n
            out.write(json.dumps({"input_ids": generator.integers(args.vocab, size=n).tolist(), "loss_mask": [0] + [1] * (n - 1)}) + "\n")


class Watch(Clocked):
    """Starts the source when the group listens, and measures between two steps."""

    def __init__(self, *, rate: float, sources: int, first: int, last: int) -> None:
        super().__init__(skip=first)
        self._rate, self._sources, self._first, self._last = rate, sources, first, last
        self._processes: list[subprocess.Popen[bytes]] = []
        self._begun: dict[str, float] = {}
        self.found: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        environment = {**os.environ, RATE: str(self._rate / self._sources)}
        for number in range(self._sources):
            command = [sys.executable, str(_SOURCE), "--name", f"source-{number}"]
            command += ["--coordinator", host_port(data.endpoint.host, data.endpoint.port)]
            self._processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))

    def _now(self, trainer: pl.Trainer) -> dict[str, float]:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        stats = trainer.datamodule.loader_stats("train")  # type: ignore[attr-defined]
        counters = {name: float(getattr(stats, name)) for name in ("wait_s", "read_s", "collate_s", "idle_s", "full_s", "bytes")}
        return {"seconds": time.monotonic(), **counters}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._first:
            self._begun = self._now(trainer)
        elif trainer.global_step == self._last:
            now, times = self._now(trainer), self.clock.settle(wait=True)
            self.found = {name: now[name] - begun for name, begun in self._begun.items()} | asdict(times)

    def end(self) -> None:
        """End the sources."""
        for process in self._processes:
            process.kill()
            process.wait()


def run(kind: Any, rate: float, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Train with records at ``rate`` tokens/s (0: as fast as may be); what was measured."""
    watch = Watch(rate=rate, sources=args.sources, first=args.warm, last=args.warm + args.steps)
    target = TargetConfig(str(folder / "target"))
    data = DraftDataModule(
        target, str(folder / "train.jsonl"), max_length=args.max_length, max_tokens=args.max_tokens, packs_per_step=1,
        engines=EngineConfig(workers=0), store=StoreConfig(kind=kind, budget=args.budget), cache_dir=str(folder / "cache"),
    )  # fmt: skip
    model = DraftModule(target, unroll_steps=args.unroll_steps, optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True))  # type: ignore[arg-type]
    pruning = [VocabularyPruning(args.draft_vocab)] if args.draft_vocab < args.vocab else []
    trainer = Trainer(
        accelerator="auto", devices=1, max_steps=args.warm + args.steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=str(folder / "run"), callbacks=[*pruning, watch],
    )  # fmt: skip
    try:
        trainer.fit(model, datamodule=data)
    finally:
        watch.end()
    return watch.found


def report(kind: str, source: str, rate: float, m: dict[str, float], args: argparse.Namespace) -> float:
    """Print a case's line; returns the trainer's own rate, tokens/s."""
    cuda = torch.cuda.is_available()
    own = m["tokens"] / m["busy_s"]
    line = {
        "store": kind, "source": source, "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "hidden": args.hidden, "W": args.draft_vocab, "K": args.unroll_steps, "max_tokens": args.max_tokens, "steps": args.steps,
        "arrival_tokens_per_s": round(rate) or None, "tokens_per_s": round(m["tokens"] / m["seconds"], 1), "trainer_tokens_per_s": round(own, 1),
        "ms": round(1e3 * m["seconds"] / args.steps, 2), "wait_ms": round(1e3 * m["starved_s"] / args.steps, 3),
        "wait_fraction": round(m["starved_s"] / m["seconds"], 5), "loop_wait_fraction": round(m["wait_s"] / m["seconds"], 5),
        "gb_per_s": round(m["bytes"] / m["seconds"] / 1e9, 3),
        "loader_busy": {name: round(m[f"{name}_s"] / m["seconds"], 3) for name in ("read", "collate")},
    }  # fmt: skip
    print(dumps(line), flush=True)
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--stores", nargs="+", default=["shm"], choices=["shm", "mooncake"])
    parser.add_argument("--pace", nargs="+", type=float, default=[1.2], help="arrival of records, in trainer's rates")
    parser.add_argument("--sources", type=int, default=1, help="processes that write records")
    parser.add_argument("--steps", type=int, default=40, help="measured steps")
    parser.add_argument("--warm", type=int, default=10, help="steps before them")
    parser.add_argument("--max_tokens", type=int, default=8192, help="tokens of a pack")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--median", type=float, default=500.0, help="of the conversations' lengths")
    parser.add_argument("--budget", default="4GiB", help="of the store")
    parser.add_argument("--draft_vocab", type=int, default=32000, help="W")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=12288)
    parser.add_argument("--layers", type=int, default=36, help="of the target; only their number is used")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--unroll_steps", type=int, default=7)
    parser.add_argument("--folder", help="where target, data and logs go; a temporary one when it is not given")
    args = expand_all(parser.parse_args())
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "torchspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["TORCHSPEC_TOKEN"] = secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory(prefix="torchspec-pipeline-", dir=args.folder) as made:
        folder = Path(made)
        make_target(folder / "target", args)
        make_data(folder / "train.jsonl", args)
        for kind in args.stores:
            own = report(kind, "free", 0.0, run(kind, 0.0, folder, args), args)
            for pace in args.pace:
                report(kind, f"{pace:g}x", pace * own, run(kind, pace * own, folder, args), args)


if __name__ == "__main__":
    main()
