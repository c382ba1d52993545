"""Every comparison of the draft's mathematics with something that is not our fast path: a JSON line a check, last ``checks``, ``failed``, ``max_diff``.

    reference      loss, metric sums and gradients by ``tests/models/reference.py`` and ``textbook.py``: slow, obvious, fp64; relative
    transformers   rotary embedding and norm modules of Transformers; absolute, fp32
    speculators    logits of speculators 0.9's own unroll of our export, every step, absolute, fp32; its eager losses, value and gradient, relative
    reload         logits of an export read back alone, each format
    vllm           greedy drafts that stock vLLM proposes for a served export, token by token on 50 prompts; difference of their logits, absolute, fp32

``python benchmarks/numerics.py`` runs all (minutes); ``--only reference reload`` some; ``--docs`` also writes the table of ``docs/numerics.md``, to which
``--lines FILE`` adds the printed lines of another run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from torchspec.files import dumps  # noqa: E402

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- written by benchmarks/numerics.py --docs -->", "<!-- end of what it writes -->"
COLUMNS = ("reference, value", "reference, gradient", "transformers", "speculators", "reload", "vllm")
KINDS = ("reference", "transformers", "speculators", "reload", "vllm")
BOUNDS = {"reference, value": 1e-6, "reference, gradient": 1e-6, "transformers": 1e-5, "speculators": 1e-5, "reload": 0.0, "vllm": 1e-3}
"""The fp64 reference takes angles in fp64, ours tables of inverse frequencies in fp32 as everywhere: hence 1e-6."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    column: str
    variant: str
    difference: float
    detail: dict[str, Any]
    ok: bool

    @classmethod
    def of(cls, column: str, variant: str, difference: float, *, also: bool = True, **detail: Any) -> Check:
        """Judged by the column's bound, and by ``also``."""
        return cls(column, variant, difference, detail, also and difference <= BOUNDS[column])

    @classmethod
    def read(cls, line: str) -> Check:
        """Back from :meth:`line`."""
        plain = json.loads(line)
        column, variant, difference, ok = (plain.pop(name) for name in ("check", "variant", "difference", "ok"))
        plain.pop("bound")
        return cls(column, variant, difference, plain, ok)

    def line(self) -> str:
        """As JSON."""
        plain = {"check": self.column, "variant": self.variant, "difference": self.difference, "bound": BOUNDS[self.column], **self.detail, "ok": self.ok}
        return dumps(plain)


def reference() -> Iterator[Check]:
    """The fast path of every variant and loss, full and pruned."""
    from tests.models.differences import PRUNED, against_reference, packing
    from tests.models.textbook import NAMES, against_textbook
    from tests.models.textbook import PRUNED as SOME
    from tests.models.variants import VARIANTS

    for variant in VARIANTS:
        for vocabulary, ids in (("full", None), ("pruned", PRUNED)):
            found = against_reference(variant, ids)
            gradients = {name for name in found if name.startswith("gradient")}
            yield Check.of("reference, value", variant, max(found[name] for name in found.keys() - gradients), vocabulary=vocabulary)
            yield Check.of("reference, gradient", variant, max(found[name] for name in gradients), vocabulary=vocabulary)
        yield Check.of("reference, value", variant, packing(variant), of="packing: together, alone, backwards")
    sums: list[dict[str, float]] = [{name: 1.0} for name in NAMES] + [{"forward_kl": 1.0, "tv": 0.5}, {name: 0.3 + 0.1 * i for i, name in enumerate(NAMES)}]
    for weights in sums:
        name = _loss_name(weights)
        for vocabulary, ids in (("full", None), ("pruned", SOME)):
            found = against_textbook(weights, ids)
            yield Check.of("reference, value", name, found["value"], vocabulary=vocabulary)
            yield Check.of("reference, gradient", name, found["gradient"], vocabulary=vocabulary)


def transformers() -> Iterator[Check]:
    """Rotary embedding of every variant, norm in two types."""
    import torch

    from tests.models.variants import VARIANTS
    from tests.parity.transformers import norm, rotary

    for variant in VARIANTS:
        yield Check.of("transformers", variant, rotary(variant), of="rotary")
    for dtype in (torch.float32, torch.bfloat16):
        yield Check.of("transformers", "RMSNorm", norm(dtype), dtype=str(dtype).removeprefix("torch."))


