"""Do our Triton kernels stay inside their memory? Steps and single kernels under ``compute-sanitizer``, which checks
every access of theirs alone.

    python benchmarks/sanitize.py                 # four minutes on an H200; --tool racecheck looks for other faults
    python benchmarks/sanitize.py --inside        # the same work without it; on a CPU in Triton's interpreter

First a training step at the sizes of ``configs/smollm2_h100.yaml`` and ``quickstart.yaml`` in bf16 and in 8 bits, then
random small steps and kernels whose sizes lie at and beside powers of two, until the time is up. Each tensor is an
allocation of its own (``PYTORCH_NO_CUDA_MEMORY_CACHING=1``), so that the byte behind it belongs to nobody; results are
compared with torch's as in ``tests/models/kernel_grid.py``. Prints one JSON line; exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_WRONG = 13
"""Exit code by which the sanitizer says that it found something."""
_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def kernel_names() -> list[str]:
    """Every Triton kernel of the package, read from its sources: what the sanitizer looks at."""
    found = set()
    for file in sorted((ROOT / "torchspec").rglob("kernels/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                found.add(node.name)
    return sorted(found)


def command(sanitizer: str, tool: str, help_text: str, inside: list[str]) -> list[str]:
    """The sanitizer around this script's own work."""
    option = "--kernel-name" if "--kernel-name" in help_text else "--kernel-regex"  # its name before CUDA 12
    chosen = [option, ",".join(f"kne={name}" for name in kernel_names())]
    told = ["--error-exitcode", str(_WRONG), "--print-limit", "20", "--target-processes", "application-only", "--launch-timeout", "0"]
    return [sanitizer, "--tool", tool, *chosen, *told, sys.executable, str(Path(__file__).resolve()), "--inside", *inside]


def near(rng: random.Random, most: int, *, low: int = 1) -> int:
    """A size at or beside a power of two, or a plain one."""
    if rng.random() < 0.2:
        return rng.randint(low, most)
    return min(most, max(low, 2 ** rng.randint(0, most.bit_length() - 1) + rng.choice((-1, 0, 1))))


