"""PackBounds that a target never repeats, for trainings that see every token once: several sampled answers to each given prompt, and answers to prompts
that the target writes itself (Xu et al. 2024, arXiv 2406.08464: an instruction-tuned model left behind the opening of a user's turn writes one).

Prompts are first user turns of a conversation file. Rows are written as ids with their loss mask, so that what was generated is what is trained. vLLM runs
without a seed a request, which would cost it a random generator a row; processes side by side take different ``--seed``.

    python benchmarks/distinct_data.py --target T --prompts A.jsonl --answers 6 --own 18000 --temperature 0.7 --seed 0 --part 1/6 --output OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.paths import expand_all

_MARK = "\u2402"


def first_prompts(file: str) -> list[str]:
    """First user turn of each row; a row may be a conversation or hold a bare ``prompt``."""
    found = []
    for line in Path(file).read_text().splitlines():
        row = json.loads(line)
        turns = row.get("messages") or row.get("conversations") or [{"role": "user", "content": row.get("prompt")}]
        found.append(next(turn["content"] for turn in turns if turn["role"] == "user"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("target", "prompts", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--answers", type=int, default=1, help="of each given prompt")
    parser.add_argument("--own", type=int, default=0, help="prompts that the target writes, over all parts")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="which share of the work this process does")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop answering after this long")
    parser.add_argument("--engine_args", type=json.loads, default={}, help="of vLLM, as JSON")
    given = expand_all(parser.parse_args())
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from torchspec.target import Target, TargetConfig

    part, parts = (int(word) for word in given.part.split("/"))
    facts = Target(TargetConfig(given.target))
    tokenizer, ends = facts.tokenizer(), set(facts.end_ids())
    engine: Any = LLMEngine.from_engine_args(EngineArgs(model=given.target, seed=given.seed + part, **given.engine_args))

    def ids_of(content: str) -> list[int]:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def sample(prompts: list[list[int]], *, temperature: float, length: int, until: float = math.inf) -> Iterator[tuple[list[int], list[int]]]:
        """Pairs of prompt and answer as they finish, until a time of the monotonic clock."""
        how = SamplingParams(temperature=temperature, max_tokens=length, stop_token_ids=sorted(ends), detokenize=False)
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, how)
        while engine.has_unfinished_requests() and time.monotonic() < until:
            for output in engine.step():
                if output.finished:
                    yield prompts[int(output.request_id)], list(output.outputs[0].token_ids)

    prompts = [ids_of(text) for text in first_prompts(given.prompts)[part - 1 :: parts]]
    asked = [prompt for prompt in prompts for _ in range(given.answers)]
    if given.own:
        opening = str(tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)).split(_MARK)[0]
        start = list(tokenizer.encode(opening, add_special_tokens=False))
        share = len(range(part - 1, given.own, parts))
        written = [ids for _, ids in sample([start] * share, temperature=1.0, length=200)]
        texts = {str(tokenizer.decode(ids[:-1])).strip() for ids in written if ids and ids[-1] in ends}
        asked += [ids_of(text) for text in sorted(texts) if len(text) > 8]
    random.Random(given.seed).shuffle(asked)
    rows = tokens = 0
    began = time.monotonic()
    with Path(given.output).open("w") as file:
        for prompt, answer in sample(asked, temperature=given.temperature, length=given.max_new_tokens, until=began + given.seconds):
            rows, tokens = rows + 1, tokens + len(prompt) + len(answer)
            mask = [0] * len(prompt) + [1] * len(answer)
            file.write(json.dumps({"input_ids": prompt + answer, "loss_mask": mask}, separators=(",", ":")) + "\n")
    seconds = time.monotonic() - began
    print(
        json.dumps({"conversations": rows, "of": len(asked), "given": len(prompts) * given.answers, "tokens": tokens, "seconds": round(seconds, 1)}), flush=True
    )


if __name__ == "__main__":
    main()