def speculators() -> Iterator[Check]:
    """Unroll of every variant that the format can say; losses where definitions agree."""
    from tests.models.differences import PRUNED
    from tests.models.exports import save_plain_target
    from tests.models.variants import VARIANTS
    from tests.parity.losses import OWN_UNDER_PRUNING, THEIRS, against_eager
    from tests.parity.speculators import conversation_for, exported, largest_difference
    from torchspec.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        target = save_plain_target(Path(folder) / "target")
        for variant in VARIANTS:
            for vocabulary, ids in (("full", None), ("pruned", PRUNED)):
                try:
                    made = exported(variant, target, Path(folder) / "draft", draft_ids=ids)
                except UserError:
                    continue  # the format cannot say it; tests/parity/test_speculators.py lists these
                yield Check.of("speculators", variant, largest_difference(made, conversation_for(made)), vocabulary=vocabulary, of="unroll, 4 steps")
    for name in THEIRS:
        for vocabulary in ("full", "pruned"):
            if vocabulary == "full" or name not in OWN_UNDER_PRUNING:
                for of, difference in against_eager(name, pruned=vocabulary == "pruned").items():
                    yield Check.of("speculators", _loss_name({name: 1.0}), difference, vocabulary=vocabulary, of=of)


def reload() -> Iterator[Check]:
    """Every variant in every format that can say it."""
    from tests.models.differences import PRUNED
    from tests.models.exports import export_variant, reload_difference, save_plain_target
    from tests.models.variants import VARIANTS
    from torchspec.errors import UserError
    from torchspec.models.eagle3.formats import FORMATS

    with tempfile.TemporaryDirectory() as folder:
        target = save_plain_target(Path(folder) / "target")
        for variant in VARIANTS:
            for form in FORMATS:
                try:
                    made = export_variant(variant, target, Path(folder) / "draft", form=form, draft_ids=PRUNED)
                except UserError:
                    continue
                yield Check.of("reload", variant, reload_difference(made, target), format=form)


def vllm() -> Iterator[Check]:
    """Every served case, in one vLLM process."""
    from dataclasses import asdict

    from tests.parity.served import CASES, run

    with tempfile.TemporaryDirectory() as folder:
        for name, found in run(Path(folder)).items():
            detail = {field: value for field, value in asdict(found).items() if field != "logit_difference"}
            yield Check.of("vllm", name, found.logit_difference, also=found.different == 0, format=CASES[name].form, **detail)


def _loss_name(weights: dict[str, float]) -> str:
    return "loss " + (next(iter(weights)) if len(weights) == 1 else " + ".join(f"{weight:.1f} {name}" for name, weight in weights.items()))


def table(checks: list[Check]) -> str:
    """Variant x check -> largest difference, as Markdown."""
    rows = list(dict.fromkeys(check.variant for check in checks))
    lines = ["| variant | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = []
        for column in COLUMNS:
            found = [check for check in checks if (check.variant, check.column) == (row, column)]
            cells.append("" if not found else f"{max(check.difference for check in found):.1e}" + ("" if all(check.ok for check in found) else " **failed**"))
        lines.append(f"| {row} | " + " | ".join("0" if cell == "0.0e+00" else cell for cell in cells) + " |")
    served = [check for check in checks if check.column == "vllm"]
    if served:
        tokens, ties, different = (sum(check.detail[name] for check in served) for name in ("tokens", "ties", "different"))
        lines += ["", f"vLLM: {tokens:,} proposed tokens compared, {different} different, {ties} ties (logits less than 1e-4 apart)."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=KINDS, help="which comparisons; all when left out")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--lines", nargs="+", type=Path, default=[], help="files with printed lines of earlier runs, taken in as they are")
    from torchspec.paths import expand_all

    args = expand_all(parser.parse_args())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other
    runs = {"reference": reference, "transformers": transformers, "speculators": speculators, "reload": reload, "vllm": vllm}
    checks = [Check.read(line) for file in args.lines for line in file.read_text().splitlines() if '"check"' in line]
    for kind in args.only:
        for check in runs[kind]():
            print(check.line(), flush=True)
            checks.append(check)
    if args.docs:
        page = PAGE.read_text()
        page = page[: page.index(BEGIN) + len(BEGIN)] + "\n\n" + table(checks) + "\n\n" + page[page.index(END) :]
        PAGE.write_text(page)
    failed = sum(not check.ok for check in checks)
    print(dumps({"checks": len(checks), "failed": failed, "max_diff": max(check.difference for check in checks)}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
