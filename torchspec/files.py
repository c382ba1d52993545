"""Single files that a command or a run writes: replaced whole, and only where what stands there was written by us.

A file counts as ours by what is inside (:func:`json_with`, :func:`lines_with`, :func:`begins_with`); an empty one holds nothing to lose. A file that the user
named is refused where it is somebody else's (:func:`refuse_foreign`); one that a run names itself gets another name beside it (:func:`spare_name`).
What is JSON stays JSON: it knows no NaN and no infinity, which become null.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchspec.errors import UserError

Ours = Callable[[Path], bool]
"""Whether a file that is there was written by us."""


_POINTER = b"version https://git-lfs.github.com/spec/"
FETCH = "run git lfs pull in its repository, or download the file"
"""What to do about a pointer."""


def dumps(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """JSON of plain values; numbers that JSON cannot say (NaN, infinity) become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name if not isinstance(name, float) or math.isfinite(name) else str(name): _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS keeps in the place of a large one that was not fetched.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as handle:
        return handle.read(len(_POINTER)) == _POINTER


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole: a crash leaves the old one or the new one. A link stays, and what it points to is replaced; a device is written to.

    Raises:
        OSError: no room, or no permission.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # /dev/stdout; of a folder the error
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """What a new file's permissions lack (there is no way to ask without setting it)."""
    now = os.umask(0o077)
    os.umask(now)
    return now


def is_replaceable(path: Path, ours: Ours) -> bool:
    """Whether nothing of the user's is lost when ``path`` is written: it is not there, empty, a device, or ours."""
    if not path.exists():
        return True
    if path.is_dir():
        return False
    if not path.is_file():
        return True
    return path.stat().st_size == 0 or ours(path)


def refuse_foreign(path: Path, ours: Ours, *, field: str, what: str) -> None:
    """Refuse to write over somebody else's file.

    Args:
        path: that the user named.
        ours: knows what we wrote.
        field: the option that named it.
        what: of what kind our own is, such as "acceptance report".

    Raises:
        UserError: it is there and not ours.
    """
    if path.is_dir():
        raise UserError(field, str(path), "is a folder", "give a file")
    if not is_replaceable(path, ours):
        raise UserError(field, str(path), f"is there and is no {what} written by this command: it is left as it is", "give another file, or move this one away")


def spare_name(path: Path, ours: Ours) -> Path:
    """``path``, or the first of ``NAME-1.json``, ``NAME-2.json``, ... beside it that is free or ours."""
    found, number = path, 0
    while not is_replaceable(found, ours):
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def json_with(*keys: str) -> Ours:
    """Knows a file that holds one JSON object with these keys."""

    def ours(path: Path) -> bool:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and set(keys) <= found.keys()

    return ours


def lines_with(*keys: str) -> Ours:
    """Knows a file of which every line is a JSON object with these keys; a last line without its end may be torn."""

    def ours(path: Path) -> bool:
        try:
            with path.open("rb") as handle:
                for line in handle:
                    if not line.strip():
                        continue
                    try:
                        found = json.loads(line)
                    except (ValueError, RecursionError):
                        return not line.endswith(b"\n") and handle.tell() > len(line)
                    if not isinstance(found, dict) or not set(keys) <= found.keys():
                        return False
        except OSError:
            return False
        return True

    return ours


def begins_with(text: str) -> Ours:
    """Knows a file by its first characters."""
    head = text.encode()

    def ours(path: Path) -> bool:
        try:
            with path.open("rb") as handle:
                return handle.read(len(head)) == head
        except OSError:
            return False

    return ours
