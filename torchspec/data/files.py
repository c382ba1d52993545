"""Which files of a folder are data, and of which split: everything else is told by name.

Hidden and backup files, files of other kinds, broken links and second names of a file are left out. What ``datasets``
saved (``save_to_disk``) is read by its own list of files. Splits are told by names as on the hub:
``data/SPLIT-00000-of-00003.parquet``, or a word for train, validation or test in a path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchspec.errors import UserError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""What a file holds, by its suffix in lower case."""
COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
"""A second suffix behind that of a text file."""
READABLE = f"{', '.join(KINDS)}; JSON also with {', '.join(COMPRESSIONS)} behind it"
KEYWORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val", "devset", "valset"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "tests", "testset", "evals", "evalset", "holdout", "heldout"), "test"),
}
"""Words in a path that tell a split: those of the hub (``datasets.data_files.SPLIT_KEYWORDS``), and others that are common for data kept apart."""
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_SAVED = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""JSON files of ``datasets`` that hold no rows."""
_NO_ROWS = frozenset(
    {
        *_SAVED,
        *("provenance.json", "failed_samples.jsonl", "bad_rows.jsonl"),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "preprocessor_config.json", "model.safetensors.index.json"),
    }
)
"""JSON files that never hold rows: of saved data sets, of runs, of models."""
_PASSING = ("__pycache__", "__MACOSX", "_temporary", "_delta_log", "_spark_metadata", "wandb", "mlruns", "node_modules")
"""Folders of programs' own, and of what they have not finished."""
_MODEL = ("config.json", "adapter_config.json", "params.json", "tokenizer_config.json")
"""Files of a model; a folder with one of them and with weights or a tokenizer is a model's, whatever else of JSON lies in it."""
_MODELS_TOO = re.compile(r"tokenizer(_config)?\.json|tekken\.json|(model|pytorch_model|adapter_model|consolidated).*\.(safetensors|bin|pth)|.*\.gguf")
_NAMED = 20
"""Names told in one line."""


@dataclass(frozen=True)
class Found:
    """One file of a folder."""

    path: Path
    split: str


@dataclass
class Listing:
    """What a folder holds."""

    files: list[Found] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Names that are not read, with the reason where it is not their suffix."""
    seen: dict[tuple[int, int], str] = field(default_factory=dict)
    """Files and folders by device and inode: a second name of one is no second file."""

    @property
    def splits(self) -> dict[str, int]:
        """How many files each split has."""
        counts: dict[str, int] = {}
        for file in self.files:
            counts[file.split] = counts.get(file.split, 0) + 1
        return counts

    def told(self) -> str:
        """What is not read, in words; "" for nothing."""
        names = sorted(self.left_out)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"not read: {', '.join(names[:_NAMED])}{more}" if names else ""


def kind_of(name: str) -> tuple[str, str] | None:
    """(what a file of this name holds, how it is compressed or ""); None for what is not read."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return (kind, COMPRESSIONS[suffix]) if kind in ("json", "jsonl") else None
    return (KINDS[suffix], "") if suffix in KINDS else None


