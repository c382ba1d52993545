"""Whose draft do servers accept more of? Drafts of ours and of a peer in real vLLM on the same prompts, answer by answer.

    python benchmarks/final_call.py --target T --prompts report=P.jsonl own=Q.jsonl --ours A B --peer C D --output OUT.jsonl \\
        --k 3 7 --temperature 0 1 --jobs 4 --engine_args '{"kv_cache_memory_bytes": 4294967296, "gpu_memory_utilization": 0.08}'

Each draft is served by a process of its own for each k, which answers all prompts at each temperature; drafts and accepted
tokens of each answer are vLLM's own counts, and their sums are compared with its counters. Several drafts of a side (seeds)
count together, prompt by prompt. Prints, for every set, k and temperature, each side's acceptance length and the ratio of
ours to the peer's with a 95 % interval by bootstrap over prompts, with and without prompts that any draft's answer loops
on, and by the rows' ``source``. ``--read OUT.jsonl`` prints the table of an earlier run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.walks import interval, loops
from torchspec.files import lines_with, refuse_foreign, write
from torchspec.paths import expand_all

ROOT = Path(__file__).resolve().parents[1]
_KEYS = ("side", "draft", "k", "temperature", "drafts", "accepted")


@dataclass(frozen=True)
class Served:
    """One draft on one set at one k and temperature; a list entry is a prompt, in the file's order."""

    side: str
    """``ours`` or ``peer``."""
    draft: str
    set: str
    k: int
    temperature: float
    drafts: list[int]
    """Times that the draft proposed."""
    accepted: list[int]
    """Draft tokens accepted."""
    looping: list[bool]
    """Whether the answer repeats itself."""
    source: list[str]
    """What kind of prompt it is."""
    tokens_per_s: float


def length(drafts: np.ndarray, accepted: np.ndarray) -> float:
    """Acceptance length, the bonus token included."""
    return float(1.0 + accepted.sum() / max(drafts.sum(), 1))


def together(rows: list[Served]) -> tuple[np.ndarray, np.ndarray]:
    """Drafts and accepted tokens of several drafts of a side, prompt by prompt."""
    return np.sum([row.drafts for row in rows], axis=0), np.sum([row.accepted for row in rows], axis=0)


def compare(ours: list[Served], peer: list[Served], keep: np.ndarray) -> str:
    """Lengths of both sides and the ratio of ours to the peer's, over the prompts of ``keep`` [n]."""
    mine, theirs = (tuple(part[keep] for part in together(rows)) for rows in (ours, peer))
    low, high = interval(mine[0], mine[1], over=(theirs[0], theirs[1]))
    return f"{length(*mine):.3f} {length(*theirs):.3f} {length(*mine) / length(*theirs):.3f} [{low:.3f} {high:.3f}]"


def table(rows: list[Served]) -> str:
    """What :func:`main` prints."""
    lines = []
    for name, k, temperature in dict.fromkeys((row.set, row.k, row.temperature) for row in rows):
        here = [row for row in rows if (row.set, row.k, row.temperature) == (name, k, temperature)]
        ours, peer = ([row for row in here if row.side == side] for side in ("ours", "peer"))
        if not ours or not peer:
            continue
        looping = np.any([row.looping for row in here], axis=0)
        share = float(np.mean([row.looping for row in here]))
        every, sources = np.ones(looping.size, dtype=bool), np.array(here[0].source)
        lines.append(f"{name}, k={k}, T={temperature:g}: {looping.size} prompts, {share:.0%} of the answers loop; ours, peer, ratio [95 %]")
        lines.append(f"  {'all':<24} {compare(ours, peer, every)}")
        if looping.any() and not looping.all():
            lines.append(f"  {'without loops':<24} {compare(ours, peer, ~looping)} ({(~looping).sum()} prompts)")
        if len(set(sources)) > 1:
            lines += [f"  {source:<24} {compare(ours, peer, sources == source)} ({(sources == source).sum()} prompts)" for source in dict.fromkeys(sources)]
        for side, group in (("ours", ours), ("peer", peer)):
            each = " ".join(f"{length(np.array(row.drafts), np.array(row.accepted)):.3f}" for row in group)
            lines.append(f"  {side:<24} {each} each; {np.mean([row.tokens_per_s for row in group]):.0f} tokens/s")
    return "\n".join(lines)