def kernels(rng: random.Random) -> dict[str, Callable[[], None]]:
    """One random case of every check of ``tests/models/kernel_cases.py``, by the words that describe it."""
    import torch

    from tests.models import kernel_cases as cases
    from tests.models import kernel_cases_blocks as blocks
    from tests.models import kernel_cases_fp8 as narrow

    real = cases.DEVICE.type == "cuda"
    dtype = rng.choice((torch.float32, torch.bfloat16)) if real else torch.float32
    rows = near(rng, 2049 if real else 9, low=4)
    width = rng.choice((63, 64, 65, 127, 576, 1000, 1024, 1025, 4096, 4097) if real else (5, 8, 24))
    vocabulary = rng.choice((1023, 8191, 8192, 8193, 16384, 16400, 32000) if real else (29, 32))
    heads, groups = rng.choice(((9, 3), (8, 8), (4, 1), (32, 8)) if real else ((3, 1), (4, 2)))
    size = rng.choice((64, 80, 96, 128) if real else (8, 10))
    few = min(rows, 65)
    weights = {name: rng.random() + 0.1 for name in rng.sample(["forward_kl", "cross_entropy", "reverse_kl", "jsd", "tv", "lk_lambda"], 2)}
    flags = [rng.random() < 0.5 for _ in range(3)]
    slots, window = rng.choice((4, 7, 8, 16)), rng.choice((None, 5, 33))
    length = near(rng, 513 if real else 17, low=9)
    drawn = blocks.drawn([length, 9, length], [rng.randint(0, length // 2), 0, 1], slots, seed=rng.randint(0, 99))
    found: dict[str, Callable[[], None]] = {
        f"norm {rows}x{width}": lambda: cases.norm(rows, width, dtype, placed=flags[0]),
        f"advance {rows}x{width}": lambda: cases.advance(rows, rows - rows // 3, width, dtype, normed_residual=flags[0], every=flags[1], state=flags[2]),
        f"swiglu {rows}x{width}": lambda: cases.swiglu(rows, width, dtype),
        f"rows {rows}x{width}": lambda: cases.rows(rows, rows + 3, width, dtype),
        f"gather {rows}x{groups}x{size}": lambda: cases.gather(rows, groups, size, dtype),
        f"heads {rows}x{heads}x{groups}x{size}": lambda: cases.heads(rows, heads, groups, size, dtype),
        f"merge {rows}x{heads}x{groups}x{size}": lambda: cases.merge(rows, heads, groups, size, 3, rng.randint(0, 3), dtype),
        f"target {few}x{vocabulary}": lambda: cases.target(few, vocabulary, vocabulary - vocabulary // 3, dtype),
        f"block attention {length}x{heads}x{groups}x{size}, {slots} slots, window {window}": lambda: blocks.attention(
            drawn, 2 * length + 9, heads, groups, size, torch.bfloat16 if real else torch.float32, causal=flags[0], window=window, strided=flags[1]
        ),
        f"losses {few}x{vocabulary}": lambda: cases.losses(few, vocabulary, weights, dtype, pruned=flags[0], measure=flags[1]),
    }
    if not real or torch.cuda.get_device_capability() >= (9, 0):
        found |= {
            f"quantise {rows}x{width}": lambda: narrow.quantise(rows, width, dtype, factor=flags[0]),
            f"turn {rows}x{width}": lambda: narrow.turn(rows, width, dtype),
            f"round_both {rows}x{width}": lambda: narrow.round_both(rows, width, dtype),
            f"transpose {rows}x{width}": lambda: narrow.transpose(rows, width),
            f"norm_rounded {rows}x{width}": lambda: narrow.norm_rounded(rows, width, dtype, placed=flags[0]),
            f"swiglu_rounded {rows}x{width}": lambda: narrow.swiglu_rounded(rows, width, dtype),
        }
    return found


def step(
    lengths: list[int], *, vocab: int, draft_vocab: int, hidden: int, heads: tuple[int, int, int], steps: int, level: str = "none", **options: Any
) -> None:
    """Forward and backward of a random draft over random conversations; all gradients are numbers.

    Args:
        lengths: T of each conversation; its last three quarters or more are an answer.
        vocab: V.
        draft_vocab: W.
        hidden: H and D.
        heads: query heads, key heads, size of a head.
        steps: K.
        level: of 8 bits.
        options: of the draft.
    """
    import torch

    from tests.models.kernel_cases import DEVICE
    from tests.models.packs import conversation, draft_config, pack, task
    from torchspec.models.ops.fp8 import Fp8

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    sizes = {"hidden_size": hidden, "target_hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 16 * 16}
    sizes |= {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": heads[2], "vocab_size": vocab, "draft_vocab_size": draft_vocab}
    config = draft_config(**sizes, max_position_embeddings=max(lengths) + 16, initializer_range=0.02, **options)
    ids = None if draft_vocab == vocab else list(range(0, draft_vocab))
    made = task(config, draft_ids=ids, step_weights=[1.0] * steps, dtype=dtype)
    made.head.to(dtype)
    made.draft.fp8 = Fp8[level.upper()]
    made.to(DEVICE)
    conversations = [conversation(config, [int(i >= (number % 3) * n // 8) for i in range(n)], number) for number, n in enumerate(lengths)]
    out = made(pack(config, conversations, steps, dtype=dtype).to(DEVICE), measure=True)
    out.loss.backward()
    wrong = [name for name, p in made.draft.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert not wrong and torch.isfinite(out.loss), wrong


NORMS: dict[str, Any] = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}


def recipes(real: bool) -> dict[str, Callable[[], None]]:
    """A step of the recipes, at their sizes where there is a GPU."""
    small: dict[str, Any] = {"vocab": 49152, "draft_vocab": 16384, "hidden": 576, "heads": (9, 3, 64), "steps": 4}
    lengths, short = [2048, 1023, 1025, 513, 64, 1, 3000, 518], [255, 257]
    if not real:
        small, lengths, short = {"vocab": 69, "draft_vocab": 32, "hidden": 32, "heads": (4, 2, 8), "steps": 3}, [5, 9, 1], [6]
    found: dict[str, Callable[[], None]] = {
        "smollm2_h100": lambda: step(lengths, **small, **NORMS),
        "quickstart": lambda: step(short, **small | ({"draft_vocab": 8192} if real else {}), norm_before_residual=True, fc_norm=True, norm_output=True),
        "whole vocabulary, two layers": lambda: step(short, **small | {"draft_vocab": small["vocab"]}, num_layers=2),
    }
    if real:
        found |= {f"smollm2_h100 in 8 bits ({level})": lambda level=level: step(lengths, **small, **NORMS, level=level) for level in ("rows", "all")}  # type: ignore[misc]
    return found


def inside(seconds: float, seed: int) -> int:
    """The work itself; returns the exit code."""
    import torch

    from tests.models.kernel_cases import DEVICE

    real, began, done, failed = DEVICE.type == "cuda", time.monotonic(), Counter[str](), []
    rng = random.Random(seed)

    def attempt(name: str, case: Callable[[], None]) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
        try:
            case()
            if real:
                torch.cuda.synchronize()
        except AssertionError as wrong:
            failed.append(f"{name}: {str(wrong)[:200]}")
        done[name.split()[0]] += 1

    for name, case in recipes(real).items():
        attempt(name, case)
    while time.monotonic() - began < seconds:
        sizes = [near(rng, 700 if real else 9) for _ in range(rng.randint(1, 6))]
        heads = rng.choice(((4, 2, 64), (8, 1, 128), (3, 3, 96)) if real else ((4, 2, 8),))
        options = rng.choice(({}, NORMS, {"fc_norm": True, "norm_output": True}, {"num_layers": 2}, {"attention_bias": True}))
        hidden = heads[0] * heads[2] if real else 32
        vocab = rng.choice((1023, 2048, 5000) if real else (40,))
        narrow = vocab if rng.random() < 0.5 else vocab // 2 + rng.choice((-1, 0, 1))
        attempt(
            f"step {sizes} {heads} {narrow}/{vocab}",
            lambda: step(sizes, vocab=vocab, draft_vocab=narrow, hidden=hidden, heads=heads, steps=rng.randint(1, 7), **options),  # noqa: B023 - called at once
        )
        for name, case in kernels(rng).items():
            if time.monotonic() - began < seconds:
                attempt(name, case)
    report = {"cases": sum(done.values()), "of": dict(done), "wrong": failed, "seconds": round(time.monotonic() - began, 1), "seed": seed}
    print(json.dumps(report | {"device": torch.cuda.get_device_name() if real else "cpu, interpreted"}), flush=True)
    return 1 if failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=170.0, help="after which no further random case begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tool", default="memcheck", choices=["memcheck", "racecheck", "initcheck", "synccheck"])
    parser.add_argument("--sanitizer", help="compute-sanitizer itself; by default the one on PATH or of /usr/local/cuda")
    parser.add_argument("--inside", action="store_true", help="do the work, without the sanitizer")
    given = parser.parse_args()
    if given.inside:
        raise SystemExit(inside(given.seconds, given.seed))
    sanitizer = given.sanitizer or shutil.which("compute-sanitizer") or next((place for place in _PLACES if Path(place).is_file()), None)
    if sanitizer is None:
        parser.error("no compute-sanitizer here: it comes with the CUDA toolkit; give its place with --sanitizer")
    told = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False)
    words = command(sanitizer, given.tool, told.stdout + told.stderr, ["--seconds", str(given.seconds), "--seed", str(given.seed)])
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False)
    said = {0: "nothing found", _WRONG: "the sanitizer found errors: above"}.get(done.returncode, f"ended with {done.returncode}: above")
    print(json.dumps({"tool": given.tool, "kernels": len(kernel_names()), "exit_code": done.returncode, "result": said}), flush=True)
    raise SystemExit(1 if done.returncode else 0)


if __name__ == "__main__":
    main()
