"""Sizes in bytes as people write them: "1GiB", "500MB", "65536"."""

from __future__ import annotations

import re

from torchspec.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)})
_UNITS.update({f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)})


def parse_bytes(text: str | int, *, field: str = "data.store.budget") -> int:
    """Bytes that ``text`` stands for.

    Example:
        >>> parse_bytes("1.5GiB"), parse_bytes("500MB"), parse_bytes(4096)
        (1610612736, 500000000, 4096)

    Args:
        text: a number with an optional unit: B, KB MB GB TB (powers of 1000) or KiB MiB GiB TiB (powers of 1024), in any case.
        field: config key to name in the error.

    Raises:
        UserError: not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UserError(field, text, "is not a size in bytes", 'write a number with a unit, such as "1GiB" or "500MB"')
    size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size <= 0:
        raise UserError(field, text, "is not above zero", 'write a size such as "1GiB"')
    return size


def show_bytes(size: float) -> str:
    """``size`` bytes for people, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
