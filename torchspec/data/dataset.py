"""The tokenised data set, read through memory maps (``prepare.py`` builds it).

A cache entry is a folder ``<cache_dir>/<key>/``:

    tokens.i32      token ids of all conversations, one after the other
    mask.u8         1 on supervised tokens, same positions
    offsets.npy     int64 [n+1], where each conversation begins
    places.npy      int32 [n, 2], source number and line (or row number), to report a sample by where the user finds it
    counts.npy      int64, supervised occurrences of each token id
    bad_rows.jsonl  rows that could not be used, and why
    meta.json       sizes, sources, what was dropped

Flat files rather than Arrow: a pack needs two slices of two arrays, and a slice of a memory map costs a microsecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 1
"""Goes up when rendering, masks or files change: older entries are then built anew."""
_CHUNK = 1 << 22
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

    Raises:
        FileNotFoundError: when it is not there, or not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._meta = json.loads((folder / "meta.json").read_text())
        if self._meta["format"] != FORMAT:
            raise FileNotFoundError(f"{folder}: format {self._meta['format']}, expected {FORMAT}")
        for name, size in self._meta["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise FileNotFoundError(f"{folder / name} is missing or not {size} bytes")
        self.summary = Summary(**self._meta["summary"])
        self.offsets: np.ndarray = np.load(folder / "offsets.npy", mmap_mode="r")
        tokens = self.summary.tokens
        self._tokens = np.memmap(folder / "tokens.i32", dtype="<i4", mode="r", shape=(tokens,))
        self._mask = np.memmap(folder / "mask.u8", dtype=np.uint8, mode="r", shape=(tokens,))
        self._places = np.load(folder / "places.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.summary.kept

    @property
    def content(self) -> str:
        """Hash of all ids and masks: two data sets with the same hash train the same."""
        return str(self._meta["content"])

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
        return np.diff(self.offsets)

    def ids(self, index: int) -> np.ndarray:
        """[T] int32."""
        return self._tokens[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int) -> np.ndarray:
        """[T] uint8."""
        return self._mask[self.offsets[index] : self.offsets[index + 1]]

    def place(self, index: int) -> str:
        """Where the conversation came from, as ``source:line``."""
        source, line = self._places[index]
        return f"{self._meta['sources'][source]['name']}:{line}"

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """[V] int64, supervised occurrences of each token."""
        counts = np.load(self.folder / "counts.npy")
        return np.pad(counts, (0, vocab_size - counts.shape[0]))

    def supervised_counts(self, steps: int) -> np.ndarray:
        """[n, K] int64: supervised positions of each conversation at each unroll step (the rule of ``torchspec.batch``).

        A turn of L tokens supervises L-1-k positions at step k, one fewer where it begins the conversation (position t supervises x_{t+1} first).
        """
        result = np.zeros((len(self), steps), dtype=np.int64)
        for low, high in self._chunks():
            base = int(self.offsets[low])
            on = np.asarray(self._mask[base : int(self.offsets[high])]).astype(bool)
            bounds = np.asarray(self.offsets[low : high + 1]) - base
            owner, length = _turns(on, bounds)
            for k in range(steps):
                result[low:high, k] = np.bincount(owner, weights=np.maximum(length - 1 - k, 0), minlength=high - low)
        return result

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of conversations of about ``_CHUNK`` tokens."""
        low = 0
        while low < len(self):
            high = int(np.searchsorted(self.offsets, self.offsets[low] + _CHUNK, side="left"))
            high = min(max(high, low + 1), len(self))
            yield low, high
            low = high


def _turns(on: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(conversation, tokens that can be predicted from inside it plus one) of each turn.

    Args:
        on: [N] bool loss mask.
        bounds: [S+1] where conversations begin.
    """
    first = on.copy()
    first[1:] &= ~on[:-1]
    heads = bounds[:-1][bounds[:-1] < on.shape[0]]
    at_head = on[heads]
    first[heads] |= at_head
    last = on.copy()
    last[:-1] &= ~on[1:]
    tails = bounds[1:] - 1
    last[tails] |= on[tails]
    begin, end = np.flatnonzero(first), np.flatnonzero(last)
    owner = np.searchsorted(bounds, begin, side="right") - 1
    return owner, end - begin + 1 - (begin == bounds[owner])
