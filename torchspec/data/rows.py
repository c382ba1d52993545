"""Rows of one file as JSON text, without holding more than a piece of it.

Lines are given on as they are, so that a broken one costs a row; a line may be an array of rows. A file may also be an
array over lines, several arrays or objects one after the other, or objects with a list of rows (``{"data": [...]}``).
Columns of parquet and
arrow files have one type for all rows, so a struct has the keys of all of them, null where a row has none: these are
left out.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 1 << 22
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_HEAD = 1 << 20
"""Bytes that tell what form a file of JSON has."""
_WRAPPED = re.compile(r'\{\s*"(data|rows|records|examples|instances|items|samples|train)"\s*:\s*\[(?=\s*[{\]])')
Rows = Iterator[tuple[bytes, int]]
"""Each row as JSON text, with its line or its number (from 1)."""
BROKEN = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError)
"""What a file that cannot be read as a whole raises (UnicodeDecodeError and ArrowInvalid are ValueErrors)."""


def file_rows(path: Path, kind: str, compression: str) -> Rows:
    """Every row of a file.

    Args:
        path: of the file.
        kind: jsonl, json, parquet or arrow.
        compression: gz, bz2, xz, zst or "".

    Raises:
        one of ``BROKEN``: the file as a whole is unreadable.
    """
    if kind in ("parquet", "arrow"):
        number = 0
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            for row in plain_rows(batch):
                number += 1
                yield row, number
        return
    compression = _compression(path, compression)
    with _opened(path, compression) as handle:
        head = handle.read(_HEAD)
    if head[:2] in _UTF16:
        raise ValueError("it is UTF-16, not UTF-8")
    with _opened(path, compression) as handle:
        if not _is_lines(head) and (kind == "json" or b"\n" in head or head.lstrip(_BOM + b" \t\r")[:1] == b"["):
            yield from _values(io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""))
            return
        for line, text in enumerate(handle, start=1):
            text = text.removeprefix(_BOM).strip()
            if text.startswith(b"["):
                yield from ((row, line) for row in _array(text))
            elif text:
                yield text, line


def _compression(path: Path, named: str) -> str:
    """How a text file is compressed by its first bytes, whatever its name says: tools pack and unpack files without renaming them."""
    with path.open("rb") as handle:
        head = handle.read(6)
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    return found or ("" if head.removeprefix(_BOM).lstrip()[:1] in (b"{", b"[") else named)


def _array(line: bytes) -> Iterator[bytes]:
    """Rows of a line that holds an array of them; the line itself where it is broken, or the array is one conversation's messages."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    if given and all(isinstance(one, dict) and not one.keys() & {"role", "from"} for one in given):
        text = line.decode("utf-8", "surrogatepass")
        yield from _elements(_Text(io.StringIO(text[1:])))
    elif given != []:
        yield line


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[io.BufferedReader]:
    if compression == "zst":
        import pyarrow as pa

        raw: Any = pa.input_stream(str(path), compression="zstd")
    elif compression:
        raw = gzip.open(path) if compression == "gz" else bz2.open(path) if compression == "bz2" else lzma.open(path)
    else:
        raw = path.open("rb", buffering=0)
    with raw, io.BufferedReader(cast(Any, raw), buffer_size=_HEAD) as handle:
        yield handle


# -- JSON


