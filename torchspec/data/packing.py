"""Which conversations share a pack: best-fit decreasing in windows of a given order, under one bound or two.

The order is cut into windows; in each, conversations go, largest first, into the fullest pack that still has room.
Packs that stay below 97 % are taken apart and their conversations join the next window, so that only the end of the
epoch is loose, and which conversations share a pack is random within a window.

With a second bound (draft rows beside tokens) the *tight* one of the two, the one that alone asks for more packs, has
the part of the only bound above, and a pack must have room under the other as well. A conversation that is larger than
a bound is a pack of its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

_FULL = 0.97
_PACKS_IN_WINDOW = 192
_BITS = 24  # of a pack's number inside a window, below its room


@dataclass(frozen=True)
class Bound:
    """The sum of ``sizes`` over the conversations of a pack is at most ``limit``.

    Args:
        sizes: [n] int64 of every conversation.
        limit: of a pack.
    """

    sizes: np.ndarray
    limit: int

    @property
    def packs(self) -> float:
        """How many packs this bound alone asks for, full ones."""
        return float(np.minimum(self.sizes, self.limit).sum()) / self.limit


def form_packs(order: np.ndarray, tokens: Bound, rows: Bound | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cut an order of conversations into packs.

    Args:
        order: [n] int64 conversations.
        tokens: no conversation is above it.
        rows: the second bound, which leaves something to bound.

    Returns:
        Conversations pack by pack [n], and how many each pack has.
    """
    if not order.size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    tight, other = (tokens, rows) if rows is None or tokens.packs >= rows.packs else (rows, tokens)
    mean = float(np.minimum(tight.sizes, tight.limit).mean())
    window = max(64, min(int(_PACKS_IN_WINDOW * tight.limit / mean), 1 << 16))
    members: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    carried: list[int] = []
    for low in range(0, order.shape[0], window):
        chosen = np.concatenate([np.array(carried, dtype=np.int64), order[low : low + window]])
        formed, room, loose = _best_fit(chosen, tight) if other is None else _best_fit_of_two(chosen, tight, other)
        carried = []
        if low + window < order.shape[0]:
            spare = sorted((i for i in range(len(formed)) if loose[i]), key=lambda i: (-room[i], i))
            taken: set[int] = set()
            for i in spare:
                if len(carried) + len(formed[i]) > window // 4:
                    break
                carried += formed[i]
                taken.add(i)
            formed = [pack for i, pack in enumerate(formed) if i not in taken]
        members.append(np.array([i for pack in formed for i in pack], dtype=np.int64))
        sizes.append(np.array([len(pack) for pack in formed], dtype=np.int64))
    return np.concatenate(members), np.concatenate(sizes)


_Formed = tuple[list[list[int]], list[int], list[bool]]
"""Packs, the room left in each, and whether it is to be filled further."""


def _best_fit(chosen: np.ndarray, bound: Bound) -> _Formed:
    """Best-fit decreasing. The list of rooms stays sorted; an entry is ``room << _BITS | pack``."""
    sizes = bound.sizes[chosen]
    largest_first = np.argsort(-sizes, kind="stable")
    rooms: list[int] = []
    packs: list[list[int]] = []
    low_bits = (1 << _BITS) - 1
    for index, size in zip(chosen[largest_first].tolist(), sizes[largest_first].tolist(), strict=True):
        at = bisect_left(rooms, size << _BITS)
        if at == len(rooms):
            insort(rooms, (bound.limit - size) << _BITS | len(packs))
            packs.append([index])
        else:
            entry = rooms.pop(at)
            insort(rooms, entry - (size << _BITS))
            packs[entry & low_bits].append(index)
    room = [0] * len(packs)
    for entry in rooms:
        room[entry & low_bits] = entry >> _BITS
    return packs, room, [left > (1 - _FULL) * bound.limit for left in room]


def _best_fit_of_two(chosen: np.ndarray, tight: Bound, other: Bound) -> _Formed:
    """The same, into the pack that is fullest under the tight bound of those with room under the other one too."""
    sizes, others = tight.sizes[chosen], other.sizes[chosen]
    largest_first = np.argsort(-sizes, kind="stable")
    rooms: list[int] = []
    packs: list[list[int]] = []
    left: list[int] = []  # room of each pack under the other bound
    low_bits = (1 << _BITS) - 1
    triples = zip(*(values[largest_first].tolist() for values in (chosen, sizes, others)), strict=True)
    for index, size, more in triples:
        if size > tight.limit or more > other.limit:
            packs.append([index])  # with no room: alone
            left.append(0)
            continue
        at = bisect_left(rooms, size << _BITS)
        while at < len(rooms) and left[rooms[at] & low_bits] < more:
            at += 1
        if at == len(rooms):
            insort(rooms, (tight.limit - size) << _BITS | len(packs))
            packs.append([index])
            left.append(other.limit - more)
        else:
            entry = rooms.pop(at)
            insort(rooms, entry - (size << _BITS))
            packs[entry & low_bits].append(index)
            left[entry & low_bits] -= more
    room = [0] * len(packs)
    for entry in rooms:
        room[entry & low_bits] = entry >> _BITS
    loose = [a > (1 - _FULL) * tight.limit and b > (1 - _FULL) * other.limit for a, b in zip(room, left, strict=True)]
    return packs, room, loose
