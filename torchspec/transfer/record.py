"""One record: everything a trainer needs of one sample, as one flat run of bytes under one key.

Layout, each part starting at a multiple of 64 bytes:

    [ header 2048 B | input_ids int32 [T] | aux dtype [R, n*D] | last dtype [R, D] ]

The header is a magic word, a length and a JSON manifest, padded with zeros. R is T or T-1: the last row of a conversation is
never read. The layout is a function of (spec, T, R) alone, so a writer can copy into views of a registered buffer, a reader can
read straight into one, and the byte credit of a sample is known before it is computed. No pickle anywhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from torchspec.transfer.spec import HEADER_BYTES, SCHEMA, Layout, RecordSpec

__all__ = ["HEADER_BYTES", "MAGIC", "SCHEMA", "Layout", "Record", "RecordError", "RecordSpec", "open_record", "seal", "views"]

MAGIC = b"TSPECREC"


NOT_FINITE = "its states hold NaN or infinity: run the target in bfloat16 or float32 (data.target.dtype)"
_EXPONENT = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00), torch.float32: (torch.int32, 0x7F800000)}
"""Of each type of states: its bits as an integer, and those of the exponent, all of which NaN and infinity have."""


class RecordError(Exception):
    """A record that must not be trained on: damaged, or not what this run expects. The message names the field."""


@dataclass(frozen=True)
class Record:
    """Views into a record's bytes."""

    input_ids: Tensor
    """[T] int32."""
    aux: Tensor
    """[R, n*D]."""
    last: Tensor
    """[R, D], before the target's final norm."""
    manifest: dict[str, Any]


def views(buffer: Tensor, spec: RecordSpec, tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Typed views (input_ids [T], aux [R, n*D], last [R, D]) into ``buffer``, to be filled by a writer.

    Args:
        buffer: [>= layout.total] uint8, 64-byte aligned, on the host or a device.
    """
    at = spec.layout(tokens, rows)
    size, width = spec.torch_dtype.itemsize, len(spec.aux_layers) * spec.hidden_size
    ids = buffer[at.ids : at.ids + 4 * tokens].view(torch.int32)
    aux = buffer[at.aux : at.aux + rows * width * size].view(spec.torch_dtype).view(rows, width)
    last = buffer[at.last : at.last + rows * spec.hidden_size * size].view(spec.torch_dtype).view(rows, spec.hidden_size)
    return ids, aux, last


def seal(buffer: Tensor, spec: RecordSpec, tokens: int, rows: int, *, producer: str, checksum: bool = True) -> Tensor:
    """Write the header of a filled buffer and return the record's bytes.

    Args:
        producer: engine and version, for people.
        checksum: XXH3-64 of everything after the header; off where the bytes are on a device (the transport guards them).
    """
    at = spec.layout(tokens, rows)
    whole = buffer[: at.total]
    manifest = {**spec.to_dict(), "tokens": tokens, "rows": rows, "producer": producer}
    if checksum:
        manifest["xxh3"] = _digest(whole)
    text = json.dumps(manifest, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES - 12:
        raise RecordError(f"manifest of {len(text)} bytes does not fit the header of {HEADER_BYTES}")
    head = MAGIC + len(text).to_bytes(4, "little") + text
    whole[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(head.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8))
    return whole


def open_record(buffer: Tensor, spec: RecordSpec, *, verify: bool = True) -> Record:
    """Views into received bytes, after checking that they are what this run expects.

    Args:
        buffer: [>= record] uint8 on the host.
        spec: the run's expectation.
        verify: also compare the checksum, where the record carries one.

    Raises:
        RecordError: naming the first field that differs, or the damage.
    """
    head = bytes(buffer[:HEADER_BYTES].numpy())
    if head[:8] != MAGIC:
        raise RecordError("magic word missing: these bytes are no record")
    length = int.from_bytes(head[8:12], "little")
    try:
        manifest = json.loads(head[12 : 12 + length])
    except (ValueError, RecursionError) as error:
        raise RecordError("manifest is not readable JSON") from error
    if not isinstance(manifest, dict):
        raise RecordError("manifest is no JSON object")
    for name, expected in spec.to_dict().items():
        if manifest.get(name) != expected:
            raise RecordError(f"manifest field {name!r} is {manifest.get(name)!r}, this run expects {expected!r}")
    tokens, rows = manifest.get("tokens"), manifest.get("rows")
    if type(tokens) is not int or type(rows) is not int or tokens < 1:
        raise RecordError(f"manifest fields 'tokens' and 'rows' are {tokens!r} and {rows!r}, no counts")
    if rows not in (tokens, tokens - 1):
        raise RecordError(f"{rows} rows of states for {tokens} tokens; expected {tokens} or {tokens - 1}")
    total = spec.layout(tokens, rows).total
    if buffer.numel() < total:
        raise RecordError(f"{buffer.numel()} bytes, the manifest needs {total}")
    if verify and "xxh3" in manifest and manifest["xxh3"] != _digest(buffer[:total]):
        raise RecordError("checksum differs: the bytes were damaged on the way")
    return Record(*views(buffer, spec, tokens, rows), manifest)


def is_finite(record: Record) -> bool:
    """Whether all states of a record on the host are numbers; three times as fast as ``torch.isfinite`` on a CPU, and without its memory."""
    for states in (record.aux, record.last):
        kind, bits = _EXPONENT[states.dtype]
        if states.numel() and int(np.bitwise_and(states.view(kind).numpy(), bits).max()) == bits:
            return False
    return True


def _digest(whole: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(whole[HEADER_BYTES:].numpy().data)
