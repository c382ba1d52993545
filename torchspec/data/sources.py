"""Where rows come from: files, folders, hub data sets.

A source is a file (``files.KINDS``), a folder of them (``folder:split`` where it has several), or a hub data set
``org/name`` or ``org/name:split``. Several may be mixed: a table of source → how many times each of its conversations
is trained an epoch. Reading only finds the rows and says where each one is; ``conversations.parse`` judges them.
Whatever reads rows for a command reads them through this.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from torchspec.data.files import READABLE, identity, kind_of, list_folder, of_split, stem_of
from torchspec.data.rows import BROKEN, Rows, file_rows, plain_rows
from torchspec.errors import UserError
from torchspec.files import FETCH, is_pointer
from torchspec.proxies import through_to_hub

Given = str | Sequence[str] | Mapping[str, float]
"""What a user may write for data: one source, several, or several with weights."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.:+\[\]%-]+)?")
_SPLIT = re.compile(r"(.+?):([^:/\[]+(?:\[.*\].*)?)", re.DOTALL)
"""A folder and its split; of a slice (``train[:10%]``) that is all behind the folder."""
_CHUNK = 1 << 22
warn: Callable[[str], None] = logging.getLogger(__name__).warning
"""Says what is not read, where a command has nothing of its own to say it with."""


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
    compression: str = ""
    """gz, bz2, xz or zst."""
    given: str = ""
    """What the user named: the file, or the folder that it was found in."""

    @property
    def folder(self) -> Path:
        """What paths in its rows are relative to: the file's folder, or the one that the command runs in."""
        return Path.cwd() if self.kind == "hub" else Path(self.name).expanduser().resolve().parent


def find_sources(given: Given, *, config_key: str, written: Sequence[Path] = (), say: Callable[[str], None] = warn) -> list[Source]:
    """The sources that the user named.

    Args:
        given: a file, folder or hub id (with ``:split``, default train), or several.
        config_key: the config key, for errors.
        written: outputs of the command: left out of folders, refused as a source themselves.
        say: takes a line a folder about what in it is not read.

    Raises:
        UserError: when one does not exist, is there twice, or a folder holds nothing readable.
    """
    return [source for source, _ in weighted_sources(given, config_key=config_key, written=written, say=say)]


def weighted_sources(given: Given, *, config_key: str, written: Sequence[Path] = (), say: Callable[[str], None] = warn) -> list[tuple[Source, float]]:
    """:func:`find_sources` with the weight of each (1 where none is given).

    Raises:
        UserError: also for a weight that is not above 0, or has no end.
    """
    pairs = _named(given)
    if not pairs:
        raise UserError(config_key, given, "is empty", "give a conversation file, a folder of them, or a hub dataset id")
    for name, weight in pairs:
        if not 0 < weight < math.inf:
            raise UserError(f"{config_key}.{name}", weight, "is no weight", "use a number above 0: how many times an epoch its conversations are trained")
    found = [(source, float(weight)) for name, weight in pairs for source in _find(name, config_key, written, say)]
    seen: dict[tuple[int, int] | str, Source] = {}
    for source, _ in found:
        key = source.name if source.kind == "hub" else identity(Path(source.name).expanduser()) or source.name
        if key in seen:
            also = f" (as {seen[key].name})" if seen[key].name != source.name else ""
            raise UserError(config_key, source.name, f"is named twice{also}", "name it once; a weight trains it more often ({name: 2})")
        seen[key] = source
    return found


def _named(given: Given) -> list[tuple[str, float]]:
    if isinstance(given, str):
        return [(given, 1.0)]
    return list(given.items()) if isinstance(given, Mapping) else [(name, 1.0) for name in given]


def check_outside(output: Path, given: Given, *, field: str) -> None:
    """Refuse an output folder inside a folder that it is made from: its files would be read as rows.

    Args:
        output: there or not.
        given: what it is made from.
        field: of the output.

    Raises:
        UserError: naming both.
    """
    met = identity(next(path for path in (output, *output.absolute().parents) if path.exists()))
    for name, _ in _named(given):
        path = _folder_of(name)[0]
        if path.is_dir() and met in list_folder(path).seen:
            raise UserError(field, str(output), f"lies in its own input {name}", "give a folder outside of it")


def _folder_of(name: str) -> tuple[Path, str | None]:
    """(path, split) of what a user wrote: ``folder:split`` where the folder is there, and nothing is there under the whole name."""
    path = Path(name).expanduser()
    match = _SPLIT.fullmatch(name)
    if match is not None and not path.exists() and Path(match[1]).expanduser().exists():
        return Path(match[1]).expanduser(), match[2]
    return path, None


