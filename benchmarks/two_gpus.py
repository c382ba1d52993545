"""Runs of ``main.py fit`` on two devices, looked at from outside: the parts of ``two_gpus.sh`` that are not a bare training step.

``target`` writes a random target and conversations. ``paths`` trains 200 steps of the same packs on one device with accumulation 2, on two with ddp and with
fsdp2; saves on two, resumes on one and back; ends runs with SIGTERM to the launcher and ``kill -9`` of either rank, looks for what is left, and resumes.
Every loss of every run is compared with the one-device run's. ``engines`` streams an 8B-shaped target through Mooncake with the engine on a device of its own
and with both on one. JSON lines; on a machine without GPUs all of it runs on gloo (``--small``).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.e2e.runs import STARTED, config, descendants, run, start, store_files, wait_for
from tests.tiny import WORDS, save_tokenizer
from torchspec.callbacks.clock import Clocked
from torchspec.files import dumps
from torchspec.paths import expand_all

STEPS = 200
CUDA = torch.cuda.is_available()


def say(**row: Any) -> None:
    print(dumps(row), flush=True)


# -- worlds


def save_target(folder: Path, *, hidden: int, layers: int, vocab: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """A random Qwen3 in bf16, made on the last device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    shape = Qwen3Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab, max_position_embeddings=8192,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(f"cuda:{torch.cuda.device_count() - 1}" if CUDA else "cpu"):
        model = Qwen3ForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")


def save_conversations(file: Path, *, tokens: int, median: float, seed: int = 0) -> None:
    """Random words with log-normal answer lengths, about so many tokens in all."""
    generator = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with file.open("w") as handle:
        while written < tokens:
            count = int(np.clip(generator.lognormal(np.log(median), 0.8), 8, 8 * median))
            words = [" ".join(WORDS[i] for i in generator.integers(0, len(WORDS), n)) for n in (12, count)]
            written += 12 + count
            rows = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), words, strict=True)]
            handle.write(json.dumps({"id": str(written), "conversations": rows}) + "\n")


def small_world(folder: Path, small: bool) -> dict[str, Path]:
    """Of the equality and life-cycle runs."""
    made = {"target": folder / "target", "train": folder / "train.jsonl"}
    if not made["train"].exists():
        sizes = {"hidden": 128, "vocab": 512, "intermediate": 256} if small else {"hidden": 512, "vocab": 8192, "intermediate": 1536}
        save_target(made["target"], layers=8, heads=2 if small else 8, kv_heads=1 if small else 4, head_dim=64, **sizes)
        save_conversations(made["train"], tokens=4000 if small else 60000, median=60)
    return made


# -- equality and life cycle


