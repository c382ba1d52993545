"""``config.yaml`` of a run's folder: the whole configuration, defaults included.

The folder may be where the user keeps a ``config.yaml`` of their own, even the very one of this run. So the file's first line holds a hash of the rest: what
was written by hand, or edited since a run wrote it, stays, and the run's goes beside it (``config-1.yaml``).
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from torchspec.files import spare_name, write

_HEAD = "# written by a run of TorchSpec, xxh3:"


def save_configuration(text: str, path: Path) -> Path:
    """Write a configuration; returns where.

    Args:
        text: YAML.
        path: where it goes unless something of the user's stands there.
    """
    place = spare_name(path, is_untouched)
    write(place, f"{_HEAD}{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}")
    return place


def is_untouched(path: Path) -> bool:
    """Whether a file is as a run wrote it."""
    try:
        head, _, rest = path.read_bytes().partition(b"\n")
    except OSError:
        return False
    return head.decode(errors="replace") == _HEAD + xxhash.xxh3_64_hexdigest(rest)
