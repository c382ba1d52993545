"""Reads records from disk (``shards.py``) in any order, and gives them as a store gives them.

Nothing but the index is held in memory, about 40 bytes a record: a training run may ask for any conversation at any time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.transfer.record import seal, views
from torchspec.transfer.shards import FP8, Manifest, checksum_of, read_header, read_tensor, shards_in, signed
from torchspec.transfer.store import StoreError

_OPEN_FILES = 64


class ShardReader:
    """Finds and reads records by conversation.

    Args:
        folder: of an extraction.

    Raises:
        UserError: no records there, or a shard that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.files = shards_in(folder)
        if not self.files:
            raise UserError("data.records", str(folder), "holds no shard of records", "make them: main.py extract")
        self._headers = [read_header(file) for file in self.files]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("key", "tokens", "rows", "checksum", "shard", "token_at", "row_at")}
        for number, (file, header) in enumerate(zip(self.files, self._headers, strict=True)):
            table = {name: read_tensor(file, name, header) for name in ("key", "tokens", "rows", "checksum")}
            table["shard"] = np.full(table["key"].shape[0], number, dtype=np.int32)
            table["token_at"] = np.cumsum(table["tokens"], dtype=np.int64) - table["tokens"]
            table["row_at"] = np.cumsum(table["rows"], dtype=np.int64) - table["rows"]
            for name, values in table.items():
                columns[name].append(values)
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        order = np.argsort(joined["key"], kind="stable")
        self._table = {name: values[order] for name, values in joined.items()}
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._table["key"].shape[0])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Number of the record of each key (uint64), -1 where there is none."""
        wanted = np.asarray(keys, dtype=np.uint64).view(np.int64)
        at = np.minimum(np.searchsorted(self._table["key"], wanted), len(self) - 1)
        return np.where(self._table["key"][at] == wanted, at, -1)

    def size(self, number: int) -> tuple[int, int]:
        """(tokens, rows of states) of a record."""
        return int(self._table["tokens"][number]), int(self._table["rows"][number])

    def read(self, number: int, out: Tensor) -> int:
        """A whole record, as the store would give it, into the head of ``out``; returns its bytes.

        Raises:
            StoreError: ``io`` when it cannot be read, or is damaged.
        """
        spec, shard = self.manifest.spec, int(self._table["shard"][number])
        tokens, rows = self.size(number)
        token_at, row_at = int(self._table["token_at"][number]), int(self._table["row_at"][number])
        if out.numel() < spec.layout(tokens, rows).total:
            raise StoreError("io", str(number), f"{out.numel()} bytes do not hold a record of {tokens} tokens")
        out[: spec.layout(tokens, rows).total].zero_()
        ids, aux, last = views(out, spec, tokens, rows)
        parts: dict[str, Tensor] = {"input_ids": ids}
        for name, into, layers in (("aux", aux, len(spec.aux_layers)), ("last", last, 1)):
            if self.manifest.stored == "fp8":
                parts[name] = torch.empty(into.shape, dtype=FP8)
                parts[f"{name}_scale"] = torch.empty(rows, layers, dtype=torch.float32)
            else:
                parts[name] = into
        for name, into in parts.items():
            self._pread(shard, name, token_at if name == "input_ids" else row_at, into, number)
        if signed(checksum_of(parts)) != int(self._table["checksum"][number]):
            raise StoreError("io", str(number), f"checksum differs: {self.files[shard].name} was damaged; delete it and extract again")
        if self.manifest.stored == "fp8":
            for name, into, layers in (("aux", aux, len(spec.aux_layers)), ("last", last, 1)):
                states = parts[name].float().view(rows, layers, spec.hidden_size) * parts[f"{name}_scale"].unsqueeze(-1)
                into.copy_(states.view(into.shape))
        return int(seal(out, spec, tokens, rows, producer=f"records ({self.manifest.stored})", checksum=False).numel())

    def _pread(self, shard: int, name: str, first: int, out: Tensor, number: int) -> None:
        if not out.numel():
            return
        if shard not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.files[shard], os.O_RDONLY)
        begin, data = self._headers[shard]
        per_row = out[:1].nbytes
        into = memoryview(out.view(torch.uint8).numpy().reshape(-1).data)
        at = begin + int(data[name]["data_offsets"][0]) + first * per_row
        done = 0
        while done < len(into):
            got = os.preadv(self._open[shard], [into[done:]], at + done)
            if got == 0:
                raise StoreError("io", str(number), f"{self.files[shard]} ends too early")
            done += got

    def close(self) -> None:
        """Idempotent."""
        while self._open:
            os.close(self._open.popitem()[1])


class ShardStore:
    """A store client (``store.Store``) over a folder of records, for reading alone; keys are record numbers.

    Args:
        folder: of an extraction.
    """

    kind = "shards"

    def __init__(self, folder: Path) -> None:
        self._reader = ShardReader(folder)

    def buffer(self, nbytes: int, *, device: str = "cpu") -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        return memory.pin_memory() if torch.cuda.is_available() else memory

    def release(self, buffer: Tensor) -> None:
        """Nothing: it is not kept here."""

    def get(self, keys: Sequence[str], outs: Sequence[Tensor]) -> list[int]:
        return [self._reader.read(int(key), out) for key, out in zip(keys, outs, strict=True)]

    def exists(self, keys: Sequence[str]) -> list[bool]:
        return [0 <= int(key) < len(self._reader) for key in keys]

    def put(self, keys: Sequence[str], values: Sequence[Tensor]) -> None:
        raise StoreError("io", keys[0] if keys else "", "records on disk are written by extract alone")

    def delete(self, keys: Sequence[str]) -> None:
        """Nothing: records stay for the next run."""

    def close(self) -> None:
        self._reader.close()