class Paths:
    """The runs of ``paths``; each has a folder of its own and the same configuration."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small = folder, small
        self.steps = 24 if small else STEPS
        self.world = small_world(folder / "world", small)
        self.losses: dict[str, dict[int, float]] = {}

    def config(self, name: str) -> Path:
        callbacks = [
            {"class_path": "torchspec.callbacks.provenance.Provenance"},
            {"class_path": "torchspec.callbacks.vocabulary.VocabularyPruning", "init_args": {"size": 256 if self.small else 4096}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"save_last": True, "save_on_exception": True, "every_n_train_steps": 4 if self.small else 10},
            },
        ]
        changes: dict[str, Any] = {
            "trainer__accelerator": "gpu" if CUDA else "cpu",
            "trainer__callbacks": callbacks,
            "trainer__max_epochs": 1000,
            "data__max_length": 256 if self.small else 512,
            "data__max_tokens": 256 if self.small else 1024,
            "model__unroll_steps": 3 if self.small else 7,
            "model__compute_dtype": "auto",
            "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4, "fused": True}},
        }
        return config(self.folder / name, self.world["target"], self.world["train"], None, **changes)

    def words(self, name: str, devices: int, strategy: str, steps: int) -> list[str]:
        """Of the command; the schedule is that of the whole run, wherever this one ends."""
        length = ["--trainer.max_steps", str(steps), "--model.lr_scheduler.total_steps", str(self.steps)]
        return ["fit", "--config", str(self.config(name)), "--trainer.devices", str(devices), "--trainer.strategy", strategy, *length]

    def fit(self, name: str, *, devices: int, strategy: str, steps: int, resume: bool = False) -> None:
        code, output = run(*self.words(name, devices, strategy, steps), *(["--ckpt_path", "last"] if resume else []), timeout=150)
        assert code == 0, output[-3000:]
        assert not resume or "Restored all states" in output, output[-3000:]
        self._note(name)

    def _note(self, name: str) -> None:
        """Take over what the run has logged; steps that were trained twice must have the same loss."""
        with (self.folder / name / "metrics" / "csv" / "metrics.csv").open() as handle:
            rows = [row for row in csv.DictReader(handle) if row.get("train/loss")]
        self.losses.setdefault(name, {}).update({int(row["step"]): float(row["train/loss"]) for row in rows})

    def difference(self, name: str) -> dict[str, Any]:
        """Relative differences of losses from the one-device run's, over the steps that both have."""
        ours, theirs = self.losses[name], self.losses["single"]
        shared = sorted(ours.keys() & theirs.keys())
        relative = np.array([ours[s] / theirs[s] - 1.0 for s in shared])
        last = slice(-20, None)
        return {
            "steps": len(shared), "first_loss": round(theirs[shared[0]], 4), "last_loss": round(theirs[shared[-1]], 4),
            "mean_difference": float(f"{relative.mean():.2e}"), "largest_difference": float(f"{np.abs(relative).max():.2e}"),
            "mean_of_last_20": float(f"{relative[last].mean():.2e}"),
        }  # fmt: skip

    def equal(self, name: str, devices: int, strategy: str) -> dict[str, Any]:
        started = time.monotonic()
        self.fit(name, devices=devices, strategy=strategy, steps=self.steps)
        return {"strategy": strategy, "devices": devices, "seconds": round(time.monotonic() - started, 1)}

    def resume(self) -> dict[str, Any]:
        """Two ranks, then one, then two."""
        third = self.steps // 3
        self.fit("resume", devices=2, strategy="fsdp2", steps=third)
        self.fit("resume", devices=1, strategy="fsdp2", steps=2 * third, resume=True)
        self.fit("resume", devices=2, strategy="fsdp2", steps=self.steps, resume=True)
        return {"ranks": [2, 1, 2], "steps_each": third}

    def end(self, name: str, strategy: str, how: Callable[[psutil.Process], None]) -> dict[str, Any]:
        """Start two ranks, end them, look for what is left, resume."""
        folder = self.folder / name
        process = start(*self.words(name, 2, strategy, 100 * self.steps))
        log = folder / "metrics" / "csv" / "metrics.csv"
        saved = folder / "checkpoints" / "last.ckpt"
        wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 3 and saved.exists(), timeout=120, what="a checkpoint", process=process)
        below = descendants(process.pid)
        began = time.monotonic()
        how(psutil.Process(process.pid))
        output, _ = process.communicate(timeout=90)
        seconds = time.monotonic() - began
        _, left = psutil.wait_procs(below, timeout=20)
        self._note(name)
        ended = max(self.losses[name])
        found = {"exit_code": process.returncode, "seconds": round(seconds, 1), "left_running": [p.name() for p in left], "store_files": store_files(folder)}
        self.fit(name, devices=2, strategy=strategy, steps=ended + 10, resume=True)
        return {**found, "strategy": strategy, "ended_at_step": ended, "resumed_to_step": max(self.losses[name]), "said": output.strip().splitlines()[-1:]}

    def all(self, jobs: int, only: list[str]) -> None:
        """Several runs at once: nothing here is timed. ``only`` names some of them; none are all."""
        chains: dict[str, Callable[[], dict[str, Any]]] = {
            "single": lambda: self.equal("single", 1, "auto"),
            "fsdp2": lambda: self.equal("fsdp2", 2, "fsdp2"),
            "ddp": lambda: self.equal("ddp", 2, "ddp"),
            "resume": self.resume,
            "sigterm": lambda: self.end("sigterm", "fsdp2", lambda p: p.send_signal(signal.SIGTERM)),
            "sigterm of rank 1": lambda: self.end("sigterm of rank 1", "fsdp2", lambda p: rank_one(p).send_signal(signal.SIGTERM)),
            "kill -9 of rank 1": lambda: self.end("kill -9 of rank 1", "fsdp2", lambda p: rank_one(p).kill()),
            "kill -9 of rank 0": lambda: self.end("kill -9 of rank 0", "ddp", lambda p: p.kill()),
        }
        chains = {name: chains[name] for name in only or chains}

        def one(name: str) -> None:
            say(part="paths", run=name, **_guarded(chains[name]))

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, chains))
        for name in chains:
            if name in self.losses and "single" in self.losses:
                say(part="losses", run=name, **self.difference(name))


def rank_one(process: psutil.Process) -> psutil.Process:
    (found,) = [p for p in process.children(recursive=True) if "main.py" in " ".join(p.cmdline()) and p.environ().get("LOCAL_RANK") == "1"]
    return found


