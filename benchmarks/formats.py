"""The same trained draft in every format, served in vLLM: does each give the acceptance of the others, and more than an untrained draft?

    python main.py fit --config configs/quickstart.yaml --trainer.default_root_dir outputs/pruned --data.target.path TARGET
    python benchmarks/formats.py --target TARGET --output outputs/formats pruned=outputs/pruned/checkpoints/last.ckpt full=...

Exports each checkpoint in the three formats (SGLang's directory is one that vLLM reads too; SGLang itself needs a GPU), the untrained start of the first one
in the plain form, and with ``--prune`` a full-vocabulary draft cut to so many tokens after training; measures each with ``main.py acceptance``. One JSON
line a draft, and last whether the formats of one checkpoint agree within ``--noise`` and lie above the untrained draft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from torchspec.files import dumps  # noqa: E402

PROMPTS = "examples/hf-quickstart/data/validate.jsonl"
COUNTS = "examples/hf-quickstart/data/train.jsonl"


def command(*words: str) -> None:
    """``main.py`` with these words; its failure is ours."""
    if subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, check=False).returncode:
        sys.exit(f"error: main.py {' '.join(words)} failed")


def export_untrained(checkpoint: Path, target: str, folder: Path) -> None:
    """A draft of the checkpoint's architecture and vocabulary as training starts it."""
    import torch

    from torchspec.models.eagle3.config import DraftConfig
    from torchspec.models.eagle3.family import EAGLE3
    from torchspec.models.eagle3.task import DraftTask
    from torchspec.models.export.export import export_draft
    from torchspec.models.family import Build, Draft
    from torchspec.models.training.checkpoint import read_facts
    from torchspec.models.vocabulary import VocabularyMapping
    from torchspec.target import Target, TargetConfig

    facts = read_facts(checkpoint)
    config, made_for = DraftConfig.from_dict(facts["draft_config"]), Target(TargetConfig(target))
    vocabulary = None if facts["draft_ids"] is None else VocabularyMapping(facts["draft_ids"], config.vocab_size)
    torch.manual_seed(0)
    task = DraftTask.build(config, Build(made_for, vocabulary, torch.float32, torch.device("cpu")), step_weights=[1.0])
    weights = {name: p.detach() for name, p in task.draft.named_parameters()}
    export_draft(Draft(config, weights, vocabulary, family=EAGLE3), made_for, folder)


def measure(name: str, form: str, target: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Serve one directory."""
    report = folder.with_suffix(".json")
    command(
        *("acceptance", "--target", target, "--draft", str(folder), "--prompts", PROMPTS, "--limit", str(args.limit), "--compare", "false"),
        *("--max_new_tokens", str(args.max_new_tokens), "--output", str(report)),
    )
    found = json.loads(report.read_text())
    kept = {key: found[key] for key in ("acceptance_length", "acceptance_rates", "drafts", "generated_tokens", "vllm_version")}
    line = {"draft": name, "format": form, **kept}
    print(dumps(line), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--target", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=("vllm", "speculators", "sglang"), default=("vllm", "speculators", "sglang"))
    parser.add_argument("--prune", type=int, help="also cut full-vocabulary drafts to so many tokens after training")
    parser.add_argument("--limit", type=int, default=32, help="prompts")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.03, help="difference of acceptance lengths of one draft that formats may show")
    from torchspec.paths import expand_all

    args = expand_all(parser.parse_args())
    given = {name: Path(path) for name, _, path in (word.partition("=") for word in args.checkpoints)}
    args.output = args.output.resolve()
    first = next(iter(given))
    export_untrained(given[first], args.target, args.output / "untrained")
    lines = [measure("untrained", "vllm", args.target, args.output / "untrained", args)]
    for name, checkpoint in given.items():
        cuts: list[tuple[str, list[str]]] = [(name, [])]
        from torchspec.models.training.checkpoint import read_facts

        if args.prune and read_facts(checkpoint)["draft_ids"] is None:
            cuts.append((f"{name}, cut to {args.prune}", ["--draft_vocab_size", str(args.prune), "--token_counts", COUNTS]))
        for label, cut in cuts:
            for form in args.formats if not cut else ["vllm"]:
                folder = args.output / f"{label}-{form}".replace(", ", "-").replace(" ", "-")
                command("export", "--checkpoint", str(checkpoint), "--target", args.target, "--output", str(folder), "--format", form, *cut)
                lines.append(measure(label, form, args.target, folder, args))
    lengths: dict[str, list[float]] = {}
    for line in lines:
        lengths.setdefault(line["draft"], []).append(line["acceptance_length"])
    spread = {name: max(found) - min(found) for name, found in lengths.items()}
    untrained = lengths["untrained"][0]
    good = all(value <= args.noise for value in spread.values()) and all(min(found) > untrained for name, found in lengths.items() if name != "untrained")
    print(dumps({"spread": spread, "untrained": untrained, "ok": good}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
