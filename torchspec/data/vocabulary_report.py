"""How much of what the target says a smaller draft vocabulary covers: counts kept in a file, a table, and a plot drawn as SVG (no plotting library needed)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.files import write

SIZES = (4096, 8192, 16384, 32768, 65536, 98304)
"""Draft vocabularies that are reported."""


@dataclass(frozen=True)
class TokenCounts:
    """How often a target's answers use each token."""

    counts: Tensor
    """[V] int64 supervised occurrences."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer; every draft vocabulary keeps them."""
    target: str
    """Fingerprint of the target."""

    def save(self, file: Path, **tensors: Tensor) -> None:
        """Write a safetensors file with ``counts``, and with it what else is given."""
        from safetensors.torch import save

        metadata = {"format": "pt", "target": self.target, "end_ids": json.dumps(list(self.end_ids))}
        write(file, save({"counts": self.counts, **{name: tensor.contiguous() for name, tensor in tensors.items()}}, metadata=metadata))

    @classmethod
    def is_one(cls, file: Path) -> bool:
        """Whether a file is one that :meth:`save` wrote."""
        try:
            cls.load(file, field="output")
        except UserError:
            return False
        return True

    @classmethod
    def load(cls, file: Path, *, field: str) -> TokenCounts:
        """Read a file that :meth:`save` wrote.

        Args:
            field: the option that named it, for errors.

        Raises:
            UserError: for another file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                return cls(opened.get_tensor("counts"), tuple(json.loads(metadata["end_ids"])), metadata["target"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(field, str(file), f"is no file of token counts ({error})", "make one: main.py vocabulary") from error


def coverage(counts: Tensor, size: int, *, always: Sequence[int] = ()) -> float:
    """Share of the counted tokens that the ``size`` most frequent cover, ``always`` among them; counts [V]."""
    rank = counts.clone()
    rank[list(always)] = torch.iinfo(torch.int64).max
    kept = torch.topk(rank, min(size, counts.numel())).indices
    return float(counts[kept].sum()) / max(float(counts.sum()), 1.0)


def table(found: TokenCounts) -> str:
    """Lines of size, coverage, and what is left out, for the sizes below the target's vocabulary."""
    total = found.counts.numel()
    lines = [f"{'tokens':>8}  {'covered':>9}  {'left out, one in':>17}"]
    for size in [size for size in SIZES if size < total] + [total]:
        share = coverage(found.counts, size, always=found.end_ids)
        one_in = f"{1 / (1 - share):,.0f}" if share < 1 else "never"
        lines.append(f"{size:>8,}  {share:>9.3%}  {one_in:>17}")
    return "\n".join(lines)


def is_plot(file: Path) -> bool:
    """Whether a file is one that :func:`plot` drew."""
    try:
        text = file.read_bytes()
    except OSError:
        return False
    return text.startswith(b"<svg") and b"draft vocabulary, of " in text


def plot(found: TokenCounts, *, title: str) -> str:
    """Coverage over the size of the draft vocabulary (logarithmic), as SVG."""
    total = found.counts.numel()
    running = torch.cumsum(torch.sort(found.counts, descending=True).values, 0).double() / max(int(found.counts.sum()), 1)
    low, high = math.log2(min(256, total)), math.log2(total)
    left, top, width, height = 60, 40, 560, 260
    floor = min(float(running[min(256, total) - 1]), 0.99)

    def x(size: float) -> float:
        return left + width * (math.log2(size) - low) / max(high - low, 1e-9)

    def y(share: float) -> float:
        return top + height * (1 - (share - floor) / (1 - floor))

    steps = [2 ** (low + (high - low) * i / 120) for i in range(121)]
    line = " ".join(f"{x(size):.1f},{y(float(running[min(round(size), total) - 1])):.1f}" for size in steps)
    marks, grid = [], []
    for size in (s for s in SIZES if s < total):
        share = coverage(found.counts, size, always=found.end_ids)
        marks.append(
            f'<circle cx="{x(size):.1f}" cy="{y(share):.1f}" r="3.5" fill="#2a6"/>'
            f'<text x="{x(size):.1f}" y="{y(share) + 18:.1f}" text-anchor="middle">{share:.2%}</text>'
            f'<text x="{x(size):.1f}" y="{top + height + 18}" text-anchor="middle">{size // 1024}k</text>'
        )
    for i in range(5):
        share = floor + (1 - floor) * i / 4
        grid.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.1%}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" height="{top + height + 50}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{left}" y="22" font-size="14">{title}</text>{"".join(grid)}'
        f'<polyline points="{line}" fill="none" stroke="#2a6" stroke-width="2"/>{"".join(marks)}'
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">draft vocabulary, of {total:,} tokens</text></svg>\n'
    )
