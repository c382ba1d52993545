"""One message of a row: its role by all its names, its content, calls and thinking, and whether it is to be trained.

What comes out is OpenAI's form, whatever went in: ShareGPT's ``{from, value}``, the older ``function_call``,
Anthropic's blocks of thinking, calls and results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
"""Names of roles, in any case of letters."""
CALLING = ("function_call", "tool_call")
"""Roles whose words are a call as JSON (LLaMA-Factory, ms-swift)."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MARKS = ("weight", "train", "trainable", "training", "loss_mask", "loss")
"""Keys of an answer that say whether it is trained: 1 or true, 0 or false."""
UNCLEAR = ("train_detail", "mask", "masks")
"""Keys that mark parts of an answer, or mark it in a way that is not the same everywhere."""
MEDIA = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video", "audio": "audio", "input_audio": "audio"}
"""Types of parts that are no text, by what templates call them."""
SOURCE_KEYS = ("image_url", "image", "url", "path", "base64", "bytes")
"""Keys under which a part says where its image is."""
_TEXT = ("text", "input_text", "output_text")
_KEPT = ("tool_call_id", "name")
_READ = frozenset({"role", "from", "content", "value", "finish", "finish_reason", *_KEPT})
_READ_OF_ANSWERS = _READ | {"tool_calls", "function_call", *REASONING_KEYS, *MARKS}
_MARKED = frozenset({*MARKS, *UNCLEAR})
_SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})

Message = dict[str, Any]
"""``{role, content, ...}`` as OpenAI has it; content is text, or a list of ``{type: text, text}`` and ``{type: image | video | audio}``."""