def requests_of(target: str, file: str, limit: int | None) -> tuple[list[list[int]], list[str]]:
    """Token ids of each request of a conversation file, as ``main.py acceptance`` asks them, and the ``source`` of its row."""
    from torchspec.data.conversations import parse
    from torchspec.data.render import Renderer
    from torchspec.target import Target, TargetConfig

    facts = Target(TargetConfig(target))
    renderer, found, sources = Renderer(facts.tokenizer(), name=target, variables=None), [], []
    for line in Path(file).read_bytes().splitlines():
        if not line.strip():
            continue
        row = parse(line, messages_key=None, need_answer=False)
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        for i in answers or [len(row.messages)]:
            found.append(list(renderer.prompt(row, i)))
            sources.append(str(json.loads(line).get("source", "")))
    return found[:limit], sources[:limit]


def count_by_request(llm: Any) -> dict[str, list[int]]:
    """From now on vLLM's scheduler also counts [drafts, accepted tokens] by request; of vLLM's engine in this process."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    found: dict[str, list[int]] = {}
    own = scheduler.make_spec_decoding_stats

    def counting(*given: Any, **named: Any) -> Any:
        if named.get("num_draft_tokens") and "request_id" in named:
            entry = found.setdefault(named["request_id"], [0, 0])
            entry[0] += 1
            entry[1] += named["num_accepted_tokens"]
        return own(*given, **named)

    scheduler.make_spec_decoding_stats = counting
    return found


def of_answers(counted: dict[str, list[int]], ids: list[str]) -> list[list[int]]:
    """[drafts, accepted] of each answer by its id; inside, vLLM's ids carry eight more characters behind a dash."""
    outside = {name if name in ids else name.rsplit("-", 1)[0]: counts for name, counts in counted.items()}
    return [outside.get(name, [0, 0]) for name in ids]


