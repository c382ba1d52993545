"""Tokenise and plan N generated short conversations; memory should not depend on N beyond a few dozen bytes a row.

    python benchmarks/data_scale.py --rows 1000000

One JSON line: ``rows``, ``seconds`` (tokenising and planning; writing the input is not in it), ``peak_rss_mib`` (resident memory of this process at its
highest) and ``peak_worker_mib`` (of the largest tokenising process), and the parts. ``--target`` takes a real target's tokenizer in place of a small one made
here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYLLABLES = "ba be bi bo bu da de di do du ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru sa se si so su ta te ti to tu".split()


def words(generator: np.random.Generator, count: int) -> list[str]:
    """Words of one to four syllables."""
    lengths = generator.integers(1, 5, size=count)
    picks = generator.integers(0, len(SYLLABLES), size=(count, 4))
    return ["".join(SYLLABLES[i] for i in row[:n]) for row, n in zip(picks, lengths, strict=True)]


def write_rows(file: Path, rows: int, *, seed: int = 0) -> None:
    """PackBounds of one question and one answer, about 60 words."""
    generator = np.random.default_rng(seed)
    vocabulary = np.array(words(generator, 4096))
    with file.open("w") as handle:
        for first in range(0, rows, 1000):
            for i in range(first, min(first + 1000, rows)):
                asked, answered = generator.integers(4, 24), generator.integers(10, 80)
                text = vocabulary[generator.integers(0, vocabulary.size, size=asked + answered)]
                messages = [{"role": "user", "content": " ".join(text[:asked])}, {"role": "assistant", "content": " ".join(text[asked:])}]
                handle.write(json.dumps({"id": i, "conversations": messages}) + "\n")


def small_tokenizer(folder: Path) -> Any:
    """Byte-level BPE of 4,096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" ".join(words(np.random.default_rng(0), 4096))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--target", help="directory of a real target, for its tokenizer and template")
    parser.add_argument("--num_proc", type=int, help="tokenising processes; the cores there are by default")
    parser.add_argument("--max_tokens", type=int, default=4096)
    from torchspec.paths import expand_all

    args = expand_all(parser.parse_args())

    from torchspec.data.plan import Plan
    from torchspec.data.prepare import DataOptions, prepare
    from torchspec.supervision import Unroll
    from torchspec.target import Target, TargetConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", args.rows)
        tokenizer: Any = Target(TargetConfig(args.target)).tokenizer() if args.target else small_tokenizer(folder / "tokenizer")
        imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.monotonic()
        data = prepare(
            str(folder / "rows.jsonl"),
            options=DataOptions(max_length=1024),
            tokenizer=tokenizer,
            vocab_size=len(tokenizer),
            cache_dir=folder / "cache",
            target_name=args.target or "small",
            num_proc=args.num_proc,
        )
        tokenised = time.monotonic()
        plan = Plan(
            data.lengths,
            seed=0,
            epoch=0,
            max_tokens=args.max_tokens,
            packs_per_step=8,
            counts=data.measured(Unroll(7))[0],
            content=data.content,
        )
        planned = time.monotonic()
        line = {
            "rows": args.rows,
            "seconds": round(planned - started, 2),
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "peak_worker_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
            "imports_mib": round(imported, 1),
            "tokenise_s": round(tokenised - started, 2),
            "plan_s": round(planned - tokenised, 2),
            "tokens": data.summary.tokens,
            "packs": len(plan),
            "padding": round(plan.padding, 4),
            "input_mib": round((folder / "rows.jsonl").stat().st_size / 2**20, 1),
            "cores": len(os.sched_getaffinity(0)),
        }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
