"""How much of a text repeats itself. Small targets that answer greedily fall into loops, which any draft predicts:
figures on such text flatter it."""

from __future__ import annotations

import numpy as np

GRAM = 8
"""Tokens of the pieces that are compared."""
LOOPING = 0.3
"""A text of whose pieces more than this share stood in it before is a looping one."""


def repeats(ids: np.ndarray, n: int = GRAM) -> tuple[int, int]:
    """Count the n-grams of one answer.

    Args:
        ids: [T] token ids.
        n: tokens of a piece.

    Returns:
        how many pieces there are, T - n + 1, and how many of them stood in the answer before.

    Example:
        >>> repeats(np.array([1, 2, 3, 1, 2, 3, 1]), 3)
        (5, 2)
    """
    if ids.shape[0] < n:
        return 0, 0
    pieces = np.lib.stride_tricks.sliding_window_view(ids, n)
    return pieces.shape[0], pieces.shape[0] - np.unique(pieces, axis=0).shape[0]