def serve(job: dict[str, Any]) -> None:
    """Serve one draft at one k and write a line a set and temperature; the process ends here."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    import torch
    import vllm

    from torchspec.acceptance_child import _counts, _difference
    from torchspec.hardware import working_dtype
    from torchspec.target import Target, TargetConfig

    facts, cuda = Target(TargetConfig(job["target"])), torch.cuda.is_available()
    asked = {name: requests_of(job["target"], file, job["limit"]) for name, file in job["sets"].items()}
    longest = max(len(ids) for requests, _ in asked.values() for ids in requests) + job["max_new_tokens"] + job["k"] + 1
    arguments: dict[str, Any] = {"max_model_len": longest, "skip_tokenizer_init": True, "seed": 0, "disable_log_stats": False}
    arguments["dtype"] = str(facts.dtype if cuda else working_dtype(facts.dtype, "cpu")).removeprefix("torch.")
    if not cuda:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        arguments |= {"enforce_eager": True, "max_num_seqs": 64}
    speculative = {"method": "eagle3", "model": job["draft"], "num_speculative_tokens": job["k"]}
    llm = vllm.LLM(model=job["target"], speculative_config=speculative, **arguments | job["engine_args"])
    counted = count_by_request(llm)
    llm.generate([{"prompt_token_ids": requests[0]} for requests, _ in asked.values()], vllm.SamplingParams(max_tokens=8, detokenize=False), use_tqdm=False)
    for name, (requests, sources) in asked.items():
        for temperature in job["temperatures"]:
            sampling = vllm.SamplingParams(
                temperature=temperature, max_tokens=job["max_new_tokens"], seed=0 if temperature > 0 else None, stop_token_ids=facts.end_ids(), detokenize=False
            )
            llm.reset_prefix_cache()
            counted.clear()
            before, began = _counts(llm), time.perf_counter()
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in requests], sampling, use_tqdm=False)
            seconds, after = time.perf_counter() - began, _counts(llm)
            each = of_answers(counted, [output.request_id for output in outputs])
            sums = [int(_difference(after[key], before[key])) for key in ("drafts", "accepted_tokens")]
            if (found := [sum(pair[i] for pair in each) for i in (0, 1)]) != sums:
                raise SystemExit(f"error: vLLM {vllm.__version__} counts {sums} drafts and accepted tokens, its requests {found}")
            answers = [np.array(output.outputs[0].token_ids) for output in outputs]
            row = Served(
                job["side"], job["draft"], name, job["k"], temperature, [pair[0] for pair in each], [pair[1] for pair in each],
                [bool(loops([answer])) for answer in answers], sources, sum(map(len, answers)) / seconds,
            )  # fmt: skip
            with Path(job["out"]).open("a") as handle:
                handle.write(json.dumps(asdict(row)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's own shutdown takes seconds


def start(job: dict[str, Any], folder: Path) -> list[Served]:
    """A process of :func:`serve`; its log stays in the folder."""
    name = f"{job['side']}-{job['number']}-k{job['k']}"
    job = job | {"out": str(folder / f"{name}.jsonl")}
    Path(job["out"]).unlink(missing_ok=True)
    log = folder / f"{name}.log"
    with log.open("w") as handle:
        code = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], stdout=handle, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
    rows = [Served(**json.loads(line)) for line in Path(job["out"]).read_text().splitlines()] if Path(job["out"]).is_file() else []
    if code:
        print(json.dumps({"failed": name, "exit_code": code, "log": str(log), "last": log.read_text(errors="replace").strip().splitlines()[-2:]}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--prompts", nargs="+", default=[], help="NAME=FILE of conversations; every answer is asked anew")
    parser.add_argument("--ours", nargs="+", default=[], help="exported drafts")
    parser.add_argument("--peer", nargs="+", default=[], help="exported drafts")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, help="prompts of each file")
    parser.add_argument("--jobs", type=int, default=1, help="vLLM processes side by side")
    parser.add_argument("--engine_args", type=json.loads, default={}, help="further engine arguments, JSON")
    parser.add_argument("--output", help="JSON lines; the logs lie in a folder beside it")
    parser.add_argument("--read", nargs="+", help="JSON lines of earlier runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = expand_all(parser.parse_args())
    if given.child:
        serve(json.loads(given.child))
    if given.read:
        print(table([Served(**json.loads(line)) for file in given.read for line in Path(file).read_text().splitlines()]))
        return
    if not (given.target and given.prompts and given.ours and given.peer and given.output):
        parser.error("give --target, --prompts, --ours, --peer and --output, or --read")
    output = Path(given.output)
    refuse_foreign(output, lines_with(*_KEYS), field="output", what="list of served drafts")
    folder = output.with_suffix(".logs")
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "target": given.target, "sets": dict(pair.split("=", 1) for pair in given.prompts), "limit": given.limit, "temperatures": given.temperature,
        "max_new_tokens": given.max_new_tokens, "engine_args": given.engine_args,
    }  # fmt: skip
    sides = [(side, number, draft) for side in ("ours", "peer") for number, draft in enumerate(getattr(given, side))]
    jobs = [common | {"side": side, "number": number, "draft": draft, "k": k} for k in given.k for side, number, draft in sides]
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = [row for found in pool.map(lambda job: start(job, folder), jobs) for row in found]
    write(output, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    print(table(rows), flush=True)
    raise SystemExit(0 if len(rows) == len(jobs) * len(common["sets"]) * len(given.temperature) else 1)


if __name__ == "__main__":
    main()
