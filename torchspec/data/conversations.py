"""Where conversations come from, and what one row may look like.

A source is a file (.jsonl, .json as an array or as lines, .parquet, .arrow), a folder of them, or a hub dataset ``org/name`` or ``org/name:split``. Reading
only finds the rows and says where each one is; ``parse`` judges a single row, so that it can run in many processes and a bad row costs one line of a report,
not the run.

A row holds ``conversations`` or ``messages``: ``{role, content}`` (OpenAI) or ``{from, value}`` (ShareGPT); or tokens: ``input_ids`` with ``loss_mask``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from torchspec.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
MESSAGE_KEYS = ("conversations", "messages")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "user": "user", "assistant": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_KEPT_KEYS = ("tool_calls", "tool_call_id", "name")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.\[\]%-]+)?")


class RowError(Exception):
    """A row that cannot be used; the message says why. Counted, and reported with its place."""


@dataclass(frozen=True)
class Conversation:
    """One usable row: messages to render, or tokens that were rendered elsewhere."""

    messages: tuple[dict[str, Any], ...] = ()
    """``{role, content, ...}`` in OpenAI's form."""
    tools: list[dict[str, Any]] | None = None
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None
    cut: frozenset[int] = field(default_factory=frozenset)
    """Indices of messages that a length limit ended (``finish: length``): no end token was generated."""


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub dataset."""

    name: str
    """Path or hub id, as the user gave it; reports put the row number behind it."""
    kind: str
    """jsonl, json, parquet, arrow or hub."""
    fingerprint: str
    """Changes when the content does: XXH3 of a file's bytes, or the hub dataset's own fingerprint."""


def find_sources(given: str | Sequence[str], *, config_key: str) -> list[Source]:
    """The sources that the user named.

    Args:
        given: a file, folder or hub id (with ``:split``, default train), or several.
        config_key: the config key, for errors.

    Raises:
        UserError: when one does not exist, or a folder holds nothing readable.
    """
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise UserError(config_key, given, "is empty", "give a conversation file, a folder of them, or a hub dataset id")
    return [source for name in names for source in _find(name, config_key)]


def _find(name: str, config_key: str) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(config_key, name, f"is a {path.suffix or 'suffix-less'} file", f"give one of {', '.join(SUFFIXES)}")
        return [_file_source(path, name)]
    if path.is_dir():
        only = ".arrow" if (path / "dataset_info.json").is_file() and (path / "state.json").is_file() else None
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES and only in (None, p.suffix) and not p.name.startswith("."))
        if not files:
            raise UserError(config_key, name, f"is a folder without any {', '.join(SUFFIXES)} file", "check the folder")
        return [_file_source(p, str(p)) for p in files]
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(name):
        raise UserError(config_key, name, "does not exist", "check the path; it is taken relative to the folder the command runs in")
    fingerprint = str(_load_hub(name, config_key)._fingerprint)
    return [Source(name, "hub", fingerprint)]


def _file_source(path: Path, name: str) -> Source:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise UserError("data", name, f"cannot be read ({error.strerror})", "check its permissions") from error
    return Source(name, path.suffix[1:], f"xxh3:{digest.hexdigest()}")


def _load_hub(name: str, config_key: str) -> Any:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the hub client raises a dozen kinds
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            config_key,
            name,
            f"is no local file or folder, and no hub dataset that loads ({reason})",
            "check the path or the id (org/name:split), and the network",
        ) from error


def read_rows(source: Source, *, config_key: str) -> Iterator[tuple[bytes, int]]:
    """Every row as JSON text with its place: the line of a text file (from 1), or the row's number (from 1).

    Nothing is judged here: broken JSON lines come through as they are.

    Raises:
        UserError: when a file as a whole is unreadable.
    """
    if source.kind == "hub":
        yield from _numbered(_load_hub(source.name, config_key))
        return
    path = Path(source.name).expanduser()
    if source.kind == "json" and _starts_with_bracket(path):
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(config_key, source.name, f"is no valid JSON ({error})", "mend the file") from error
        yield from _numbered(rows)
    elif source.kind in ("json", "jsonl"):
        with path.open("rb") as handle:
            for line, text in enumerate(handle, start=1):
                text = text.removeprefix(b"\xef\xbb\xbf").strip()
                if text:
                    yield text, line
    else:
        try:
            yield from _numbered(_parquet(path) if source.kind == "parquet" else _arrow(path))
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(
                config_key, source.name, f"cannot be read as {source.kind} ({str(error).splitlines()[0][:160]})", "mend or convert the file"
            ) from error


def _numbered(rows: Any) -> Iterator[tuple[bytes, int]]:
    for number, row in enumerate(rows, start=1):
        yield json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass"), number


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as memory:
        try:
            reader = pa.ipc.open_stream(memory)
            batches: Any = iter(reader)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(memory)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


def parse(text: bytes, *, messages_key: str | None = None, need_answer: bool = True) -> Conversation:
    """Judge one row.

    Args:
        text: the row as JSON.
        messages_key: column of the messages; None takes ``conversations`` or ``messages``.
        need_answer: False also takes prompts: rows without an assistant message, and rows with only a ``prompt``.

    Raises:
        RowError: saying what is wrong with the row.
    """
    try:
        row = json.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise RowError(f"is no valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise RowError(f"is a {type(row).__name__}, not an object")
    if row.get("input_ids") is not None and messages_key is None:
        return _tokens(row)
    if not need_answer and messages_key is None and isinstance(row.get("prompt"), str):
        return Conversation(messages=({"role": "user", "content": row["prompt"]},))
    key = messages_key or next((k for k in MESSAGE_KEYS if row.get(k) is not None), None)
    if key is None or row.get(key) is None:
        raise RowError(f"has no {messages_key or ' or '.join(MESSAGE_KEYS)} (keys: {', '.join(map(str, row)) or 'none'})")
    given = row[key]
    if not isinstance(given, list) or not given:
        raise RowError(f"{key} is not a list of messages")
    messages = tuple(_message(message, i) for i, message in enumerate(given))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers and need_answer:
        raise RowError("has no assistant message")
    cut = {i for i, message in enumerate(given) if message.get("finish") == "length"}
    if row.get("finish") == "length" and answers:
        cut.add(answers[-1])
    return Conversation(messages=messages, tools=_tools(row.get("tools")), cut=frozenset(cut))


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
    return Conversation(input_ids=ids, loss_mask=[int(m) for m in mask])


def _message(given: Any, index: int) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RowError(f"message {index} is a {type(given).__name__}, not an object")
    if "role" in given:
        role, content = given["role"], given.get("content")
        if role not in ROLES:
            raise RowError(f"message {index} has the unknown role {role!r} (known: {', '.join(ROLES)})")
    elif "from" in given:
        if given["from"] not in SHAREGPT_ROLES:
            raise RowError(f"message {index} has the unknown role {given['from']!r} (known: {', '.join(SHAREGPT_ROLES)})")
        role, content = SHAREGPT_ROLES[given["from"]], given.get("value")
    else:
        raise RowError(f"message {index} has neither role nor from")
    message: dict[str, Any] = {"role": role, "content": _content(content, index, may_be_empty=bool(given.get("tool_calls")))}
    message.update({key: given[key] for key in _KEPT_KEYS if given.get(key) is not None})
    reasoning = next((given[key] for key in REASONING_KEYS if given.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message


def _content(content: Any, index: int, *, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    shown = "missing" if content is None else f"a {type(content).__name__} that is not plain text"
    raise RowError(f"message {index}: its content is {shown}")


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("tools is no valid JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of objects")
    return tools