def _guarded(chain: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return chain()
    except BaseException as error:  # the other chains' results are still worth having
        return {"error": f"{type(error).__name__}: {str(error)[-1500:]}", "at": traceback.format_exc().splitlines()[-3:-1]}


# -- engines


class StepClock(Clocked):
    """Writes seconds, tokens, and the device's waiting for data after ``skip`` optimizer steps to ``clock.json`` (``torchspec/callbacks/clock.py``)."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        times = self.clock.settle(wait=True)
        seconds = times.busy_s + times.between_s
        found = {"seconds": round(seconds, 2), "tokens_per_s": round(times.tokens / seconds), "wait_fraction": round(times.starved_s / seconds, 4)}
        found |= {"trainer_tokens_per_s": round(times.tokens / times.busy_s)}
        (Path(trainer.default_root_dir) / "clock.json").write_text(dumps(found))


def engines(folder: Path, target: Path, *, small: bool, steps: int, skip: int, store: str) -> None:
    """The same run with the engine on a device of its own and on the trainer's."""
    train = folder / "train.jsonl"
    save_conversations(train, tokens=20000 if small else 500000, median=80 if small else 350)
    for name, engine_device in (("engine on its own GPU", "1"), ("both on one GPU", "0")):
        at = folder / name.replace(" ", "-")
        callbacks = [
            {"class_path": "torchspec.callbacks.vocabulary.VocabularyPruning", "init_args": {"size": 256 if small else 32000}},
            {"class_path": "torchspec.callbacks.pipeline.PipelineMetrics"},
            {"class_path": "benchmarks.two_gpus.StepClock", "init_args": {"skip": skip}},
        ]
        changes: dict[str, Any] = {
            "trainer__accelerator": "gpu" if CUDA else "cpu",
            "trainer__devices": [0] if CUDA else 1,
            "trainer__callbacks": callbacks,
            "trainer__max_steps": steps,
            "trainer__max_epochs": 100,
            "data__max_length": 256 if small else 4096,
            "data__max_tokens": 512 if small else 8192,
            "data__cache_dir": str(folder / "cache"),
            "data__packs_per_step": 2,
            "data__engines": {"devices": [engine_device if CUDA else "cpu"], "batch_tokens": 1024 if small else 8192, "batch_samples": 256},
            "data__store": {"kind": store, "budget": "32MiB" if small else "2GiB"},
            "model__unroll_steps": 3 if small else 7,
            "model__compute_dtype": "auto",
            "model__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "fused": True}},
        }
        code, output = run("fit", "--config", str(config(at, target, train, None, **changes)), timeout=150)
        if code:
            say(part="engines", run=name, error=output[-2500:])
            continue
        measured = json.loads((at / "clock.json").read_text())
        pipeline = json.loads((at / "pipeline.json").read_text())
        kept = ("engine_capacity_tokens_per_s", "engine_write_fraction", "engine_idle_for_credit_s", "bottleneck", "store", "engine", "bytes_in_flight")
        say(part="engines", run=name, steps=steps - skip, **measured, **{key: pipeline.get(key) for key in kept})


def end_everything(number: int, frame: Any) -> None:
    """At a time limit: no run goes on beside the next part."""
    for process in STARTED:
        for one in descendants(process.pid):
            try:
                one.kill()
            except psutil.Error:
                continue
        process.kill()
    os._exit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, end_everything)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("part", choices=("target", "paths", "engines"))
    parser.add_argument("folder", type=Path, help="of what is written")
    parser.add_argument("--target", type=Path, help="of engines, as written by part target")
    parser.add_argument("--layers", type=int, default=36, help="blocks of that target; Qwen3-8B has 36")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of engines, of 2 packs of 8192 tokens")
    parser.add_argument("--skip", type=int, default=10, help="steps of them before the clock counts")
    parser.add_argument("--store", choices=("mooncake", "shm"), default="mooncake")
    parser.add_argument("--jobs", type=int, default=4, help="runs of paths at once")
    parser.add_argument("--runs", nargs="+", default=[], help="of paths: these alone, by name; compared with the run single where it is among them")
    parser.add_argument("--small", action="store_true", help="sizes for two CPU processes")
    args = expand_all(parser.parse_args())
    if args.steps <= args.skip:
        parser.error(f"--steps {args.steps} leaves none to measure after --skip {args.skip}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    own = args.folder / ".two_gpus"
    if args.folder.is_dir() and any(args.folder.iterdir()) and not own.is_file():
        parser.error(f"{args.folder} holds what this program did not write: give a new or empty folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    own.touch()
    if args.part == "target":
        sizes = {"hidden": 128, "vocab": 512, "intermediate": 256, "heads": 2, "kv_heads": 1, "head_dim": 64}
        full = {"hidden": 4096, "vocab": 151936, "intermediate": 12288, "heads": 32, "kv_heads": 8, "head_dim": 128}
        started = time.monotonic()
        save_target(args.folder, layers=8 if args.small else args.layers, **(sizes if args.small else full))
        say(part="target", layers=args.layers, seconds=round(time.monotonic() - started, 1))
    elif args.part == "paths":
        Paths(args.folder, args.small).all(args.jobs, args.runs)
    else:
        engines(args.folder, args.target, small=args.small, steps=args.steps, skip=args.skip, store=args.store)


if __name__ == "__main__":
    main()
