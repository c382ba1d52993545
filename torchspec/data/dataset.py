"""The tokenised data set, read through memory maps (``prepare.py`` builds it).

A cache entry is a folder ``<cache_dir>/<key>/``:

    tokens.i32      token ids of all conversations, one after the other
    mask.u8         1 on supervised tokens, same positions
    offsets.npy     int64 [n+1], where each conversation begins
    places.i32      int32 [n, 2], source number and line (or row number), to report a sample by where the user finds it
    hashes.u64      key of each conversation (ids and images), to find it elsewhere (records of an extraction, a validation set inside the training set)
    images.jsonl    a line for each conversation with images (``tokenise.ImageRow``); images.i64: where each conversation's ends; images.bin: images that came
                    inside rows. All empty where engines are given no images
    counts.npy      int64, supervised occurrences of each token id
    bad_rows.jsonl  rows that could not be used, and why
    meta.json       sizes, sources, what was dropped

Flat files rather than Arrow: a pack needs two slices of two arrays, and a slice of a memory map costs a microsecond. Passes over everything read the files
in pieces: pages of a memory map count as the process's own.

With weights a conversation may be there several times, or not: ``weighted`` gives a view of the same files in which each has its own index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchspec.data.tokenise import ImageRow
from torchspec.engines.messages import Image, Sample
from torchspec.images import temporal_positions
from torchspec.supervision import Supervision

FORMAT = 8
"""Goes up when rendering, masks or files change: older entries are then built anew."""
_CHUNK = 1 << 20
"""Tokens looked at in one go when a whole data set is counted."""


@dataclass(frozen=True)
class Summary:
    """What became of the rows."""

    rows: int
    kept: int
    bad: int
    too_short: int
    truncated: int
    tokens: int
    supervised: int

    def __str__(self) -> str:
        lost = [f"{count} {what}" for count, what in ((self.bad, "bad"), (self.too_short, "with too few supervised tokens")) if count]
        dropped = f", dropped {' and '.join(lost)}" if lost else ""
        cut = f", {self.truncated} cut to max_length" if self.truncated else ""
        return f"{self.kept:,} of {self.rows:,} conversations{dropped}{cut}; {self.tokens:,} tokens, {self.supervised / max(self.tokens, 1):.0%} supervised"


class TokenizedDataset:
    """Reads one cache entry.

    Args:
        folder: the entry.
        rows: [n] int64, which of its conversations make up the data set, in order; None takes all.

    Raises:
        FileNotFoundError: when it is not there, or not whole.
    """

    def __init__(self, folder: Path, rows: np.ndarray | None = None) -> None:
        self.folder = folder
        self._meta = json.loads((folder / "meta.json").read_text())
        if self._meta["format"] != FORMAT:
            raise FileNotFoundError(f"{folder}: format {self._meta['format']}, expected {FORMAT}")
        for name, size in self._meta["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise FileNotFoundError(f"{folder / name} is missing or not {size} bytes")
        self.summary = Summary(**self._meta["summary"])
        self._rows = rows
        self._offsets: np.ndarray = np.load(folder / "offsets.npy", mmap_mode="r")
        kept, tokens = self.summary.kept, self.summary.tokens
        self._tokens = np.memmap(folder / "tokens.i32", dtype="<i4", mode="r", shape=(tokens,))
        self._mask = np.memmap(folder / "mask.u8", dtype=np.uint8, mode="r", shape=(tokens,))
        self._places = np.memmap(folder / "places.i32", dtype="<i4", mode="r", shape=(kept, 2))
        self._hashes = np.memmap(folder / "hashes.u64", dtype="<u8", mode="r", shape=(kept,))
        with_images = bool(self._meta["files"]["images.jsonl"])
        self._image_ends = np.memmap(folder / "images.i64", dtype="<i8", mode="r", shape=(kept,)) if with_images else None

    def weighted(self, weights: Sequence[float]) -> TokenizedDataset:
        """The same data with each source's conversations so many times an epoch; of a broken number, a fixed random part once more.

        Args:
            weights: one a source, above 0.
        """
        source = np.fromfile(self.folder / "places.i32", dtype="<i4")[::2]
        generator = np.random.Generator(np.random.PCG64(0))
        times = np.zeros(source.shape[0], dtype=np.int64)
        for number, weight in enumerate(weights):
            mine = np.flatnonzero(source == number)
            times[mine] = int(weight)
            times[generator.permutation(mine)[: round((weight - int(weight)) * mine.size)]] += 1
        return TokenizedDataset(self.folder, np.repeat(np.arange(source.shape[0], dtype=np.int64), times))

    def only(self, indices: np.ndarray) -> TokenizedDataset:
        """Some of its conversations, in the order given."""
        return TokenizedDataset(self.folder, indices if self._rows is None else self._rows[indices])

    def __len__(self) -> int:
        return self.summary.kept if self._rows is None else self._rows.shape[0]

    @property
    def content(self) -> str:
        """Hash of all ids and masks: two data sets with the same hash train the same."""
        content = str(self._meta["content"])
        if self._image_ends is not None and self._meta["image_positions"] != "index":
            content += f"/{self._meta['image_positions']}"
        return content if self._rows is None else f"{content}/{hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]}"

    @property
    def unused(self) -> dict[str, dict[str, int]]:
        """Keys of rows that nothing was read from: of each source that the user named, in how many rows."""
        return dict(self._meta["unused"])

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer that rendered it, "" when rows came tokenised."""
        return str(self._meta["tokenizer"])

    @property
    def end_ids(self) -> list[int]:
        """Control tokens that end a supervised turn somewhere in the data."""
        return list(self._meta["end_ids"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each conversation."""
        lengths = np.diff(self._offsets)
        return lengths if self._rows is None else lengths[self._rows]

    @property
    def hashes(self) -> np.ndarray:
        """[n] uint64, key of each conversation (``transfer.keys``)."""
        hashes = np.fromfile(self.folder / "hashes.u64", dtype="<u8")
        return hashes if self._rows is None else hashes[self._rows]

    def _row(self, index: int) -> int:
        return index if self._rows is None else int(self._rows[index])

    def ids(self, index: int) -> np.ndarray:
        """[T] int32."""
        row = self._row(index)
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    def mask(self, index: int) -> np.ndarray:
        """[T] uint8."""
        row = self._row(index)
        return self._mask[self._offsets[row] : self._offsets[row + 1]]

    def key(self, index: int) -> int:
        """Of one conversation."""
        return int(self._hashes[self._row(index)])

    def images(self, index: int) -> list[ImageRow]:
        """Images of a conversation, in order."""
        if self._image_ends is None:
            return []
        row = self._row(index)
        begin, end = int(self._image_ends[row - 1]) if row else 0, int(self._image_ends[row])
        if begin == end:
            return []
        with (self.folder / "images.jsonl").open("rb") as handle:
            handle.seek(begin)
            return [ImageRow(*values) for values in json.loads(handle.read(end - begin))]

    def request(self, index: int, *, epoch: int) -> Sample:
        """What is asked of the engines: its states."""
        kept = str(self.folder / "images.bin")
        images = [Image(image.path or kept, image.offset, image.nbytes, image.digest, image.at, image.tokens) for image in self.images(index)]
        return Sample(index, self.ids(index).astype("<i4").tobytes(), images=images)

    def positions(self, index: int, tokens: int) -> np.ndarray | None:
        """[T] int64 RoPE positions of the draft; None for 0 to T-1."""
        images = self.images(index) if self._meta["image_positions"] == "temporal" else []
        return temporal_positions(tokens, [(image.at, image.tokens, image.span) for image in images]) if images else None

    def mismatch(self, index: int, ids: Tensor) -> str:
        """Why a record's ids are not this conversation's."""
        return "" if torch.equal(ids, torch.from_numpy(self.ids(index).astype("int32"))) else f"holds the tokens of another sample than {index}"

    def loss_mask(self, index: int, tokens: int) -> np.ndarray:
        """[T] uint8."""
        return self.mask(index)

    def place(self, index: int) -> str:
        """Where the conversation came from, as ``source:line``."""
        source, line = self._places[self._row(index)]
        return f"{self._meta['sources'][source]['name']}:{line}"

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[V] int64, supervised occurrences of each token."""
        if self._rows is None:
            counts = np.load(self.folder / "counts.npy")
            return np.pad(counts, (0, vocab_size - counts.shape[0]))
        times = np.bincount(self._rows, minlength=self.summary.kept)
        counts = np.zeros(vocab_size, dtype=np.int64)
        for low, high, mask in self._pieces():
            on = mask.astype(bool)
            weight = np.repeat(times[low:high], np.diff(self._offsets[low : high + 1]))[on]
            ids = self._read("tokens.i32", "<i4", low, high)[on]
            counts += np.bincount(ids, weights=weight, minlength=vocab_size).astype(np.int64)
        return counts

    def measured(self, supervision: Supervision) -> tuple[np.ndarray, np.ndarray]:
        """[n, Q] int32 normalisers and [n] int64 draft rows of each conversation, in one pass over the masks."""
        counts, work = [], []
        for low, high, mask in self._pieces():
            bounds = np.asarray(self._offsets[low : high + 1]) - int(self._offsets[low])
            counts.append(supervision.counts(mask, bounds).astype(np.int32))
            work.append(supervision.work(mask, bounds))
        found = np.concatenate(counts), np.concatenate(work)
        return found if self._rows is None else (found[0][self._rows], found[1][self._rows])

    def _pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first conversation, one after the last, their masks), about ``_CHUNK`` tokens at a time, of the whole entry."""
        low = 0
        while low < self.summary.kept:
            high = int(np.searchsorted(self._offsets, self._offsets[low] + _CHUNK, side="left"))
            high = min(max(high, low + 1), self.summary.kept)
            yield low, high, self._read("mask.u8", "u1", low, high)
            low = high

    def _read(self, name: str, dtype: str, low: int, high: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        begin, end = int(self._offsets[low]), int(self._offsets[high])
        return np.fromfile(self.folder / name, dtype=dtype, count=end - begin, offset=begin * size)
