"""``main.py show_data``: conversations as they would be trained (``data/show.py``)."""

from __future__ import annotations

import sys
from typing import Any, Literal

from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig


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
