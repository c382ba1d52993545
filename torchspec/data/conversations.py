"""What one row may look like, judged row by row, so that a bad one costs a line of a report and not the run.

A row holds messages (``columns.py`` finds them, ``messages.py`` reads one); or text that was rendered elsewhere
(``text``); or tokens (``input_ids`` with ``loss_mask``). What of it has no meaning here is named in
``Conversation.unused``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchspec.data.columns import (
    ANSWER_KEYS,
    MESSAGE_KEYS,
    QUESTION_KEYS,
    SYSTEM_KEYS,
    TEMPLATE_KEYS,
    TOOL_KEYS,
    Turns,
    find_turns,
    inside,
    repeated,
    switches_of,
    template_args_of,
    tools_of,
)
from torchspec.data.messages import MEDIA, SOURCE_KEYS, Message, Read, RowError, media_of, read_message, reasoning_of, says, words_of

__all__ = ["MEDIA", "MESSAGE_KEYS", "Conversation", "Message", "RowError", "media_of", "parse", "reasoning_of", "words_of"]

_OURS = ("sampling", "tokenizer", "finish")
"""Columns that ``regenerate`` writes; ``finish`` is read."""
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half of a UTF-16 pair, escaped or encoded; whole pairs look so as well."""


@dataclass(frozen=True)
class Conversation:
    """One usable row: messages to render, text that was rendered, or tokens."""

    messages: tuple[Message, ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    """Rendered elsewhere, special tokens included."""
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None
    tokenizer: str = ""
    """Fingerprint of the tokenizer of ``input_ids``, where the row says it."""
    cut: frozenset[int] = field(default_factory=frozenset)
    """Indices of messages that a length limit ended (``finish: length``): no end token was generated."""
    images: tuple[Any, ...] = ()
    """Where the image of each image part is, in their order, as the row has it (``data/pictures.py`` reads them); empty where engines are given none."""
    context: frozenset[int] = field(default_factory=frozenset)
    """Indices of answers that are not to be trained (``weight: 0``)."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """What the row tells the chat template (``chat_template_kwargs``)."""
    columns: frozenset[str] = field(default_factory=frozenset, compare=False)
    """Columns that the messages come from."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the row that nothing was read from; of its messages as ``messages[].key``."""


def parse(text: bytes, *, messages_key: str | None = None, need_answer: bool = True, media: str = "refuse") -> Conversation:
    """Judge one row.

    Args:
        text: the row as JSON.
        messages_key: column of the messages (or of the answer beside a question column); None takes ``MESSAGE_KEYS``, then question and answer columns.
        need_answer: False also takes prompts: rows without an assistant message, and rows with only a question column; of tokens
            and messages in one row, the messages.
        media: ``placeholder`` takes images, video and audio as the placeholders that the template writes; ``refuse`` does not; ``engine`` takes images
            alone, and says where they are.

    Raises:
        RowError: saying what is wrong with the row.
    """
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise RowError(f"is no valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise RowError(f"is a {type(row).__name__}, not an object")
    talks = any(row.get(key) is not None for key in MESSAGE_KEYS)
    if row.get("input_ids") is not None and messages_key is None and (need_answer or not talks):
        return _tokens(row)
    turns = find_turns(row, messages_key=messages_key, need_answer=need_answer)
    if turns is None and isinstance(row.get("text"), str) and need_answer and messages_key is None:
        if not row["text"].strip():
            raise RowError("text is empty")
        return _whole(Conversation(text=row["text"], unused=_unused(row, {"text"})), text)
    if turns is None:
        raise _no_messages(row, messages_key)
    read = [read_message(message, i, media=media) for i, message in enumerate(turns.given)]
    messages = tuple(one.message for one in read)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    images = _images(row, read) if media == "engine" else ()
    if not answers and need_answer:
        raise RowError("has no assistant message")
    _check_order(messages)
    cut = {i for i, one in enumerate(read) if one.cut}
    if "length" in (row.get("finish"), row.get("finish_reason")) and answers:
        cut.add(answers[-1])
    made = Conversation(
        messages=messages,
        tools=tools_of(row),
        cut=frozenset(cut),
        images=images,
        context=frozenset(i for i, one in enumerate(read) if not one.trained),
        template_args=template_args_of(row),
        columns=turns.columns,
        unused=_unused_of(row, turns, read, messages, images=media == "engine"),
    )
    return _whole(made, text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that says a key twice would lose the first."""
    made = dict(pairs)
    if len(made) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RowError(f"says {twice!r} twice in one object")
    return made


def _no_messages(row: dict[str, Any], messages_key: str | None) -> RowError:
    keys = ", ".join(map(str, row)) or "none"
    if messages_key is None and {"chosen", "rejected"} & row.keys():
        return RowError(f"has chosen or rejected answers and none that is said to be trained: name one with data.messages_key (keys: {keys})")
    asked = next((key for key in QUESTION_KEYS if messages_key is None and isinstance(row.get(key), str | list) and row[key]), None)
    if asked is not None:
        return RowError(f"has no answer to its {asked}: text or messages in {' or '.join(ANSWER_KEYS)} (keys: {keys})")
    return RowError(f"has no {messages_key or ' or '.join(MESSAGE_KEYS[:2])} (keys: {keys})")


def _whole(conversation: Conversation, row: bytes) -> Conversation:
    """The same, unless its text holds half of a character, which no tokenizer takes."""
    if _MAY_BE_HALF.search(row):
        try:
            json.dumps([conversation.messages, conversation.tools, conversation.text, conversation.template_args], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise RowError(f"has half of a character in its text (the lone surrogate {half!r})") from None
    return conversation


def _images(row: dict[str, Any], read: list[Read]) -> tuple[Any, ...]:
    """Where the image of each part is: in the part, or the next of the row's own list."""
    if any(one.parts and one.message["role"] == "assistant" for one in read):  # answers are taken as text
        raise RowError("has an image in an assistant message, which no target generates")
    listed = row.get("images") if row.get("images") is not None else row.get("image")
    left = list(listed) if isinstance(listed, list) else [] if listed is None else [listed]
    found = []
    for part in (part for one in read for part in one.parts):
        source = next((part[key] for key in SOURCE_KEYS if part.get(key) is not None), None)
        if source is None and not left:
            raise RowError("has an image part that says nowhere where its image is")
        found.append(left.pop(0) if source is None else source)
    if left:
        raise RowError(f"lists {len(left)} more images than its messages have parts of type image")
    return tuple(found)


def _check_order(messages: tuple[Message, ...]) -> None:
    """Refuse an order of roles that no server would be sent, or answer to."""
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and before not in (None, "system", "developer"):
            raise RowError(f"has its roles out of order: message {i} ({role}) comes after one of the {before}; it belongs at the beginning")
        if role == "assistant" and before in (None, "system", "developer"):
            raise RowError(f"has its roles out of order: message {i} is an answer to nothing (a user message must come before it)")
        if role == "assistant" and before == "assistant":
            raise RowError(f"has its roles out of order: messages {i - 1} and {i} are both the assistant's")
        if role == "tool" and not (before == "tool" or (before == "assistant" and i)):
            raise RowError(f"has its roles out of order: message {i} is a tool result, and no assistant message before it called a tool")
        before = role


def _tokens(row: dict[str, Any]) -> Conversation:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids) or not ids:
        raise RowError("input_ids is not a list of token ids")
    if mask is None and (labels := row.get("labels")) is not None:
        if not isinstance(labels, list) or len(labels) != len(ids) or any(label not in (-100, i) for label, i in zip(labels, ids, strict=True)):
            raise RowError("labels is not input_ids with -100 where nothing is trained")
        mask = [int(label != -100) for label in labels]
    if mask is None:
        raise RowError("has input_ids without loss_mask")
    if not isinstance(mask, list) or not all(type(m) in (int, bool) and m in (0, 1) for m in mask):
        raise RowError("loss_mask is not a list of 0 and 1")
    if len(ids) != len(mask):
        raise RowError(f"input_ids has {len(ids)} entries and loss_mask {len(mask)}")
    if (attended := row.get("attention_mask")) is not None and attended != [1] * len(ids):
        raise RowError("attention_mask hides tokens of input_ids: leave out the padding")
    said = {"input_ids", "loss_mask", "labels", "attention_mask", *MESSAGE_KEYS, *SYSTEM_KEYS, *TOOL_KEYS, *TEMPLATE_KEYS}  # the tokens hold them
    return Conversation(input_ids=ids, loss_mask=[int(m) for m in mask], tokenizer=str(row.get("tokenizer") or ""), unused=_unused(row, said))


def _unused_of(row: dict[str, Any], turns: Turns, read: list[Read], messages: tuple[Message, ...], *, images: bool) -> tuple[str, ...]:
    used = {*turns.columns, *TOOL_KEYS, "chat_template_kwargs", "finish_reason", *switches_of(row)} | repeated(row, messages)
    if images or any(one.parts for one in read):  # as placeholders they are known to go nowhere
        used |= {"images", "image"}
    return (
        *_unused(row, used),
        *inside({key: value for key, value in row.items() if key not in used}),
        *dict.fromkeys(f"{turns.key}[].{key}" for one in read for key in one.unused),
    )


def _unused(row: dict[str, Any], used: set[str]) -> tuple[str, ...]:
    return tuple(key for key, value in row.items() if key not in used and key not in _OURS and says(value))
