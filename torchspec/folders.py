"""A folder that an export writes: it appears whole or not at all, and takes the place of an earlier export alone.

Every folder that we publish holds a mark, ``.torchspec.json``, with the size and hash of each of its files. A folder may be replaced when it is empty or all
that is in it stands in its mark, unchanged: notes beside a draft, an edited README, a model somebody gave as output by mistake are named and stay.

A folder takes another's place in one step (``renameat2`` with RENAME_EXCHANGE; two renames where the file system has no such call, of which
:func:`workplace` undoes a first without its second). One that cannot be renamed, since it is a mount or the folder that the command runs in, is filled in
place: its ``config.json``, without which no server takes it for a model, goes first and comes last.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from torchspec import __version__
from torchspec.errors import UserError
from torchspec.files import dumps

MARK = ".torchspec.json"
_PARTIAL, _PREVIOUS = ".torchspec-partial-", ".torchspec-previous"
_FIRST = "config.json"
_SIGNED = "Written by TorchSpec"
"""In the card of every export."""
_EXCHANGE = 2
_AT_FDCWD = -100
_CHUNK = 1 << 22
_SHOWN = 5


def in_the_way(folder: Path) -> list[str]:
    """Names in a folder that no export of ours wrote, or that were changed since; empty for a folder that may be replaced.

    Raises:
        OSError: it cannot be read.
    """
    if not folder.exists():
        return []
    marked = _marked(folder)
    if marked is None:
        return sorted(path.name for path in folder.iterdir() if not _is_workplace(path))
    found = []
    for name in _names(folder):
        path = folder / name
        if name == MARK and not path.is_symlink():
            continue
        if name not in marked or path.is_symlink() or not path.is_file():
            found.append(name)
        elif digest(path) not in marked[name]:
            found.append(f"{name} (changed since)")
    return found


def _names(folder: Path) -> list[str]:
    """Of everything in a folder, and in folders in it (those alone that are empty), but for workplaces of ours."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            below = [] if _is_workplace(path) else [f"{path.name}/{name}" for name in _names(path)] or [f"{path.name}/"]
            found += below
        else:
            found.append(path.name)
    return found


def check_output(folder: Path, *, field: str, reads: Path | None = None) -> Path:
    """Where an export goes, links resolved; whatever is there may be replaced.

    Args:
        folder: as the user named it.
        field: the option that named it.
        reads: what the command reads: its own input is no output.

    Raises:
        UserError: a file, a folder with anything that no export wrote, the input itself.
    """
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise UserError(field, str(folder), "is a file", "give a folder")
    if reads is not None and place.is_dir() and reads.exists() and (place.samefile(reads) or (reads.is_file() and place.samefile(reads.parent))):
        raise UserError(field, str(folder), "is what is read", "give another folder")
    try:
        names = in_the_way(place)
    except OSError as error:
        raise UserError(field, str(folder), f"cannot be read ({error.strerror})", "give another folder, or mend its permissions") from error
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        fix = "give a new or empty folder, or move these files away; an export replaces only what an export wrote"
        if _marked(place) is None and _SIGNED in _card(place):
            fix = "if it is an export of an earlier TorchSpec, which left no mark, and you need it no more, remove it; else give a new or empty folder"
            raise UserError(field, str(folder), f"holds files that may be yours: {shown}", fix)
        raise UserError(field, str(folder), f"holds what no export wrote: {shown}", fix)
    return place


def _card(folder: Path) -> str:
    """Its README, or nothing."""
    try:
        return (folder / "README.md").read_text(errors="replace")
    except OSError:
        return ""


def digest(file: Path) -> str:
    """Size and XXH3 of a file."""
    running = xxhash.xxh3_64()
    size = 0
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            running.update(chunk)
            size += len(chunk)
    return f"{size}:{running.hexdigest()}"


