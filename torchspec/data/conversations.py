"""What one row may look like, judged row by row, so that a bad one costs a line of a report and not the run.

A row holds ``conversations`` or ``messages``: ``{role, content}`` (OpenAI, with ``tools``, ``tool_calls``, ``reasoning_content``) or ``{from, value}``
(ShareGPT); or text that was rendered elsewhere (``text``); or tokens (``input_ids`` with ``loss_mask``).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

MESSAGE_KEYS = ("conversations", "messages")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MEDIA = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video", "audio": "audio", "input_audio": "audio"}
"""Types of parts that are no text, by what templates call them."""
SOURCE_KEYS = ("image_url", "image", "url", "path", "base64", "bytes")
"""Keys under which a part says where its image is."""
_KEPT_KEYS = ("tool_call_id", "name")
_MAY_BE_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half of a UTF-16 pair, escaped or encoded; whole pairs look so as well."""

Message = dict[str, Any]
"""``{role, content, ...}`` in OpenAI's form; ``content`` is text, or a list of ``{type: text, text}`` and ``{type: image | video | audio}``."""


class RowError(Exception):
    """A row that cannot be used; the message says why. Counted, and reported with its place."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem.encode("utf-8", "backslashreplace").decode())  # it may quote what the row has


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


def words_of(message: Message) -> str:
    """The text of a message, its parts one after the other."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")


def media_of(message: Message) -> list[str]:
    """Types of the parts of a message that are no text."""
    content = message["content"]
    return [] if isinstance(content, str) else [part["type"] for part in content if part["type"] != "text"]


def reasoning_of(message: Message) -> str:
    """What the assistant thought before this message, "" for nothing: its own field, or what stands before ``</think>`` in the content."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"])
    before, found, _ = words_of(message).partition("</think>")
    return before.replace("<think>", "").strip() if found else ""


def parse(text: bytes, *, messages_key: str | None = None, need_answer: bool = True, media: str = "refuse") -> Conversation:
    """Judge one row.

    Args:
        text: the row as JSON.
        messages_key: column of the messages; None takes ``conversations`` or ``messages``.
        need_answer: False also takes prompts: rows without an assistant message, and rows with only a ``prompt``; of tokens
            and messages in one row, the messages.
        media: ``placeholder`` takes images, video and audio as the placeholders that the template writes; ``refuse`` does not; ``engine`` takes images
            alone, and says where they are.

    Raises:
        RowError: saying what is wrong with the row.
    """
    try:
        row = json.loads(text)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise RowError(f"is no valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise RowError(f"is a {type(row).__name__}, not an object")
    talks = any(row.get(key) is not None for key in MESSAGE_KEYS)
    if row.get("input_ids") is not None and messages_key is None and (need_answer or not talks):
        return _tokens(row)
    if not need_answer and messages_key is None and isinstance(row.get("prompt"), str):
        return _whole(Conversation(messages=({"role": "user", "content": row["prompt"]},)), text)
    key = messages_key or next((k for k in MESSAGE_KEYS if row.get(k) is not None), None)
    if key is None and isinstance(row.get("text"), str) and need_answer:
        if not row["text"].strip():
            raise RowError("text is empty")
        return _whole(Conversation(text=row["text"]), text)
    if key is None or row.get(key) is None:
        raise RowError(f"has no {messages_key or ' or '.join(MESSAGE_KEYS)} (keys: {', '.join(map(str, row)) or 'none'})")
    given = row[key]
    if isinstance(given, str) and given.lstrip().startswith("["):
        given = _json(given, key)
    if not isinstance(given, list) or not given:
        raise RowError(f"{key} is not a list of messages")
    messages = tuple(_message(message, i, media) for i, message in enumerate(given))
    images = _images(row, given, messages) if media == "engine" else ()
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers and need_answer:
        raise RowError("has no assistant message")
    _check_order(messages)
    cut = {i for i, message in enumerate(given) if message.get("finish") == "length"}
    if row.get("finish") == "length" and answers:
        cut.add(answers[-1])
    return _whole(Conversation(messages=messages, tools=_tools(row.get("tools")), cut=frozenset(cut), images=images), text)


def _whole(conversation: Conversation, row: bytes) -> Conversation:
    """The same, unless its text holds half of a character, which no tokenizer takes."""
    if _MAY_BE_HALF.search(row):
        try:
            json.dumps([conversation.messages, conversation.tools, conversation.text], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise RowError(f"has half of a character in its text (the lone surrogate {half!r})") from None
    return conversation


def _images(row: dict[str, Any], given: list[Any], messages: tuple[Message, ...]) -> tuple[Any, ...]:
    """Where the image of each part is: in the part, or the next of the row's own list."""
    contents = [message.get("content" if message.get("role") is not None else "value") for message in given]
    parts = [part for content in contents if isinstance(content, list) for part in content if part.get("type") in MEDIA]
    if len(parts) != sum(len(media_of(message)) for message in messages):  # answers are taken as text
        raise RowError("has an image in an assistant message, which no target generates")
    listed = row.get("images") if row.get("images") is not None else row.get("image")
    left = list(listed) if isinstance(listed, list) else [] if listed is None else [listed]
    found = []
    for part in parts:
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
    if mask is None:
        raise RowError("has input_ids without loss_mask")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids) or not ids:
        raise RowError("input_ids is not a list of token ids")
    if not isinstance(mask, list) or not all(type(m) in (int, bool) and m in (0, 1) for m in mask):
        raise RowError("loss_mask is not a list of 0 and 1")
    if len(ids) != len(mask):
        raise RowError(f"input_ids has {len(ids)} entries and loss_mask {len(mask)}")
    return Conversation(input_ids=ids, loss_mask=[int(m) for m in mask], tokenizer=str(row.get("tokenizer") or ""))


