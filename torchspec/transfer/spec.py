"""What a record is, in plain numbers: the run's expectation and the byte layout that follows from it. Imports no torch, for the coordinator's sake."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 2048
SCHEMA = 1
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element of the types that states are stored in."""


@dataclass(frozen=True)
class Layout:
    """Byte offsets inside a record."""

    ids: int
    aux: int
    last: int
    total: int


@dataclass(frozen=True)
class RecordSpec:
    """What every record of a run must say of itself; the trainer's expectation and the engine's promise."""

    target: str
    """Fingerprint of the target (``Target.fingerprint``)."""
    tokenizer: str
    """Fingerprint of the tokenizer and chat template, or "" when rows came pre-tokenised."""
    aux_layers: tuple[int, ...]
    """Hidden-state indices in Transformers' counting, strictly increasing."""
    hidden_size: int
    """D."""
    dtype: str
    """bfloat16, float16 or float32."""
    schema: int = SCHEMA

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's own."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def layout(self, tokens: int, rows: int) -> Layout:
        """Byte offsets of a record of T = ``tokens`` ids and R = ``rows`` states."""
        size = ITEMSIZE[self.dtype]
        ids = HEADER_BYTES
        aux = _align(ids + 4 * tokens)
        last = _align(aux + rows * len(self.aux_layers) * self.hidden_size * size)
        return Layout(ids, aux, last, _align(last + rows * self.hidden_size * size))

    def nbytes(self, tokens: int) -> int:
        """Bytes of credit that a sample of ``tokens`` ids needs (R = T, the larger case)."""
        return self.layout(tokens, tokens).total

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Asked for with every record, hence no ``asdict``, which copies deeply."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "aux_layers": list(self.aux_layers)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RecordSpec:
        known = {f.name for f in fields(cls)}
        return cls(**{**{k: v for k, v in plain.items() if k in known}, "aux_layers": tuple(plain["aux_layers"])})


def _align(n: int) -> int:
    return (n + 63) // 64 * 64
