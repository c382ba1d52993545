"""Tokenise rows into the files of a cache entry, a shard at a time, so that memory is that of a shard and a build that was killed goes on.

    rows of a shard ─► Arrow file ─► datasets.map (processes) ─► appended to tokens.i32, mask.u8, lengths.i64, places.i32, hashes.u64, images.*, bad_rows.jsonl
                                                             ─► progress.json (sizes of these files, totals, next row), written last and renamed

What was appended after the last ``progress.json`` is cut off when a build goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from tqdm import tqdm

from torchspec.data.dataset import Summary
from torchspec.data.sources import Source, read_rows
from torchspec.data.tokenise import ImageRow, Tokenise
from torchspec.data.unused import Unused
from torchspec.errors import UserError
from torchspec.transfer.keys import key_of

SHARD = 1 << 15
"""Rows tokenised between two records of progress, at most."""
SHARD_BYTES = 1 << 26
"""Bytes of rows after which a shard ends earlier."""
APPENDED = ("tokens.i32", "mask.u8", "lengths.i64", "places.i32", "hashes.u64", "images.jsonl", "images.i64", "images.bin", "bad_rows.jsonl")
_SHOWN = 2000
"""Rows from which on a progress bar is worth its line."""


@dataclass
class Progress:
    """How far a build is; everything that the next shard needs to know of those before it."""

    next_row: int = 0
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Summary.__dataclass_fields__, 0))
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(APPENDED, 0))
    digests: list[str] = field(default_factory=list)
    """XXH3 of the tokens and masks of each shard."""
    ends: list[int] = field(default_factory=list)
    unused: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows by source and by key that nothing was read from."""

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Of an unfinished build; its files are cut back to what the record says."""
        file = folder / "progress.json"
        progress = cls(**json.loads(file.read_text())) if file.is_file() else cls()
        for name, size in progress.sizes.items():
            with (folder / name).open("ab") as handle:
                handle.truncate(size)
        return progress

    def write(self, folder: Path) -> None:
        temporary = folder / "progress.json.tmp"
        temporary.write_text(json.dumps(vars(self)))
        temporary.replace(folder / "progress.json")


def first_row(sources: Sequence[Source], *, config_key: str) -> bytes | None:
    """The first row of all, None where there is none."""
    return next((row for source in sources for row, _ in read_rows(source, config_key=config_key)), None)


def build(
    folder: Path,
    sources: Sequence[Source],
    tokenise: Tokenise,
    *,
    special: np.ndarray,
    min_supervised_tokens: int,
    vocab_size: int,
    target_name: str,
    config_key: str,
    num_proc: int | None,
) -> Progress:
    """Tokenise every row of the sources into ``folder``, going on where an earlier call was cut.

    Args:
        folder: exists; gets the files named in ``APPENDED`` and ``counts.npy``.
        tokenise: makes tokens of rows.
        special: ids of control tokens.
        min_supervised_tokens: conversations with fewer are dropped.
        vocab_size: V; ids beyond it are refused.
        num_proc: processes; None takes the cores there are (at most 8) for large inputs.

    Raises:
        UserError: unreadable sources, or a token id beyond the target's vocabulary.
    """
    progress = Progress.read(folder)
    writer = _Writer(
        folder,
        progress,
        sources,
        special=special,
        least=min_supervised_tokens,
        vocab_size=vocab_size,
        target_name=target_name,
        media=tokenise.tower is not None,
    )
    every = ((row, number, line) for number, source in enumerate(sources) for row, line in read_rows(source, config_key=config_key))
    for _ in itertools.islice(every, progress.next_row):
        pass
    known = [source.lines for source in sources]
    total = sum(n for n in known if n is not None) if None not in known else None
    bar = tqdm(total=total, initial=progress.next_row, desc="tokenising", unit="row", disable=total is not None and total < _SHOWN, leave=False)
    scratch = folder / "rows"
    with bar:
        while True:
            shutil.rmtree(scratch, ignore_errors=True)
            rows = _load(every, scratch)
            if rows is None:
                break
            for table in _map(rows, tokenise, num_proc, scratch).with_format("arrow").iter(batch_size=1024):
                writer.append(table)
                bar.update(table.num_rows)
            writer.end_shard(len(rows))
            del rows
    shutil.rmtree(scratch, ignore_errors=True)
    writer.close()
    return progress


def _load(every: Iterator[tuple[bytes, int, int]], scratch: Path) -> Any:
    """The next shard's rows as a memory-mapped ``datasets.Dataset`` of (row, source, line), None at the end."""
    import datasets
    import pyarrow as pa

    scratch.mkdir()
    schema = pa.schema({"row": pa.large_binary(), "source": pa.int32(), "line": pa.int32()})
    count = nbytes = 0
    with pa.OSFile(str(scratch / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while count < SHARD and nbytes < SHARD_BYTES and (batch := list(itertools.islice(every, min(256, SHARD - count)))):
            stream.write_batch(pa.record_batch(list(map(list, zip(*batch, strict=True))), schema=schema))
            count += len(batch)
            nbytes += sum(len(row) for row, _, _ in batch)
    return datasets.Dataset.from_file(str(scratch / "rows.arrow")) if count else None


def _map(rows: Any, tokenise: Tokenise, num_proc: int | None, scratch: Path) -> Any:
    import datasets

    if num_proc is None:
        num_proc = min(len(os.sched_getaffinity(0)), 8) if len(rows) >= 5000 else 1
    features = datasets.Features(
        {
            "source": datasets.Value("int32"),
            "line": datasets.Value("int32"),
            "ids": datasets.List(datasets.Value("int32")),
            "mask": datasets.List(datasets.Value("uint8")),
            "length": datasets.Value("int32"),
            "problem": datasets.Value("string"),
            "images": datasets.Value("string"),
            "blobs": datasets.List(datasets.Value("large_binary")),
            "unused": datasets.List(datasets.Value("string")),
        }
    )
    with _quiet():
        return rows.map(
            tokenise,
            batched=True,
            batch_size=256,
            remove_columns=["row"],
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(scratch / "tokenised.arrow"),
            new_fingerprint="tokenised",
        )


class _Writer:
    """Appends tables of tokenised rows to the files of an entry."""

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        sources: Sequence[Source],
        *,
        special: np.ndarray,
        least: int,
        vocab_size: int,
        target_name: str,
        media: bool,
    ) -> None:
        self.media = media
        self.folder, self.progress, self.sources = folder, progress, sources
        self.special, self.least, self.vocab_size, self.target_name = special, least, vocab_size, target_name
        self.files: dict[str, IO[bytes]] = {name: (folder / name).open("ab") for name in APPENDED}
        counted = folder / f"counts-{len(progress.digests)}.npy"
        self.counts = np.load(counted) if counted.is_file() and progress.digests else np.zeros(vocab_size, dtype=np.int64)
        self.digest = xxhash.xxh3_128()

    def append(self, table: Any) -> None:
        """Take over what is good of a table.

        Raises:
            UserError: for a token id beyond the target's vocabulary.
        """
        ids, mask = (_flat(table, name) for name in ("ids", "mask"))
        source, line, full = (table.column(name).to_numpy() for name in ("source", "line", "length"))
        problems = table.column("problem").to_pylist()
        good = np.array([not problem for problem in problems])
        lengths = np.diff(table.column("ids").combine_chunks().offsets.to_numpy()).astype(np.int64)
        bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        supervised = np.diff(np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mask, dtype=np.int64)])[bounds])
        keep = good & (supervised >= self.least)
        counted = Unused(self.progress.unused)
        for number, keys in zip(source, table.column("unused").to_pylist(), strict=True):
            counted.add(self.sources[number].given, keys)
        self.progress.unused = counted.counts
        for row in np.flatnonzero(~good):
            self.files["bad_rows.jsonl"].write(json.dumps({"place": self._place(source[row], line[row]), "problem": problems[row]}).encode() + b"\n")
        if ids.size and int(ids.max()) >= self.vocab_size:
            row = int(np.searchsorted(bounds, int(ids.argmax()), side="right")) - 1
            raise UserError(
                "data.target.path",
                self.target_name,
                f"has {self.vocab_size} tokens, but {self._place(source[row], line[row])} renders to id {int(ids.max())}",
                "use the tokenizer that belongs to the target",
            )
        chosen = np.repeat(keep, lengths)
        images = self._images(table, keep)
        hashes = [key_of(ids[bounds[row] : bounds[row + 1]], seen) for row, seen in zip(np.flatnonzero(keep), images, strict=True)]
        ids, mask = ids[chosen], mask[chosen]
        parts = {
            "tokens.i32": ids.astype("<i4"),
            "mask.u8": mask,
            "lengths.i64": lengths[keep].astype("<i8"),
            "places.i32": np.stack([source[keep], line[keep]], axis=1).astype("<i4"),
            "hashes.u64": np.array(hashes, dtype="<u8"),
        }
        for name, values in parts.items():
            self.files[name].write(values.tobytes())
        for name in ("tokens.i32", "mask.u8", "lengths.i64"):
            self.digest.update(parts[name].tobytes())
        self.digest.update("".join(itertools.chain.from_iterable(images)).encode())
        self.counts += np.bincount(ids[mask == 1], minlength=self.vocab_size)
        turn_end = (mask == 1) & np.concatenate([mask[1:] == 0, np.ones(min(1, mask.size), dtype=bool)])
        self.progress.ends = sorted({*self.progress.ends, *(int(i) for i in np.unique(ids[turn_end]) if i in self.special)})
        for name, count in {
            "rows": len(problems),
            "kept": keep.sum(),
            "bad": (~good).sum(),
            "too_short": (good & ~keep).sum(),
            "truncated": (keep & (full > lengths)).sum(),
            "tokens": ids.size,
            "supervised": mask.sum(),
        }.items():
            self.progress.totals[name] += int(count)

    def _images(self, table: Any, keep: np.ndarray) -> list[list[str]]:
        """Append the images of what is kept; returns the hashes of each conversation's."""
        described, blobs = (table.column(name).to_pylist() for name in ("images", "blobs"))
        digests: list[list[str]] = []
        ends = []
        for row in np.flatnonzero(keep):
            images = [ImageRow(*values) for values in json.loads(described[row] or "[]")]
            base = self.files["images.bin"].tell()
            for blob in blobs[row]:
                self.files["images.bin"].write(blob)
            if images:
                placed = [replace(image, offset=image.offset + (0 if image.path else base)) for image in images]
                self.files["images.jsonl"].write(json.dumps([list(vars(image).values()) for image in placed]).encode() + b"\n")
            ends.append(self.files["images.jsonl"].tell())
            digests.append([image.digest for image in images])
        if self.media:
            self.files["images.i64"].write(np.array(ends, dtype="<i8").tobytes())
        return digests

    def end_shard(self, rows: int) -> None:
        """Make what was appended so far part of the build."""
        progress = self.progress
        for name, file in self.files.items():
            file.flush()
            progress.sizes[name] = (self.folder / name).stat().st_size
        progress.next_row += rows
        progress.digests.append(self.digest.hexdigest())
        self.digest = xxhash.xxh3_128()
        np.save(self.folder / f"counts-{len(progress.digests)}.npy", self.counts)
        progress.write(self.folder)
        (self.folder / f"counts-{len(progress.digests) - 1}.npy").unlink(missing_ok=True)

    def close(self) -> None:
        """Finish the files; the counts get their name."""
        for file in self.files.values():
            file.close()
        np.save(self.folder / "counts.npy", self.counts)
        (self.folder / f"counts-{len(self.progress.digests)}.npy").unlink(missing_ok=True)

    def _place(self, source: int, line: int) -> str:
        return f"{self.sources[source].name}:{line}"


def _flat(table: Any, name: str) -> np.ndarray:
    """All values of a list column."""
    values: np.ndarray = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of ``datasets``: there is one for the whole build."""
    import datasets

    was_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
