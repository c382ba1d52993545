"""Where rows come from: files, folders, hub datasets; and how they are read without holding more than a piece of them.

A source is a file (.jsonl, .json as an array or as lines, .parquet, .arrow), a folder of them, or a hub dataset ``org/name`` or ``org/name:split``. Several
may be mixed: a table of source → how many times each of its conversations is trained an epoch. Reading only finds the rows and says where each one is;
``conversations.parse`` judges them.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from torchspec.errors import UserError
from torchspec.proxies import through_to_hub

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
Given = str | Sequence[str] | Mapping[str, float]
"""What a user may write for data: one source, several, or several with weights."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.:+\[\]%-]+)?")
_CHUNK = 1 << 22
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub dataset."""

    name: str
    """Path or hub id, as the user gave it; reports put the row number behind it."""
    kind: str
    """jsonl, json, parquet, arrow or hub."""
    fingerprint: str
    """Changes when the content does: XXH3 of a file's bytes, or the hub dataset's own fingerprint."""
    lines: int | None = None
    """About how many rows there are, for the progress bar; None where finding out means reading it all."""

    @property
    def folder(self) -> Path:
        """What paths in its rows are relative to: the file's folder, or the one that the command runs in."""
        return Path.cwd() if self.kind == "hub" else Path(self.name).expanduser().resolve().parent


def find_sources(given: Given, *, config_key: str) -> list[Source]:
    """The sources that the user named.

    Args:
        given: a file, folder or hub id (with ``:split``, default train), or several.
        config_key: the config key, for errors.

    Raises:
        UserError: when one does not exist, or a folder holds nothing readable.
    """
    return [source for source, _ in weighted_sources(given, config_key=config_key)]


def weighted_sources(given: Given, *, config_key: str) -> list[tuple[Source, float]]:
    """:func:`find_sources` with the weight of each (1 where none is given).

    Raises:
        UserError: also for a weight that is not above 0, or has no end.
    """
    named = {given: 1.0} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else [(name, 1.0) for name in given]
    pairs = list(named.items()) if isinstance(named, dict) else named
    if not pairs:
        raise UserError(config_key, given, "is empty", "give a conversation file, a folder of them, or a hub dataset id")
    for name, weight in pairs:
        if not 0 < weight < math.inf:
            raise UserError(f"{config_key}.{name}", weight, "is no weight", "use a number above 0: how many times an epoch its conversations are trained")
    return [(source, float(weight)) for name, weight in pairs for source in _find(name, config_key)]


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
    dataset = _load_hub(name, config_key)
    return [Source(name, "hub", str(dataset._fingerprint), len(dataset))]


def _file_source(path: Path, name: str) -> Source:
    digest = xxhash.xxh3_128()
    lines = 0
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
                lines += chunk.count(b"\n")
    except OSError as error:
        raise UserError("data", name, f"cannot be read ({error.strerror})", "check its permissions") from error
    return Source(name, path.suffix[1:], f"xxh3:{digest.hexdigest()}", lines if path.suffix == ".jsonl" else None)


def _load_hub(name: str, config_key: str) -> Any:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return encoded_images(datasets.load_dataset(repository, split=split or "train"))
    except Exception as error:  # the hub client raises a dozen kinds
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            config_key,
            name,
            f"is no local file or folder, and no hub dataset that loads{through_to_hub()} ({reason})",
            "check the path or the id (org/name:split), and the network",
        ) from error


def encoded_images(dataset: Any) -> Any:
    """The same data set with its images as they are stored ({bytes, path}), not as pixels."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


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
        yield from _array(path, source.name, config_key)
    elif source.kind in ("json", "jsonl"):
        with path.open("rb") as handle:
            for line, text in enumerate(handle, start=1):
                text = text.removeprefix(_BOM).strip()
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
        yield json.dumps(row, default=_plain, ensure_ascii=False).encode("utf-8", "surrogatepass"), number


def _plain(value: Any) -> str:
    """What JSON has no form for: bytes (images) as base64, the rest as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def _array(path: Path, name: str, config_key: str) -> Iterator[tuple[bytes, int]]:
    """Elements of one JSON array, of which a few megabytes are held at a time."""
    decoder = json.JSONDecoder()
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as handle:
            text = handle.read(_CHUNK)
            at = text.index("[") + 1
            while True:
                while at < len(text) and (text[at].isspace() or (text[at] == "," and number)):
                    at += 1
                if text[at : at + 1] == "]":
                    return
                try:
                    end = decoder.raw_decode(text, at)[1]
                    whole = end < len(text)  # a number at the end may go on in the next piece
                except ValueError:
                    whole = False
                if whole:
                    number += 1
                    yield text[at:end].encode("utf-8", "surrogatepass"), number
                    at = end
                    continue
                more = handle.read(max(_CHUNK, len(text)))
                if not more:
                    decoder.raw_decode(text, at)  # says what is wrong
                    raise ValueError("the array has no end")
                text, at = text[at:] + more, 0
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(config_key, name, f"is no valid JSON after row {number} ({error})", "mend the file") from error


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
