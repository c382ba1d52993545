"""Records of ``main.py extract`` as the cached hidden states that speculators' loader asks for, so that both trainers read the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hs_connectors import HiddenStatesTransfer

from torchspec.transfer.record import views
from torchspec.transfer.shard_reader import ShardReader


class RecordsTransfer(HiddenStatesTransfer):  # type: ignore[misc]
    """Reads by the row of the data set.

    Args:
        folder: of ``data.py``: ``numbers.npy`` says which record a row has, ``records`` in ``facts.json`` where they are.
        records: folder of records.
    """

    def __init__(self, folder: Path, records: Path) -> None:
        self.numbers, self.records = np.load(folder / "numbers.npy"), records
        self._reader: ShardReader | None = None

    def get_cached(self, file_idx: int) -> dict[str, torch.Tensor] | None:
        """``hidden_states`` [T, n + 1, D] and ``token_ids`` [T]; where the engine wrote no state of the last token, which nothing supervised reads, its row
        is zero."""
        if self._reader is None:  # each worker process of the loader its own
            self._reader = ShardReader(self.records)
        spec, number = self._reader.manifest.spec, int(self.numbers[file_idx])
        tokens, rows = self._reader.size(number)
        memory = torch.empty(spec.layout(tokens, rows).total, dtype=torch.uint8)
        self._reader.read(number, memory)
        ids, aux, last = views(memory, spec, tokens, rows)
        joined = torch.cat([aux, last], dim=1).view(rows, len(spec.aux_layers) + 1, -1)
        return {"hidden_states": torch.nn.functional.pad(joined, (0, 0, 0, 0, 0, tokens - rows)), "token_ids": ids.to(torch.int64)}

    def get_generated(self, hs_transfer_params: dict[str, Any]) -> None:
        """Nothing is generated here."""
