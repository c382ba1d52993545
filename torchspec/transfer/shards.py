"""Records on disk: safetensors shards that any program can open, written in a stream and read by conversation in any order.

A folder holds ``manifest.json`` (what every record says of itself) and ``records-<part>-<number>.safetensors``. A shard holds its records one after the other
and its own index:

    input_ids [N] int32    aux [M, n*D]    last [M, D]                     N tokens, M <= N rows of states
    key [S] int64          tokens, rows [S] int32    checksum [S] int64    S records; key: XXH3-64 of the ids; checksum: of the bytes stored here
    aux_scale [M, n] float32    last_scale [M, 1] float32                  fp8 only: states are float8_e4m3fn times these

A shard appears under its name when it is whole; what a killed writer left has another name. Reading a record is a few ``pread`` calls.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from torchspec.errors import UserError
from torchspec.transfer.record import Record
from torchspec.transfer.spec import RecordSpec

FORMAT = 1
FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_NAME = re.compile(r"records-(.+)-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """What a folder of records says of itself."""

    spec: RecordSpec
    stored: str
    """exact (bit for bit what the engine wrote) or fp8."""

    def write(self, folder: Path) -> None:
        """Write it, or check that the one there is the same.

        Raises:
            UserError: when the folder holds other records, by the field that differs.
        """
        if (folder / "manifest.json").is_file():
            there = Manifest.read(folder)
            for name, value in {**self.spec.to_dict(), "stored": self.stored}.items():
                before = {**there.spec.to_dict(), "stored": there.stored}[name]
                if before != value:
                    raise UserError("output", str(folder), f"holds records whose {name} is {before!r}, not {value!r}", "give another folder")
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".manifest.{os.getpid()}"
        temporary.write_text(json.dumps({"format": FORMAT, "stored": self.stored, "record": self.spec.to_dict()}, indent=1) + "\n")
        temporary.replace(folder / "manifest.json")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: when there is none, or of another format.
        """
        try:
            plain = json.loads((folder / "manifest.json").read_text())
            if plain["format"] != FORMAT:
                raise UserError("data.records", str(folder), f"has format {plain['format']}, this version reads {FORMAT}", "extract again")
            return cls(RecordSpec.from_dict(plain["record"]), plain["stored"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("data.records", str(folder), "holds no records (no readable manifest.json)", "make them: main.py extract") from error


class ShardWriter:
    """Writes records as they come; used by several threads.

    Args:
        folder: created where it is missing.
        spec: of the records.
        part: name of this writer among those that write the same folder at once.
        shard_bytes: a shard is written when its records reach this; about twice as much memory is held.
        fp8: store states in 8 bits with a scale a row and layer.

    Raises:
        UserError: when the folder holds records of another spec.
    """

    def __init__(self, folder: Path, spec: RecordSpec, *, part: str = "0", shard_bytes: int = 256 << 20, fp8: bool = False) -> None:
        Manifest(spec, "fp8" if fp8 else "exact").write(folder)
        for left in folder.glob(f".records-{part}-*.safetensors"):
            if _NAME.fullmatch(left.name[1:]) and left.is_file():
                left.unlink()
        self.folder, self.spec, self.part, self.fp8, self._limit = folder, spec, part, fp8, shard_bytes
        there = shards_in(folder)
        self.known = {int(key) for shard in there for key in read_tensor(shard, "key")}
        self._number = 1 + max((number for file in there for name, number in [_part_of(file)] if name == part), default=-1)
        self._lock = threading.Lock()
        self._held: list[dict[str, Tensor]] = []
        self._bytes = 0
        self._error = np.zeros(2)
        self.written = 0
        """Bytes of finished shards."""

    @property
    def fp8_error(self) -> float:
        """Root of the mean square of what fp8 changed, relative to that of the states."""
        return float(np.sqrt(self._error[0] / max(self._error[1], 1e-300)))

    def add(self, record: Record, key: int) -> None:
        """Take over one record (copied) under its conversation's key; one that is there already is left as it is."""
        with self._lock:
            if signed(key) in self.known:
                return
            self.known.add(signed(key))
            parts = {
                "input_ids": record.input_ids.clone(),
                **self._states("aux", record.aux, len(self.spec.aux_layers)),
                **self._states("last", record.last, 1),
            }
            sizes = torch.tensor([record.input_ids.numel(), record.aux.shape[0]], dtype=torch.int32)
            parts.update(tokens=sizes[:1], rows=sizes[1:], key=_int64(key), checksum=_int64(checksum_of(parts)))
            self._held.append(parts)
            self._bytes += sum(part.nbytes for part in parts.values())
            if self._bytes >= self._limit:
                self._flush()

    def _states(self, name: str, states: Tensor, layers: int) -> dict[str, Tensor]:
        if not self.fp8:
            return {name: states.clone()}
        grouped = states.float().view(states.shape[0], layers, self.spec.hidden_size)
        scale = (grouped.abs().amax(-1, keepdim=True) / _FP8_MAX).clamp_min(1e-12)
        stored = (grouped / scale).to(FP8)
        self._error += [float((stored.float() * scale - grouped).square().sum()), float(grouped.square().sum())]
        return {name: stored.view(states.shape), f"{name}_scale": scale.view(states.shape[0], layers)}

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._held:
            return
        name = f"records-{self.part}-{self._number:05d}.safetensors"
        whole = {key: torch.cat([parts[key] for parts in self._held]) for key in self._held[0]}
        save_file(whole, self.folder / f".{name}", metadata={"format": "pt", "records": str(len(self._held)), "fp8_relative_rms": f"{self.fp8_error:.4g}"})
        os.replace(self.folder / f".{name}", self.folder / name)
        self.written += (self.folder / name).stat().st_size
        self._number += 1
        self._held, self._bytes = [], 0

    def close(self) -> None:
        """Write what is left. Idempotent."""
        with self._lock:
            self._flush()


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder, in order; other files beside them are nobody's business here.

    Raises:
        UserError: a file has a shard's name and is none, so that its records would be missed, or written over.
    """
    found = sorted(path for path in folder.glob("records-*.safetensors") if _NAME.fullmatch(path.name))
    for file in found:
        lacking = sorted({"key", "tokens", "rows", "checksum", "input_ids"} - read_header(file)[1].keys())
        if lacking:
            raise UserError("data.records", str(file), f"is no shard of records (it holds no {lacking[0]})", "move it out of the folder")
    return found


def _part_of(file: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(file.name)
    assert match is not None, "from shards_in"
    return match[1], int(match[2])


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors begin, their table) of a safetensors file."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length))
        end = 8 + length + max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
        if file.stat().st_size != end:
            raise ValueError(f"{file.stat().st_size} bytes instead of {end}")
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise UserError("data.records", str(file), f"is a damaged shard ({error})", "delete it and extract again") from error
    return 8 + length, header


def read_tensor(file: Path, name: str, header: tuple[int, dict[str, Any]] | None = None) -> np.ndarray:
    """One small tensor of a shard."""
    begin, data = header or read_header(file)
    low, high = data[name]["data_offsets"]
    dtype = {"I64": "<i8", "I32": "<i4"}[data[name]["dtype"]]
    return np.fromfile(file, dtype=dtype, count=(high - low) // np.dtype(dtype).itemsize, offset=begin + low)


def checksum_of(parts: dict[str, Tensor]) -> int:
    digest = xxhash.xxh3_64()
    for name in ("input_ids", "aux", "last", "aux_scale", "last_scale"):
        if name in parts:
            digest.update(parts[name].view(torch.uint8).numpy().reshape(-1).data)
    return digest.intdigest()


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def _int64(key: int) -> Tensor:
    return torch.tensor([signed(key)], dtype=torch.int64)