def stem_of(name: str) -> str:
    """The name of a data file without what says what it holds."""
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem)[0] if suffix.lower() in COMPRESSIONS else stem


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what a path leads to, None where it leads nowhere."""
    try:
        status = path.stat()
    except OSError:  # missing, a broken link, a loop of links
        return None
    return status.st_dev, status.st_ino


def list_folder(folder: Path, *, written: Sequence[Path] = ()) -> Listing:
    """Every data file below a folder, in order of names.

    Args:
        folder: exists.
        written: outputs of the command, which are not its input.

    Raises:
        UserError: a folder below it cannot be read, or a saved data set lacks a file.
    """
    listing = Listing()
    outputs = {found for path in written if (found := identity(path)) is not None}
    later: list[tuple[Path, str | None]] = []

    def shown(path: Path) -> str:
        return f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}"

    def leave_out(path: Path, why: str = "") -> None:
        listing.left_out.append(shown(path) + (f" ({why})" if why else ""))

    def new(path: Path) -> bool:
        """Whether this is the first name under which it is met."""
        key = identity(path)
        if key is None:
            leave_out(path, "a link that leads nowhere")
            return False
        if key in listing.seen:
            leave_out(path, f"the same as {listing.seen[key]}")
            return False
        listing.seen[key] = shown(path)
        return True

    def take(path: Path, split: str | None) -> None:
        """A file that is data by its name."""
        if identity(path) in outputs:
            leave_out(path, "the output")
        elif new(path):
            if path.stat().st_size == 0:
                leave_out(path, "empty")
            else:
                listing.files.append(Found(path, split_of(path.relative_to(folder)) if split is None else split))

    def enter(here: Path, split: str | None) -> None:
        if not new(here):
            return
        try:
            entries = sorted(here.iterdir())
        except OSError as error:
            raise UserError("data", str(here), f"cannot be read ({error.strerror})", "check its permissions") from error
        names = {entry.name for entry in entries}
        if here != folder and (what := _made_here(here, names)):
            leave_out(here, what)
            return
        saved = _saved_files(here) if {"state.json", "dataset_info.json"} <= names else None
        splits = _splits_of_dict(here) if "dataset_dict.json" in names else None
        for name in sorted(((saved or set()) | (splits or set())) - names):
            raise UserError("data", str(here), f"lacks {name}, which the saved data set names", "save it again")
        for entry in entries:
            mine = split
            if entry.name in _SAVED and (saved is not None or splits is not None):
                continue
            if _hidden(entry.name):
                leave_out(entry, "hidden" if entry.name.startswith(".") else "no data" if entry.name in _PASSING else "a backup")
            elif saved is not None and entry.name not in saved:
                leave_out(entry, "no part of the saved data set")
            elif splits is not None and entry.name in splits:
                enter(entry, entry.name)
            elif entry.is_symlink():
                later.append((entry, mine))
            elif entry.is_dir():
                enter(entry, mine)
            else:
                one(entry, mine if saved is None or mine is not None else split_of(here.relative_to(folder)))

    def one(path: Path, split: str | None) -> None:
        name = path.name
        if not path.is_file() or kind_of(name) is None:
            leave_out(path)
        elif name in _NO_ROWS or name.endswith(".failed.jsonl") or (name.startswith("cache-") and name.endswith(".arrow")):
            leave_out(path, "no rows of the data set")
        else:
            take(path, split)

    enter(folder, None)
    while later:  # real files come first, so that a link is the second name
        path, split = later.pop(0)
        if identity(path) is None:
            leave_out(path, "a link that leads nowhere")
        elif path.is_dir():
            enter(path, split)
        else:
            one(path, split)
    listing.files.sort(key=lambda file: file.path)
    return listing


def of_split(listing: Listing, wanted: str | None, *, name: str, config_key: str) -> list[Path]:
    """The files of a split that the user names, or of the only one.

    Args:
        listing: not empty.
        wanted: ``train``, or ``train+test``; None where the user named none.
        name: of the folder, as the user gave it.

    Raises:
        UserError: several splits and none named, or one that is not there.
    """
    splits = listing.splits
    shown = ", ".join(f"{split} ({count} file{'s' if count > 1 else ''})" for split, count in sorted(splits.items()))
    if wanted is None:
        if len(splits) > 1:
            problem = f"holds several splits: {shown}"
            raise UserError(config_key, name, problem, f"name one ({name}:{min(splits, key=_order)}), or several with + between them")
        return [file.path for file in listing.files]
    chosen = {split if split in splits else KEYWORDS.get(split, split) for split in wanted.split("+")}
    if missing := sorted(chosen - splits.keys()):
        raise UserError(config_key, f"{name}:{wanted}", f"names the split {missing[0]}, and the folder has {shown}", "name one of these")
    return [file.path for file in listing.files if file.split in chosen]


def _order(split: str) -> tuple[bool, str]:
    return not split.startswith("train"), split


def split_of(relative: Path) -> str:
    """The split that a path below a folder tells; train where it tells none, or two in one name."""
    for part in relative.parts[:-1]:
        if found := _keywords(part):
            return found
    shard = _SHARD.match(relative.name)
    if shard and relative.parent.name == "data":
        return shard[1]
    return _keywords(relative.name) or "train"


def _keywords(name: str) -> str:
    found = {KEYWORDS[word] for word in re.split(r"[-._ =0-9]+", name.lower()) if word in KEYWORDS}
    return found.pop() if len(found) == 1 else ""


def _hidden(name: str) -> bool:
    return name.startswith((".", "~")) or name.endswith("~") or name in _PASSING or (name.startswith("#") and name.endswith("#"))


def _made_here(folder: Path, names: set[str]) -> str:
    """What a folder holds that is no data: what ``extract``, a tee or the cache of tokenised data wrote, a model; "" for any other.

    Args:
        folder: to be looked at.
        names: of what is in it.
    """
    if names.intersection(_MODEL) and any(_MODELS_TOO.fullmatch(name) for name in names):
        return "a model"
    if (folder / "manifest.json").is_file() and '"record"' in (folder / "manifest.json").read_text(errors="replace")[:4096]:
        return "records of hidden states"
    return "tokenised data" if (folder / "tokens.i32").is_file() else ""


def _saved_files(folder: Path) -> set[str]:
    """Names of the files that hold the rows of what ``Dataset.save_to_disk`` wrote."""
    file = folder / "state.json"
    try:
        return {str(entry["filename"]) for entry in json.loads(file.read_text())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, error) from error


def _splits_of_dict(folder: Path) -> set[str]:
    """Names of the folders of what ``DatasetDict.save_to_disk`` wrote."""
    file = folder / "dataset_dict.json"
    try:
        return set(map(str, json.loads(file.read_text())["splits"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> UserError:
    return UserError("data", str(file), f"is no description of a saved data set ({type(error).__name__}: {error})", "save the data set again")
