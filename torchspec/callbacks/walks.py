"""Serving walks over batches, as sums that add up over batches and ranks: of looping conversations apart from the
others, for several k; and the watch on training's and validation's walks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchspec.batch import PackedBatch
from torchspec.looping import LOOPING, repeats
from torchspec.models.metrics import serving_walk

SHOWN_FROM = 0.1
"""Share of repeated text from which on figures are also given without looping conversations."""


@dataclass(frozen=True)
class Walk:
    """One figure."""

    length: float
    """Tokens a pass of the target: 1 + accepted / drafts."""
    rates: tuple[float, ...]
    """How often each position of a draft is accepted."""
    drafts: int


class Walks:
    """Sums of the walks of a validation set.

    Args:
        ks: numbers of tokens proposed at a time.
        looping: whether conversations that loop are told from the others.

    Attributes:
        table: [2, C] float64, conversations that do not loop and those that do; C: 8-grams of answers, those that stood
            there before, and for each k drafts, accepted tokens, and drafts accepted at each position.
    """

    def __init__(self, ks: Sequence[int], *, looping: bool = True) -> None:
        self.ks, self.looping = tuple(ks), looping
        self.table = torch.zeros(2, 2 + sum(2 + k for k in self.ks), dtype=torch.float64)
        self._loops: dict[int, tuple[int, int]] = {}

    def clear(self) -> None:
        """Begin anew; what is known of the set's answers stays."""
        self.table = torch.zeros_like(self.table)

    def add(self, accepted: Tensor, batch: PackedBatch) -> None:
        """The walks of a batch.

        Args:
            accepted: [R_0] leading right steps of each supervised row.
            batch: of these rows.
        """
        turns, owner = batch.turn[batch.rows.base + 1], batch.sequence[batch.rows.base]
        found = self._looping(batch)
        kinds = np.array([pieces > 0 and again > LOOPING * pieces for pieces, again in found], dtype=np.int64)
        for kind, (pieces, again) in zip(kinds.tolist(), found, strict=True):
            self.table[kind, :2] += torch.tensor([pieces, again], dtype=torch.float64)
        right, turn, whose = np.array(accepted.tolist(), dtype=np.int64), np.array(turns.tolist()), np.array(owner.tolist(), dtype=np.int64)
        for kind in (0, 1):
            mine = kinds[whose] == kind if whose.size else np.zeros(0, dtype=bool)
            row: list[int] = []
            for k in self.ks:
                stops, taken, positions = serving_walk(right[mine].tolist(), turn[mine].tolist(), k)
                row += [stops, taken, *positions]
            self.table[kind, 2:] += torch.tensor(row, dtype=torch.float64)

    def _looping(self, batch: PackedBatch) -> list[tuple[int, int]]:
        """8-grams of each conversation's answers, and those that stood in the same answer before."""
        if not self.looping:
            return [(0, 0)] * len(batch.sample_ids)
        if any(sample not in self._loops for sample in batch.sample_ids):
            ids, turn, bounds = np.array(batch.input_ids.tolist()), np.array(batch.turn.tolist()), batch.cu_seqlens.tolist()
            for sample, low, high in zip(batch.sample_ids, bounds[:-1], bounds[1:], strict=True):
                own, ours = ids[low:high], turn[low:high]
                counts = [repeats(own[ours == answer]) for answer in np.unique(ours[ours >= 0])]
                self._loops[sample] = sum(pieces for pieces, _ in counts), sum(again for _, again in counts)
        return [self._loops[sample] for sample in batch.sample_ids]


def looping_share(table: Tensor) -> float:
    """Share of the answers' 8-grams that repeat earlier ones, of a table as :class:`Walks` has it."""
    pieces, again = table[:, :2].sum(0).tolist()
    return float(again / max(pieces, 1.0))


def walks_of(table: Tensor, ks: Sequence[int], *, looping: bool = True) -> dict[int, Walk]:
    """The figure of each k, with or without looping conversations."""
    row = (table.sum(0) if looping else table[0]).tolist()[2:]
    found: dict[int, Walk] = {}
    for k in ks:
        stops, taken, *positions = row[: 2 + k]
        row = row[2 + k :]
        most = max(stops, 1.0)
        found[k] = Walk(1.0 + taken / most, tuple(count / most for count in positions), int(stops))
    return found


class Parting:
    """Says when the walk on training data leaves the one on validation data behind.

    How much easier one data set is than the other shows in the first epoch, in which nothing is seen twice; what is
    added later is over-fitting.
    """

    _MOST = 1.15
    """Growth of the ratio of accepted drafts, training to validation, from which on they part; and more than three
    standard errors, counts being Poisson's."""

    def __init__(self) -> None:
        self._usual: tuple[float, float] | None = None
        self._said = False

    def look(self, *, train: Walk, validate: Walk, epoch: int, step: int) -> str | None:
        """What to warn of, once a run; None where there is nothing.

        Args:
            train, validate: at the same k.
            epoch: of the trainer, from 0.
            step: optimizer steps done.
        """
        counts = [(walk.length - 1.0) * walk.drafts for walk in (train, validate)]
        if min(counts) < 1.0:
            return None
        ratio, variance = (train.length - 1.0) / (validate.length - 1.0), sum(1.0 / count for count in counts)
        if epoch == 0 or self._usual is None:
            self._usual = ratio, variance
            return None
        growth, error = ratio / self._usual[0], (variance + self._usual[1]) ** 0.5
        if self._said or growth < self._MOST or math.log(growth) < 3.0 * error:
            return None
        self._said = True
        return (
            f"step {step}: acceptance length is {train.length:.3f} on training data and {validate.length:.3f} on validation data; against the first epoch "
            f"{growth - 1:.0%} more drafts are accepted where it has trained: it over-fits. More data, fewer epochs, a lower rate or more weight decay help"
        )

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {"usual": self._usual, "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back from :meth:`state_dict`."""
        self._usual, self._said = state["usual"], state["said"]
