"""The samples that were given up: ``failed_samples.jsonl`` in the run's folder, one JSON line each with its place in the data and the engine's reason."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torchspec.data.sample_source import Samples
from torchspec.engines.messages import Failure
from torchspec.files import dumps, write

log = logging.getLogger(__name__)


def append_failures(path: Path, failures: Sequence[Failure], *, stage: str, epoch: int, pack: int, dataset: Samples) -> None:
    """Add the samples that a pack lacks; ranks of a host may append at the same time (one write a call).

    Raises:
        OSError: the lines could not be written whole.
    """
    lines = [
        {"stage": stage, "epoch": epoch, "pack": pack, "sample": f.index, "place": dataset.place(f.index), "reason": f.reason, "attempts": f.attempts}
        for f in failures
    ]
    data = "".join(dumps(line) + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # what a write that failed left behind stays a line of its own
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def cut_failures(path: Path, *, epoch: int, pack: int) -> None:
    """Forget training failures at or after a position: these packs are trained again.

    A last line without its end is dropped: the write failed, so its pack was not trained. Other lines that cannot be read are kept, with a warning.
    """
    if not path.is_file():
        return
    *lines, torn = path.read_bytes().split(b"\n")
    kept = [line for line in lines if line.strip() and not _again(line, (epoch, pack), path)]
    if len(kept) == len(lines) and not torn:
        return
    if not kept:
        path.unlink()
        return
    write(path, b"".join(line + b"\n" for line in kept))


def _again(line: bytes, position: tuple[int, int], path: Path) -> bool:
    """Whether a line names a training failure at or after a position."""
    try:
        entry = json.loads(line)
        return bool(entry["stage"] == "train" and (entry["epoch"], entry["pack"]) >= position)
    except (ValueError, KeyError, TypeError):
        log.warning("%s: kept a line that cannot be read: %.80r", path, line)
        return False
