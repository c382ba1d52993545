"""Engine ``replay``: records that an extraction or a tee left on disk, in place of coordinator, workers and store.

To the loader it is a coordinator whose packs are always ready (the methods of ``client.TrainerClient``), and a store that reads shards: everything behind it,
from verification to collation, is that of a live run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchspec.engines.messages import Damaged, Pack, PackReady, RecordRef, Welcome
from torchspec.errors import GroupStopped, UserError
from torchspec.transfer.keys import key_of
from torchspec.transfer.shard_reader import ShardReader
from torchspec.transfer.spec import RecordSpec


def check_records(folder: Path, spec: RecordSpec, keys: np.ndarray) -> int:
    """See that a folder has what a run needs; returns the number of its records.

    Args:
        folder: of records.
        spec: what the run expects of every record.
        keys: [n] uint64, of every conversation of the run.

    Raises:
        UserError: no records, of another target, tokenizer or layers (by the field), or conversations that are missing.
    """
    reader = ShardReader(folder)
    try:
        for name, expected in spec.to_dict().items():
            found = reader.manifest.spec.to_dict()[name]
            if found != expected:
                fix = "extract again with this run's configuration, or use that of the extraction"
                raise UserError("data.records", str(folder), f"holds records whose {name} is {found!r}, and this run expects {expected!r}", fix)
        missing = int((reader.find(keys) < 0).sum())
        if missing:
            fix = "run main.py extract with this configuration: it adds what is missing"
            raise UserError("data.records", str(folder), f"lacks {missing} of the run's {keys.shape[0]} conversations", fix)
        return len(reader)
    finally:
        reader.close()


class ReplayClient:
    """See the module.

    Args:
        folder: of records.
        spec: the run's expectation.
    """

    def __init__(self, folder: Path, spec: RecordSpec) -> None:
        self._reader = ShardReader(folder)
        self._ready: deque[PackReady] = deque()
        self.folder = folder
        self.welcome = Welcome(run="replay", incarnation=0, store={"kind": "shards", "folder": str(folder)}, spec=spec.to_dict(), job={})

    def open_stage(self, stage: str, epoch: int, *, first_pack: int, num_packs: int, rank: int, world: int, step_packs: int = 0) -> None:
        self._ready.clear()

    def submit(self, stage: str, epoch: int, packs: Sequence[Pack]) -> None:
        for pack in packs:
            keys = [key_of(sample.ids, (image.digest for image in sample.images)) for sample in pack.samples]
            numbers = self._reader.find(np.array(keys, dtype=np.uint64)).tolist() if keys else []
            records = []
            for sample, number in zip(pack.samples, numbers, strict=True):
                if number < 0:
                    raise GroupStopped(f"{self.folder} lacks conversation {sample.index} of {stage}")
                tokens, rows = self._reader.size(number)
                records.append(RecordRef(sample.index, str(number), self._reader.manifest.spec.layout(tokens, rows).total, tokens, rows))
            self._ready.append(PackReady(stage=stage, epoch=epoch, pack=pack.index, records=records, failed=[]))

    def poll(self, timeout: float) -> PackReady | None:
        return self._ready.popleft() if self._ready else None

    def acknowledge(self, stage: str, epoch: int, packs: Sequence[int]) -> None:
        """Nothing is returned: records stay."""

    def reissue(self, stage: str, epoch: int, pack: int, damaged: Sequence[Damaged]) -> None:
        raise GroupStopped(f"a record in {self.folder} cannot be used: {damaged[0].reason}")

    def close_stage(self, stage: str, epoch: int) -> None:
        self._ready.clear()

    def ask(self, timeout: float = 10.0) -> dict[str, Any]:
        """A group without workers (docs/design.md, "Group metrics")."""
        counters = ("budget", "bytes_alive", "queued", "ready_for_work", "leased", "finished", "restarts", "failed")
        return {**dict.fromkeys(counters, 0), "workers": {}}

    def close(self) -> None:
        self._reader.close()