class RowError(Exception):
    """A row that cannot be used; the message says why. Counted, and reported with its place."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem.encode("utf-8", "backslashreplace").decode())  # it may quote what the row has


@dataclass(frozen=True)
class Read:
    """What one message says."""

    message: Message
    trained: bool
    """False: a mark says that this answer is context only."""
    cut: bool
    """A length limit ended it."""
    parts: tuple[dict[str, Any], ...]
    """Its parts of media as they were given."""
    unused: tuple[str, ...]
    """Its keys that are not used."""


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


def says(value: Any) -> bool:
    """Whether a value says anything: null and what is empty do not."""
    return not any(value is nothing or (type(value) is type(nothing) and value == nothing) for nothing in _SAYS_NOTHING)


def role_of(given: dict[str, Any], index: int) -> tuple[str, str]:
    """(role in OpenAI's words, as it was written).

    Raises:
        RowError: none, or one that is not known.
    """
    named = given.get("role") if given.get("role") is not None else given.get("from")
    if named is None:
        raise RowError(f"message {index} has neither role nor from")
    written = named.strip().lower() if isinstance(named, str) else ""
    if written not in ROLES:
        raise RowError(f"message {index} has the unknown role {named!r} (known: {', '.join(ROLES)})")
    return ROLES[written], written


def content_of(given: dict[str, Any], index: int) -> Any:
    """What a message says, under whatever key.

    Raises:
        RowError: two keys that say different things.
    """
    content, value = given.get("content"), given.get("value")
    if content is not None and value is not None and content != value:
        raise RowError(f"message {index} has content and value, which differ")
    return next((one for one in (content, value, given.get("text")) if one is not None), None)


def unfolded(given: Sequence[Any]) -> Iterator[Any]:
    """Messages one by one: results of calls in a user's message (Anthropic) and pairs ``{human, assistant}`` taken apart."""
    for message in given:
        if isinstance(message, dict) and len(message) == 2 and "assistant" in message and message.keys() & {"human", "user"}:
            yield from ({"role": role, "content": words} for role, words in sorted(message.items(), reverse=True))
            continue
        content = message.get("content") if isinstance(message, dict) else None
        results = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"] if isinstance(content, list) else []
        for part in results:
            yield {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": part.get("content") if part.get("content") is not None else ""}
        if not results:
            yield message
        elif rest := [part for part in content or () if part not in results]:
            yield {**message, "content": rest}


def read_message(given: Any, index: int, *, media: str) -> Read:
    """Judge one message.

    Args:
        given: as the row has it.
        index: of it, for errors.
        media: as of :func:`torchspec.data.conversations.parse`.

    Raises:
        RowError: saying what is wrong with it.
    """
    if not isinstance(given, dict):
        raise RowError(f"message {index} is a {type(given).__name__}, not an object")
    role, written = role_of(given, index)
    content, unused = content_of(given, index), list[str]()
    known = _READ_OF_ANSWERS if role == "assistant" else _READ
    asked = content
    calls: list[dict[str, Any]] = []
    thought: list[str] = []
    if role == "assistant":
        calls = _calls(given, index, content if written in CALLING else None, unused)
        content, more = _blocks(content, index, thought) if written not in CALLING else ("", [])
        calls += more
        thought = [given[key] for key in REASONING_KEYS if given.get(key)] + thought
    elif role == "tool" and not isinstance(content, str | None) and not _is_parts(content):
        content = json.dumps(content, ensure_ascii=False)  # an object that a tool gave
    parts: list[dict[str, Any]] = []
    message: Message = {"role": role, "content": _content(content, index, media, parts, unused, may_be_empty=bool(calls))}
    if role == "assistant":
        message["content"] = words_of(message)
    if calls:
        message["tool_calls"] = calls
    for key in _KEPT:
        if given.get(key) is not None:
            if not isinstance(given[key], str):
                raise RowError(f"message {index}: its {key} is a {type(given[key]).__name__}, not text")
            message[key] = given[key]
    for one in thought:
        if not isinstance(one, str):
            raise RowError(f"message {index}: its reasoning is a {type(one).__name__}, not text")
        if one != thought[0]:
            raise RowError(f"message {index} has two different texts of reasoning")
    if thought:
        message["reasoning_content"] = thought[0]
    trained = _trained(given, index) if role == "assistant" else True
    if not given.keys() <= known:
        for key, value in given.items():
            said = (key == "text" and value == asked) or (key in MARKS and value in (0, False))  # a question that is not trained
            if key not in known and says(value) and not said:
                unused.append(key)
    cut = "length" in (given.get("finish"), given.get("finish_reason"))
    return Read(message, trained, cut, tuple(parts), tuple(unused))


def _trained(given: dict[str, Any], index: int) -> bool:
    """Whether an answer is trained: as its marks say; one without any is."""
    if _MARKED.isdisjoint(given):
        return True
    said: dict[str, bool] = {}
    for key in MARKS:
        value = given.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"message {index}: its {key} is {value!r}; an answer is trained (1 or true) or not (0 or false), with nothing between")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise RowError(f"message {index}: its {' and '.join(said)} say different things of whether it is trained")
    for key in UNCLEAR:
        if says(given.get(key)):
            raise RowError(f"message {index}: its {key} cannot be obeyed; say with weight 0 or 1 whether the answer is trained")
    return all(said.values())


# -- content


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _blocks(content: Any, index: int, thought: list[str]) -> tuple[Any, list[dict[str, Any]]]:
    """An answer's content without its parts of thinking (added to ``thought``) and of calls, and these calls."""
    if not isinstance(content, list):
        return content, []
    left, calls, thinking = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("thinking", "reasoning"):
            said = next((part[key] for key in (kind, "text") if part.get(key) is not None), None)
            if isinstance(said, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in said):
                said = "".join(one["text"] for one in said)
            if not isinstance(said, str):
                raise RowError(f"message {index}: its content has a part of type {kind!r} without text")
            thinking.append(said)
        elif kind == "tool_use":
            calls += _one_call({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}, index, [])
        else:
            left.append(part)
    if thinking:
        thought.append("\n\n".join(thinking))
    return left or ("" if calls or thinking else left), calls


def _content(content: Any, index: int, media: str, found: list[dict[str, Any]], unused: list[str], *, may_be_empty: bool) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        shown = "missing" if content is None else f"a {type(content).__name__} that is not plain text"
        raise RowError(f"message {index}: its content is {shown}")
    parts = [_part({"type": "text", "text": part} if isinstance(part, str) else part, index, media, found, unused) for part in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: dict[str, Any], index: int, media: str, found: list[dict[str, Any]], unused: list[str]) -> dict[str, str]:
    kind = part.get("type")
    if (kind in _TEXT if isinstance(kind, str) else kind is None and part.keys() == {"text"}) and isinstance(part.get("text"), str):
        unused += [f"content[].{key}" for key, value in part.items() if key not in ("type", "text") and says(value)]
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
    known = {"type", *MEDIA, *SOURCE_KEYS}
    unused += [f"content[].{key}" for key, value in part.items() if key not in known and says(value)]
    found.append(part)
    return {"type": MEDIA[kind]}


# -- calls


def _calls(given: dict[str, Any], index: int, content: Any, unused: list[str]) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, as vLLM and the templates' authors have them."""
    listed = given.get("tool_calls")
    calls = as_json(listed, f"message {index}: tool_calls") if isinstance(listed, str) and listed.strip() else listed
    if isinstance(calls, list):
        calls = [as_json(call, f"message {index}: tool_calls") if isinstance(call, str) else call for call in calls]
    if calls and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise RowError(f"message {index}: tool_calls is not a list of objects")
    result = [made for call in calls or [] for made in _one_call(call, index, unused)]
    for what, older in (("function_call", given.get("function_call")), ("content", content)):
        if not older:
            continue
        plain = as_json(older, f"message {index}: {what}") if isinstance(older, str) else older
        if not all(isinstance(call, dict) for call in (plain if isinstance(plain, list) else [plain])):
            raise RowError(f"message {index}: its {what} is no call ({{name, arguments}})")
        made = [one for call in (plain if isinstance(plain, list) else [plain]) for one in _one_call(call, index, unused)]
        if result and [call["function"] for call in result] != [call["function"] for call in made]:
            raise RowError(f"message {index} has tool_calls and {what}, which differ")
        result = result or made
    return result


def _one_call(call: dict[str, Any], index: int, unused: list[str]) -> list[dict[str, Any]]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"message {index}: a tool call has no function name")
    arguments = function.get("arguments") if function.get("arguments") is not None else function.get("parameters")
    arguments = arguments or {}
    if isinstance(arguments, dict):
        unused += [f"tool_calls[].arguments.{path}: null" for path in _nulls(arguments)]  # meant, or another row's key
    if isinstance(arguments, str):
        arguments = as_json(arguments, f"message {index}: arguments of {function['name']}") or {}
    if not isinstance(arguments, dict):
        raise RowError(f"message {index}: arguments of {function['name']} are a {type(arguments).__name__}, not an object")
    if not isinstance(call.get("id"), str | None):
        raise RowError(f"message {index}: a tool call has an id that is a {type(call['id']).__name__}, not text")
    known = {"id", "type", "function", "name", "arguments", "parameters"}
    unused += [f"tool_calls[].{key}" for key, value in {**call, **function}.items() if key not in known and says(value)]
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return [{**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}]


def _nulls(given: dict[str, Any]) -> Iterator[str]:
    """Where an object holds null, in objects inside it as well."""
    for key, value in given.items():
        if value is None:
            yield key
        elif isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _nulls(value))


def as_json(text: str, what: str) -> Any:
    """What JSON text holds.

    Raises:
        RowError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} is no valid JSON") from None
