"""The commands that look at data and make it. Each is a function whose arguments are the command's options; heavy imports happen inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from torchspec.errors import UserError
from torchspec.files import write
from torchspec.target import Dtype, Target, TargetConfig


def show_data(
    target: str,
    input: str | list[str],
    limit: int = 1,
    skip: int = 0,
    html: str | None = None,
    color: Literal["auto", "always", "never"] = "auto",
    max_length: int = 2048,
    messages_key: str | None = None,
    supervise: Literal["auto", "all", "last"] = "auto",
    media: Literal["refuse", "placeholder", "engine"] = "refuse",
    template_args: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show conversations as they would be trained: their tokens, the supervised ones in colour.

    Args:
        target: hub id or directory of the target.
        input: conversation files, folders or hub ids.
        limit: rows to show.
        skip: rows to leave out before them.
        html: file for the same as a page.
        color: auto colours a terminal and puts brackets elsewhere.
        max_length: as data.max_length.
        messages_key: as data.messages_key.
        supervise: as data.supervise.
        media: as data.media.
        template_args: as data.template_args.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.data.outputs import output_file
    from torchspec.data.prepare import DataOptions
    from torchspec.data.show import is_page, shown_rows, terminal, write_page

    if limit < 1 or skip < 0:
        raise UserError("limit" if limit < 1 else "skip", min(limit, skip), "is too small", "show 1 row or more, and skip 0 or more")
    if max_length < 1:
        raise UserError("max_length", max_length, "is below 1", "use 1 or more")
    page = None if html is None else output_file(html, field="html", ours=is_page, what="page")
    options = DataOptions(max_length, messages_key=messages_key, supervise=supervise, media=media, template_args=template_args or {})
    found = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    rows = shown_rows(found, input, options=options, skip=skip, limit=limit, written=[] if page is None else [page])
    print(terminal(rows, color=color == "always" or (color == "auto" and sys.stdout.isatty())))
    if page is not None:
        write_page(page, rows, target=target)
        print(f"page: {html}")


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


def regenerate(
    target: str,
    input: str,
    output: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    messages_key: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    engine: Literal["transformers", "vllm", "server"] = "transformers",
    engine_args: dict[str, Any] | None = None,
    server: str | None = None,
    template_args: dict[str, Any] | None = None,
) -> None:
    """Answer the prompts of a conversation file with the target itself.

    Args:
        target: hub id or directory of the target; with a server, its name there.
        input: conversation file, folder or hub id; the assistant turns in it are replaced.
        output: jsonl file to write, or to go on with.
        max_new_tokens: length limit of an answer.
        temperature: 0 takes the most likely token each time.
        top_p: nucleus sampling.
        seed: of the sampling.
        batch_size: conversations answered at once (requests at once, with a server).
        limit: rows of the input to take; all of them when empty.
        messages_key: column of the messages; empty takes conversations or messages.
        revision: branch, tag or commit of a hub id.
        dtype: auto, bfloat16, float16 or float32.
        device: auto, cpu, or a CUDA device such as cuda:0.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
        engine: transformers, vllm (much faster where it runs), or server (any OpenAI-compatible one; its key comes from OPENAI_API_KEY).
        engine_args: engine arguments of vLLM, as they are; with a server, added to every request.
        server: address of the server's interface, such as http://127.0.0.1:8000/v1.
        template_args: variables for the chat template, such as {"enable_thinking": false}.
    """
    from torchspec.data.regenerate import regenerate as run

    report = run(
        target,
        input=input,
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        messages_key=messages_key,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        engine=engine,
        engine_args=engine_args,
        server=server,
        template_args=template_args,
    )
    rate = report.tokens / report.seconds if report.seconds else 0.0
    print(
        f"{report.answered} answered, {report.skipped} were there, {report.failed} failed, {report.cut} cut by the length limit, "
        f"{report.exact} written as token ids (their messages would render to others); "
        f"{report.tokens} tokens at {rate:.0f} tokens/s -> {output}"
    )