def _find(name: str, config_key: str, written: Sequence[Path], say: Callable[[str], None]) -> list[Source]:
    if not name.strip():
        raise UserError(config_key, name, "is empty", "give a conversation file, a folder of them, or a hub dataset id")
    path, split = _folder_of(name)
    if split is not None and "[" in split:
        raise UserError(
            config_key, name, "names a slice of a file or folder", "hub data sets have slices; give a weight ({name: 0.1}), or a file of these rows"
        )
    if path.is_file():
        if split is not None:
            raise UserError(config_key, name, "names a split of a file", f"leave out :{split}; folders and hub data sets have splits")
        if kind_of(path.name) is None:
            raise UserError(config_key, name, f"is a {''.join(path.suffixes[-2:]) or 'suffix-less'} file", f"give one of {READABLE}")
        if identity(path) in [identity(output) for output in written]:
            raise UserError(config_key, name, "is also the output", "give another output")
        return [_file_source(path, name, name, config_key)]
    if path.is_dir():
        listing = list_folder(path, written=written)
        told = listing.told()
        if not listing.files:
            raise UserError(config_key, name, f"is a folder without anything to read{told and f' ({told})'}", f"give one with {READABLE}")
        files = of_split(listing, split, name=name if split is None else name.removesuffix(f":{split}"), config_key=config_key)
        if told:
            say(f"{config_key}: {name}: {told}")
        sources = [_file_source(file, str(file), name, config_key) for file in files]
        if doubtful := _alike(sources):
            say(f"{config_key}: {name}: all of these are read: {doubtful}")
        return sources
    if path.exists():
        raise UserError(config_key, name, "is no file and no folder", "write it to a file: it is read several times")
    if path.is_symlink():
        raise UserError(config_key, name, "is a link that leads nowhere", "mend the link, or give the file")
    if "://" in name:
        fix = "copy the data here first, or give a hub dataset by its id (org/name)"
        raise UserError(config_key, name, "is a URL, and nothing is fetched by URL", fix)
    if re.search(r"[*?]", name):
        raise UserError(config_key, name, "does not exist (patterns are not expanded)", "give the folder, or a list of files")
    if kind_of(path.name) is not None or not _HUB_ID.fullmatch(name):
        raise UserError(config_key, name, "does not exist", "check the path; it is taken relative to the folder the command runs in")
    dataset = _load_hub(name, config_key)
    return [Source(name, "hub", str(dataset._fingerprint), len(dataset), given=name)]


def _alike(sources: Sequence[Source]) -> str:
    """Files that may be forms of one: with the same bytes, or one name and several suffixes; "" for none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        path = Path(source.name)
        groups.setdefault(("the same bytes", source.fingerprint), []).append(path.name)
        groups.setdefault(("one name", str(path.with_name(stem_of(path.name)))), []).append(path.name)
    said = dict.fromkeys(f"{', '.join(names)} ({why})" for (why, _), names in groups.items() if len(names) > 1)
    return "; ".join(list(said)[:10])


def _file_source(path: Path, name: str, given: str, config_key: str) -> Source:
    digest = xxhash.xxh3_128()
    lines = 0
    try:
        pointer = is_pointer(path)
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
                lines += chunk.count(b"\n")
    except OSError as error:
        raise UserError(config_key, name, f"cannot be read ({error.strerror})", "check its permissions") from error
    if pointer:
        raise UserError(config_key, name, "is a pointer of Git LFS, not the data", FETCH)
    kind, compression = kind_of(path.name) or ("", "")
    known = kind == "jsonl" and not compression
    return Source(name, kind, f"xxh3:{digest.hexdigest()}", lines if known else None, compression, given)


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


def read_rows(source: Source, *, config_key: str) -> Rows:
    """Every row as JSON text with its place: the line of a text file (from 1), or the row's number (from 1).

    Nothing is judged here: broken JSON lines come through as they are.

    Raises:
        UserError: when a file as a whole is unreadable.
    """
    rows = _hub_rows(source.name, config_key) if source.kind == "hub" else file_rows(Path(source.name).expanduser(), source.kind, source.compression)
    number = 0
    while True:
        try:
            row, number = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except BROKEN as error:
            what = f"{source.kind}.{source.compression}".removesuffix(".")
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(config_key, source.name, f"cannot be read as {what} (after row {number}: {reason})", "mend or convert the file") from error
        yield row, number


def _hub_rows(name: str, config_key: str) -> Iterator[tuple[bytes, int]]:
    """As tables, which neither decode images nor fill in what a row lacks."""
    number = 0
    for table in _load_hub(name, config_key).with_format("arrow").iter(batch_size=1024):
        for row in plain_rows(table):
            number += 1
            yield row, number
