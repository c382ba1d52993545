"""The loaded tokenizer against the one that a server takes, on the data itself: a draft trained on other ids than are served is trained on another language.

Looked at are the first :data:`LOOKED_AT` conversations: the ids of each rendered text, and, where the server renders messages by itself, of each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torchspec.data.conversations import Conversation, RowError
from torchspec.errors import UserError

if TYPE_CHECKING:
    from torchspec.data.render import Renderer
    from torchspec.tokenizer import Served

LOOKED_AT = 1000
_SHOWN = 12
"""Ids of each list in an error, around the first that differs."""


def check_served(renderer: Renderer, served: Served | None, conversations: Iterable[Conversation], *, name: str) -> int:
    """Refuse a tokenizer that gives other ids than the one served.

    Args:
        renderer: with the loaded tokenizer.
        served: what to compare with; None compares nothing.
        conversations: of the data; those of ids alone say nothing.
        name: path or id of the target, for errors.

    Returns:
        How many conversations were compared.

    Raises:
        UserError: with the first text that differs, and both lists of ids.
    """
    compared = 0
    for conversation in itertools.islice(conversations, LOOKED_AT) if served is not None else ():
        assert served is not None
        if conversation.input_ids is not None:
            continue
        try:
            text = renderer.text(conversation)
            upto = renderer.asked(conversation)
            ours = [renderer.prompt(conversation, i) for i in upto] if served.prompt is not None else []
        except RowError:
            continue  # counted with the bad rows
        if served.encode is not None:
            _compare(renderer.ids(text), served.encode(text), text, served, name)
        for i, ids in zip(upto, ours, strict=False):
            assert served.prompt is not None
            theirs = served.prompt(conversation.messages[:i], conversation.tools)
            if theirs is not None:
                _compare(ids, theirs, renderer.decode(theirs), served, name)
        compared += 1
    return compared


def _compare(ours: list[int], theirs: list[int], text: str, served: Served, name: str) -> None:
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    begin = max(at - 2, 0)
    mine, other = ours[begin : begin + _SHOWN], theirs[begin : begin + _SHOWN]
    shown = text if len(text) <= 80 else text[:80] + "..."
    problem = f"has a tokenizer that cuts {shown!r} otherwise than {served.name}: from token {begin} on {mine} here, {other} there"
    raise UserError("data.target.path", name, problem, served.fix)
