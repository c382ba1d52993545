"""A hash of a model directory that changes with its configuration and its weights, cheap enough for a model of hundreds of gigabytes.

Of each weight file go in: its size, the head that names its tensors (safetensors), and ``BLOCKS`` blocks of ``BLOCK`` bytes spread evenly over its data, first
and last included; a file of at most so many bytes (1 MiB) goes in whole. Another training run, a finetune, a merged adapter or another random start
changes nearly every byte of what it touches and is seen; a change that lies wholly between the blocks (of a 5 GB file 80 MB apart) is not.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

BLOCK = 16 * 2**10
"""Bytes of a block."""
BLOCKS = 64
"""Of each file: 1 MiB is read of it, whatever its size."""
_LONGEST_HEAD = 100_000_000
_PATTERNS = ("*.safetensors", "*.bin")
"""Weight files; those of the first pattern that finds any."""
_VOLATILE = ("transformers_version", "_name_or_path")
"""Fields of config.json that say nothing about the model."""


def of_directory(path: Path) -> str:
    """``sha256:`` and 32 hexadecimal digits.

    Args:
        path: holds config.json and, usually, weight files. File names do not count, their order does.

    Raises:
        OSError, ValueError: config.json is missing or no JSON.
    """
    digest = hashlib.sha256()
    described = json.loads((path / "config.json").read_text())
    digest.update(json.dumps({name: value for name, value in described.items() if name not in _VOLATILE}, sort_keys=True).encode())
    for file in next((found for pattern in _PATTERNS if (found := sorted(path.glob(pattern)))), []):
        size = file.stat().st_size
        digest.update(struct.pack("<Q", size))
        with file.open("rb") as handle:
            start = 0
            if file.suffix == ".safetensors":
                head = handle.read(8)
                start = min(8 + int.from_bytes(head, "little"), _LONGEST_HEAD, size)
                digest.update(head + handle.read(start - 8))
            for at in sample(start, size):
                handle.seek(at)
                digest.update(handle.read(BLOCK))
    return f"sha256:{digest.hexdigest()[:32]}"


def sample(start: int, end: int) -> list[int]:
    """Offsets of the blocks that are read of the bytes from ``start`` to ``end``."""
    last = end - BLOCK - start
    if last < BLOCK * (BLOCKS - 1):
        return list(range(start, end, BLOCK))
    return [start + last * i // (BLOCKS - 1) for i in range(BLOCKS)]


def of_hub_cache(path: Path) -> str | None:
    """``org/name@commit`` of a snapshot in the hub's cache (vLLM offline names a hub id so); None for any other directory."""
    repository, folder, commit = path.parts[-3:] if len(path.parts) >= 3 else ("", "", "")
    if folder != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{commit}"