def _is_lines(head: bytes) -> bool:
    """Whether a .json file that begins so has a row a line; one whose first line is broken has."""
    text = head.decode("utf-8-sig", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        return False
    first, newline, _ = text.partition("\n")
    decoder = json.JSONDecoder()
    try:
        value, end = decoder.raw_decode(first)
        return not first[end:].strip() and not (isinstance(value, dict) and len(value) == 1 and _WRAPPED.match(first))
    except (ValueError, RecursionError):
        pass
    if not newline:
        return len(head) < _HEAD
    try:
        decoder.raw_decode(text)
    except json.JSONDecodeError as error:
        return not (len(head) >= _HEAD and error.pos >= len(text) - 16) and not _WRAPPED.match(text)
    except RecursionError:
        return True
    return False


class _Text:
    """The text of a file, of which a few megabytes are held."""

    def __init__(self, handle: IO[str]) -> None:
        self._handle, self._decoder = handle, json.JSONDecoder()
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Read on; False at the end."""
        piece = self._handle.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not piece
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def next(self, also: str = "") -> str:
        """The next character that is no space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n" + also:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> bytes:
        """The JSON value that begins here."""
        while True:
            try:
                end = self._decoder.raw_decode(self.text, self.at)[1]
                if end < len(self.text) or self.ended:  # a number at the end may go on in the next piece
                    piece, self.at = self.text[self.at : end], end
                    return piece.encode("utf-8", "surrogatepass")
            except ValueError:
                if self.ended:
                    raise
            self.more()

    def wrapped(self) -> str:
        """The key of an object that begins here and holds rows, which are then next; "" for another object."""
        while len(self.text) - self.at < 1024 and self.more():
            pass
        match = _WRAPPED.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[1]


def _values(handle: IO[str]) -> Rows:
    text, number, wrapped = _Text(handle), 0, True
    try:
        while first := text.next(also="\ufeff"):
            if first == "[" or (first == "{" and wrapped and (key := text.wrapped())):
                text.at += first == "["
                for row in _elements(text):
                    number += 1
                    yield row, number
                if first == "{":
                    if text.next() != "}":
                        raise ValueError(f"something stands beside the rows in {key!r}")
                    text.at += 1
            elif first == "{":
                row, wrapped = text.value(), False
                number += 1
                yield row, number
            else:
                raise ValueError(f"{first!r} stands where a row should begin")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no valid JSON after row {number}: {error}") from error


def _elements(text: _Text) -> Iterator[bytes]:
    """Elements of an array behind its bracket, which is passed over with the one that ends it."""
    if text.next() == "]":
        text.at += 1
        return
    while True:
        if not text.next():
            raise ValueError("the array has no end")
        yield text.value()
        after = text.next()
        text.at += 1
        if after == "]":
            return
        if after != ",":
            raise ValueError(f"{after!r} stands where a comma should be" if after else "the array has no end")
        if text.next() == "]":
            raise ValueError("a comma stands before the end of the array")


# -- tables


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1024)


def _arrow(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as memory:
        try:
            reader: Any = pa.ipc.open_stream(memory)
            yield from reader
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(memory)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))


def plain_rows(table: Any) -> Iterator[bytes]:
    """Rows of an Arrow table or batch as JSON text, without the nulls that a struct's other rows put there.

    Raises:
        ValueError: two columns of one name.
    """
    names = table.schema.names
    if len(set(names)) != len(names):
        raise ValueError(f"it has two columns of one name among {', '.join(names)}")
    converters = {column.name: _converter(column.type) for column in table.schema}
    for row in table.to_pylist():
        plain = {name: value if (convert := converters[name]) is None or value is None else convert(value) for name, value in row.items()}
        yield json.dumps(plain, default=_text, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes a Python value of this type what its row meant; None where it is that already. Not given None."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return json.loads
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: _converter(kind.field(i).type) for i in range(kind.num_fields)}
        return lambda given: {name: _apply(fields[name], value) for name, value in given.items() if value is not None}
    if pa.types.is_map(kind):
        item = _converter(kind.item_type)
        return lambda given: {str(name): _apply(item, value) for name, value in given}
    if any(of(kind) for of in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_large_list_view)):
        inner = _converter(kind.value_type)
        return None if inner is None else lambda given: [_apply(inner, value) for value in given]
    return None


def _apply(convert: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if convert is None or value is None else convert(value)


def _text(value: Any) -> str:
    """What JSON has no form for: bytes (images) as base64, the rest as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
