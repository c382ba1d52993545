"""The key of a conversation outside any data set: what finds it among records on disk, and in another set."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash


def key_of(ids: np.ndarray | bytes, images: Iterable[str] = ()) -> int:
    """XXH3-64 of a conversation's ids as little-endian int32, and of the hashes of its images."""
    whole = ids if isinstance(ids, bytes) else np.ascontiguousarray(ids, dtype="<i4").tobytes()
    return xxhash.xxh3_64_intdigest(whole + "".join(images).encode())
