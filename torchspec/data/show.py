"""What a run would train on, for the eye: conversations as tokens, the supervised ones in colour, in the terminal or as an HTML page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchspec.data.conversations import RowError, parse
from torchspec.data.prepare import DataOptions, conversations
from torchspec.data.render import Renderer, special_ids
from torchspec.data.served import check_served
from torchspec.data.sources import Given, find_sources, read_rows
from torchspec.data.tokenise import Tokenise, Tokenised
from torchspec.data.unused import told
from torchspec.errors import UserError
from torchspec.files import begins_with, write
from torchspec.images import VisionTower
from torchspec.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEN, _DIM, _END = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"
_HEAD = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Training data</title>"
_STYLE = """body{font:14px/1.7 ui-monospace,monospace;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{font-size:1rem;margin:2rem 0 .3rem}p{margin:.2rem 0;color:#666}pre{white-space:pre-wrap;border:1px solid #ddd;padding:1rem;margin:.5rem 0}
.on{background:#b8e6b8}.control{color:#96c}.on.control{background:#7fc97f;color:#408}.bad{color:#b00}i{font-style:normal;border-right:1px solid #0002}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}pre{border-color:#444}.on{background:#1d4d1d}.on.control{background:#2a6b2a;color:#dbf}}"""


@dataclass(frozen=True)
class Piece:
    """One token, or several that only together are whole characters."""

    ids: tuple[int, ...]
    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True)
class Shown:
    """One row."""

    place: str
    problem: str
    """Why it cannot be used; "" when it can."""
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    cut: int = 0
    """Tokens beyond max_length."""
    unused: tuple[str, ...] = ()
    """Keys of the row that nothing was read from."""

    @property
    def supervised(self) -> int:
        """Tokens that are trained."""
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)

    @property
    def title(self) -> str:
        """Place and counts."""
        if self.problem:
            return f"{self.place} {self.problem}"
        cut = f", {self.cut} more cut off by max_length" if self.cut else ""
        unused = f"; {clauses}" if (clauses := told(self.unused)) else ""
        return f"{self.place}: {self.tokens} tokens{cut}, {self.supervised} supervised{unused}"


def shown_rows(target: Target, given: Given, *, options: DataOptions, skip: int, limit: int, written: Sequence[Path] = ()) -> list[Shown]:
    """Rows of the sources as they would be trained.

    Args:
        target: its tokenizer and template.
        given: sources.
        options: as of the run.
        skip: rows left out at the beginning.
        limit: rows shown.
        written: outputs, which are no input.

    Raises:
        UserError: unreadable sources, a target that cannot render, or no row at that place.
    """
    tokenizer = target.tokenizer()
    ends = target.end_ids()

    sources = find_sources(given, config_key="input", written=written)

    @cache
    def tokenise() -> Tokenise:  # rows of tokens need no renderer
        renderer = Renderer(tokenizer, name=target.config.path, end_ids=ends, supervise=options.supervise, variables=options.template_args)
        check_served(renderer, target.served, conversations(sources, options), name=target.config.path)
        return Tokenise(
            renderer,
            max_length=options.max_length,
            messages_key=options.messages_key,
            media=options.media,
            tower=VisionTower(target) if options.media == "engine" else None,
            folders=[source.folder for source in sources],
        )

    every = ((number, line, row) for number, source in enumerate(sources) for row, line in read_rows(source, config_key="input"))
    chosen = itertools.islice(every, skip, skip + limit)
    rows = [_shown(f"{sources[number].name}:{line}", row, number, tokenise=tokenise, tokenizer=tokenizer, options=options) for number, line, row in chosen]
    if not rows:
        raise UserError("skip" if skip else "input", skip or given, "leaves no row to show", "check the files, or lower it")
    return rows


def _shown(place: str, row: bytes, source: int, *, tokenise: Callable[[], Tokenise], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Shown:
    try:
        given = parse(row, messages_key=options.messages_key, media=options.media)
    except RowError as error:
        return Shown(place, str(error))
    if given.input_ids is not None:
        ids, mask = np.array(given.input_ids), np.array(given.loss_mask)
        made = Tokenised(ids[: options.max_length], mask[: options.max_length], ids.shape[0], unused=given.unused)
    else:
        made = tokenise().row(row, source)
        if made.problem:
            return Shown(place, made.problem)
    kept = made.ids.tolist()
    return Shown(place, "", tuple(_pieces(kept, made.mask.tolist(), tokenizer)), tokens=len(kept), cut=made.length - len(kept), unused=made.unused)


def _pieces(ids: list[int], mask: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    special = special_ids(tokenizer)
    at = 0
    while at < len(ids):
        end = at + 1
        text = str(tokenizer.decode(ids[at:end], clean_up_tokenization_spaces=False))
        while "\ufffd" in text and end < min(len(ids), at + 4) and mask[end] == mask[at]:  # bytes of one character
            end += 1
            text = str(tokenizer.decode(ids[at:end], clean_up_tokenization_spaces=False))
        yield Piece(tuple(ids[at:end]), text, bool(mask[at]), ids[at] in special)
        at = end


def terminal(rows: list[Shown], *, color: bool) -> str:
    """For a terminal: supervised tokens on green, or between ⟦ and ⟧ without colour."""
    parts = []
    for row in rows:
        body = []
        for supervised, group in itertools.groupby(row.pieces, key=lambda piece: piece.supervised):
            text = "".join(piece.text.replace("\n", "↵\n") if supervised else piece.text for piece in group)
            if not color:
                body.append(f"⟦{text}⟧" if supervised else text)
            else:  # a colour that crosses a line break would fill the rest of the line
                body.append("\n".join(f"{_GREEN if supervised else _DIM}{line}{_END}" if line else "" for line in text.split("\n")))
        parts.append(f"── {row.title}\n{''.join(body)}\n")
    return "\n".join(parts)


is_page = begins_with(_HEAD)
"""Knows a page of ours."""


def page(rows: list[Shown], *, target: str) -> str:
    """For a browser; the pointer on a token shows its id."""
    parts = []
    for row in rows:
        parts.append(f"<h2{' class=bad' if row.problem else ''}>{html.escape(row.title)}</h2>")
        if row.pieces:
            parts.append(f"<pre>{''.join(_span(piece) for piece in row.pieces)}</pre>")
    head = f"{_HEAD}<style>{_STYLE}</style>"
    legend = "Supervised tokens are <i class=on>green</i>, control tokens <i class=control>violet</i>; the pointer on a token shows its id."
    return f"{head}\n<p>{html.escape(target)}</p><p>{legend}</p>\n" + "\n".join(parts) + "\n"


def _span(piece: Piece) -> str:
    names = " ".join(name for name, on in (("on", piece.supervised), ("control", piece.control)) if on)
    text = html.escape(piece.text).replace("\n", "↵\n")
    ids = " ".join(map(str, piece.ids))
    return f"<i class='{names}' title='{ids}'>{text}</i>"


def write_page(file: Path, rows: list[Shown], *, target: str) -> None:
    """:func:`page` into a file."""
    write(file, page(rows, target=target))