def _message(given: Any, index: int, media: str) -> Message:
    if not isinstance(given, dict):
        raise RowError(f"message {index} is a {type(given).__name__}, not an object")
    if given.get("role") is not None:
        role, content = given["role"], given.get("content")
        if role not in ROLES:
            raise RowError(f"message {index} has the unknown role {role!r} (known: {', '.join(ROLES)})")
    elif given.get("from") is not None:
        if not isinstance(given["from"], str) or given["from"] not in SHAREGPT_ROLES:
            raise RowError(f"message {index} has the unknown role {given['from']!r} (known: {', '.join(SHAREGPT_ROLES)})")
        role, content = SHAREGPT_ROLES[given["from"]], given.get("value")
    else:
        raise RowError(f"message {index} has neither role nor from")
    calls = _tool_calls(given.get("tool_calls"), index) if role == "assistant" else None
    message: Message = {"role": role, "content": _content(content, index, may_be_empty=bool(calls), media=media)}
    if role == "assistant":
        message["content"] = words_of(message)
    if calls:
        message["tool_calls"] = calls
    for key in _KEPT_KEYS:
        if given.get(key) is not None:
            if not isinstance(given[key], str):
                raise RowError(f"message {index}: its {key} is a {type(given[key]).__name__}, not text")
            message[key] = given[key]
    reasoning = next((given[key] for key in REASONING_KEYS if given.get(key)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise RowError(f"message {index}: its reasoning is a {type(reasoning).__name__}, not text")
        message["reasoning_content"] = reasoning
    return message


def _content(content: Any, index: int, *, may_be_empty: bool, media: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        shown = "missing" if content is None else f"a {type(content).__name__} that is not plain text"
        raise RowError(f"message {index}: its content is {shown}")
    parts = [_part(part, index, media) for part in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: dict[str, Any], index: int, media: str) -> dict[str, str]:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if not isinstance(kind, str) or kind not in MEDIA:
        raise RowError(f"message {index}: its content has a part of type {kind!r} (known: text, {', '.join(MEDIA)})")
    if media == "refuse":
        raise RowError(
            f"message {index}: its content has a part of type {kind!r}, which the engine is not given (data.media: engine gives it images, "
            "placeholder trains on the rest)"
        )
    if media == "engine" and MEDIA[kind] != "image":
        raise RowError(f"message {index}: its content has a part of type {kind!r}; engines are given images, but no video and no audio")
    return {"type": MEDIA[kind]}


def _tool_calls(given: Any, index: int) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as vLLM and the templates' authors have them."""
    calls = _json(given, f"message {index}: tool_calls") if isinstance(given, str) else given
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"message {index}: tool_calls is not a list of objects")
    result = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {index}: a tool call has no function name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"message {index}: arguments of {function['name']}") or {}
        if not isinstance(arguments, dict):
            raise RowError(f"message {index}: arguments of {function['name']} are a {type(arguments).__name__}, not an object")
        if not isinstance(call.get("id"), str | None):
            raise RowError(f"message {index}: a tool call has an id that is a {type(call['id']).__name__}, not text")
        kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
        result.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of objects")
    return tools


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} is no valid JSON") from None
