"""What the programs of the attention kernels do, as tables made on the host: no device is waited for, and the kernels look for nothing.

Three blocks of S = 4 in one conversation that begins at 10, two blocks in a program, eight keys in another:

    anchors                 12   17   23
    tiles of rows           blocks 0-1: keys 10..16, all of their rows see 10, 11
                            block 2:    keys 10..22, all see all
    tiles of keys           10..17: read by blocks 0-2, of which block 2 sees all eight
                            18..22: read by block 2
"""

from __future__ import annotations

import numpy as np


def _conversations(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First block of each conversation that has one, and the block after its last."""
    first = np.flatnonzero(np.diff(spans[:, 0], prepend=-1))
    return first, np.append(first[1:], len(spans))[: len(first)]


def _cut(low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranges low..high-1 in parts of a size: the range of each part, and where it begins."""
    parts = -(-(high - low) // size)
    owner = np.repeat(np.arange(len(low)), parts)
    return owner, low[owner] + (np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)) * size


def row_tiles(spans: np.ndarray, *, slots: int, blocks: int, window: int | None) -> np.ndarray:
    """[.., 6] int32 (first block, blocks, first key that any row sees, first key that every row's window holds, lowest anchor, highest anchor), those with
    the most keys first.

    Args:
        spans: [A, 2] first position of the anchor's conversation, and the anchor, increasing.
        slots: S.
        blocks: of a tile at most; a tile stays in one conversation.
        window: positions that a row sees, itself among them; None for all.
    """
    first, end = _conversations(spans)
    owner, low = _cut(first, end, blocks)
    high = np.minimum(low + blocks, end[owner])
    start, lowest, highest = spans[low, 0], spans[low, 1], spans[high - 1, 1]
    begin = whole = start
    if window is not None:
        begin = np.maximum(start, lowest - (window - 1))
        whole = np.maximum(begin, highest + (slots - 1) - (window - 1))
    table = np.stack([low, high - low, begin, whole, lowest, highest], axis=1)
    return table[np.argsort(begin - highest, kind="stable")].astype(np.int32)


def key_tiles(spans: np.ndarray, *, slots: int, keys: int, window: int | None) -> np.ndarray:
    """[.., 6] int32 (first key, end of keys; then blocks: the first that sees any, first and end of those that see all, end of those that see any), those
    with the most blocks first. Keys that no block sees are in none.

    Args:
        spans, slots, window: as in :func:`row_tiles`.
        keys: of a tile at most.
    """
    first, end = _conversations(spans)
    anchor = spans[:, 1]
    owner, low = _cut(spans[first, 0], anchor[end - 1], keys)
    high = np.minimum(low + keys, anchor[end - 1][owner])
    begin = np.maximum(np.searchsorted(anchor, low, side="right"), first[owner])
    last = end[owner]
    whole = np.clip(np.searchsorted(anchor, high, side="left"), begin, last)
    whole_end = last
    if window is not None:
        last = np.clip(np.searchsorted(anchor, high + window - 2, side="right"), begin, last)
        whole = np.minimum(whole, last)
        whole_end = np.clip(np.searchsorted(anchor, low + window - slots, side="right"), whole, last)
    table = np.stack([low, high, begin, whole, whole_end, last], axis=1)
    return table[np.argsort(begin - last, kind="stable")].astype(np.int32)