def _marked(folder: Path) -> dict[str, list[str]] | None:
    """What the mark of a folder says of its files; None without a mark."""
    try:
        plain = json.loads((folder / MARK).read_bytes())
        return {str(name): [str(one) for one in digests] for name, digests in plain["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def mark(folder: Path) -> None:
    """Write down what a folder holds, and have all of it on the disk.

    Args:
        folder: its files finished.
    """
    _write_mark(folder / MARK, {name: [digest(folder / name)] for name in _names(folder) if name != MARK and not name.endswith("/")})
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _write_mark(file: Path, files: dict[str, list[str]]) -> None:
    file.write_text(dumps({"written_by": f"TorchSpec {__version__}", "files": files}, indent=1) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove what an export wrote, by its mark; anything else stays, and the folder with it."""
    marked = _marked(folder) or {}
    for name, digests in marked.items():
        path = folder / name
        if path.is_file() and not path.is_symlink() and digest(path) in digests:
            path.unlink()
            _drop_empty(path.parent, within=folder)
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {MARK}:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def _drop_empty(folder: Path, *, within: Path) -> None:
    while folder != within and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


@contextmanager
def workplace(place: Path, *, field: str) -> Iterator[Path]:
    """A new folder to write in; once the body is through it takes the place of ``place``, and with an error it goes.

    What a killed export left beside it is cleared away first.

    Args:
        place: from :func:`check_output`.
        field: the option that named it.

    Raises:
        OSError: no room, or no permission.
        UserError: something of the user's came there meanwhile.
    """
    beside = _movable(place)
    home = place.parent if beside else place
    if beside:
        home.mkdir(parents=True, exist_ok=True)
        _recover(place)
    stem = f".{place.name}{_PARTIAL}" if beside else _PARTIAL
    for left in [path for path in home.iterdir() if path.name.startswith(stem)]:
        _sweep(left)
    made = home / f"{stem}{os.getpid()}"
    made.mkdir()
    try:
        (made / MARK).write_text(dumps({"unfinished": True, "host": socket.gethostname(), "pid": os.getpid()}))
        yield made
        mark(made)
        check_output(place, field=field)
        if beside:
            _take_place(made, place)
        else:
            _fill(made, place)
    finally:
        if made.is_dir():  # half of an export, or what it took the place of
            _drop(made)


def _movable(place: Path) -> bool:
    """Whether a folder may go and another come under its name."""
    if not place.exists():
        return True
    here = Path(os.path.realpath("."))
    return not (os.path.ismount(place) or place == here or place in here.parents or not os.access(place.parent, os.W_OK))


def _is_workplace(path: Path) -> bool:
    return path.name.startswith(_PARTIAL) and path.is_dir() and (path / MARK).is_file()


def _mark_of(folder: Path) -> dict[str, Any]:
    try:
        plain = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _drop(folder: Path) -> None:
    """Remove a workplace: all of an unfinished one, which nobody else writes to, and of a finished one what its mark names."""
    if _mark_of(folder).get("unfinished"):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove(folder)


def _sweep(left: Path) -> None:
    """Clear away the workplace of an export that was killed."""
    said = _mark_of(left)
    if said.get("unfinished") and (said.get("host") != socket.gethostname() or _is_alive(said.get("pid"))):
        return  # at work, or on a host that we cannot ask
    if said:
        _drop(left)


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError):
        return True
    return int(pid) != os.getpid()


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}{_PREVIOUS}")


def _recover(place: Path) -> None:
    """Put back a folder that stepped aside for one that never came (:func:`_take_place` without RENAME_EXCHANGE)."""
    previous = _aside(place)
    if _marked(previous) is not None:
        if place.exists():
            remove(previous)
        else:
            previous.rename(place)


def _take_place(made: Path, place: Path) -> None:
    """Give a finished folder its name; what had it stays under the name of ``made``, to be removed."""
    if not place.exists() or not any(place.iterdir()):
        os.replace(made, place)  # over nothing, or an empty folder
    elif not _exchange(made, place):
        previous = _aside(place)
        place.rename(previous)
        made.rename(place)
        previous.rename(made)
    _sync(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _fill(made: Path, place: Path) -> None:
    """Move the files of a finished folder into one that must stay."""
    before, after = _marked(place) or {}, _marked(made) or {}
    union = {name: [*after.get(name, []), *before.get(name, [])] for name in before | after}
    _write_mark(made / f"{MARK}.both", union)  # killed on the way, it is still known as ours
    os.replace(made / f"{MARK}.both", place / MARK)
    (place / _FIRST).unlink(missing_ok=True)
    for name in sorted(before.keys() - after.keys()):
        (place / name).unlink(missing_ok=True)
        _drop_empty((place / name).parent, within=place)
    for name in sorted(after, key=lambda name: name == _FIRST):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, place / name)
    os.replace(made / MARK, place / MARK)
    _sync(place)
    shutil.rmtree(made)
