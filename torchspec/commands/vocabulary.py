"""``main.py vocabulary``: tokens of the answers are counted, for the choice of a draft vocabulary (``data/vocabulary_report.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torchspec.errors import UserError
from torchspec.files import write
from torchspec.target import Target, TargetConfig


def vocabulary(
    target: str,
    input: str | list[str] | dict[str, float],
    output: str | None = None,
    size: int | None = None,
    plot: str | None = None,
    messages_key: str | None = None,
    supervise: Literal["auto", "all", "last"] = "auto",
    template_args: dict[str, Any] | None = None,
    max_bad_fraction: float = 0.0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Count the tokens of the answers in conversations, and report what smaller draft vocabularies cover.

    Args:
        target: hub id or directory of the target.
        input: conversation files, folders or hub ids, with or without weights; or a file of counts that this command wrote.
        output: safetensors file for the counts (export reads it as token_counts); with size also draft_ids, d2t and t2d.
        size: tokens of a draft vocabulary to choose.
        plot: SVG file for coverage over size.
        messages_key: as data.messages_key.
        supervise: as data.supervise.
        template_args: as data.template_args.
        max_bad_fraction: as data.max_bad_fraction.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.data.corpus import count_tokens
    from torchspec.data.outputs import output_file
    from torchspec.data.vocabulary_report import TokenCounts, is_plot, table
    from torchspec.data.vocabulary_report import plot as drawn
    from torchspec.models.vocabulary import VocabularyMapping

    if size is not None and output is None:
        raise UserError("size", size, "chooses a vocabulary that goes nowhere", "give output as well")
    if size is not None and size < 1:
        raise UserError("size", size, "is below 1", "use 1 or more")
    counts_file = None if output is None else output_file(output, field="output", ours=TokenCounts.is_one, what="file of token counts")
    plot_file = None if plot is None else output_file(plot, field="plot", ours=is_plot, what="plot")
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    counts, ends = count_tokens(facts, input, messages_key=messages_key, supervise=supervise, template_args=template_args, max_bad_fraction=max_bad_fraction)
    found = TokenCounts(counts, tuple(ends), facts.fingerprint)
    print(f"{int(counts.sum()):,} supervised tokens, {int((counts > 0).sum()):,} different ones of {counts.numel():,}")
    print(table(found))
    if counts_file is not None:
        mapping = None if size is None else VocabularyMapping.from_counts(counts, size, always=ends)
        found.save(counts_file, **({} if mapping is None else {"draft_ids": mapping.draft_ids, "d2t": mapping.d2t, "t2d": mapping.t2d}))
        print(f"counts: {output}")
    if plot_file is not None:
        write(plot_file, drawn(found, title=f"Coverage of the answers of {Path(target).name}"))
        print(f"plot: {plot}")
