"""Metrics of the unroll as sums and counts, so that they add up exactly over packs, ranks and micro-batches.

``expected acceptance`` counts the bonus token: 1 + mean over positions of the sum over steps of the product of what came before. It is a training signal; the
figure that compares with a server is the serving walk (``serving_walk``), which jumps over what was accepted as serving does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchspec.batch import PackedBatch


class StepOutput(NamedTuple):
    """Result of a batch on this rank.

    A named tuple, because FSDP2 hooks into the tensors that torch's pytree finds in a module's output: in a dataclass torch 2.11 finds none, and then
    gradients are neither reduced nor given to the optimizer, without a word.
    """

    loss: Tensor
    """Scalar: sum_k w_k * (this rank's loss sum of step k) / count_k; adds up over ranks and micro-batches to the loss of the optimizer step."""
    sums: dict[str, Tensor]
    """[K] each: ``rows`` supervised here, ``loss``, ``correct``, ``correct_so_far`` (this and every earlier step right), and when measured ``alpha``,
    ``alpha_so_far``; ``objective``: weight times loss, as it is trained, and ``normaliser``, what that is divided by, so that the loss over many batches is
    the sum over k of ``objective`` / ``normaliser``."""
    accepted: Tensor
    """[R_0] int64: leading right steps of each supervised row, the target's most likely token being right."""
    followed: Tensor
    """[R_0] int64, when measured: leading steps whose most likely token of the draft is the token that stands there. On
    answers that were sampled, that is what a server accepts of greedy drafts: token v with the probability that the
    target gives it, which is how the answer was drawn."""


@dataclass(frozen=True)
class StepSums:
    """Sums over positions, one row a quantity, one column an unroll step.

    ``table`` [Q, K] float64 in the order of ``names``; ``names`` holds ``rows`` (supervised positions seen) among others.
    """

    names: tuple[str, ...]
    table: Tensor

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> StepSums:
        """Nothing seen."""
        return cls(("rows",), torch.zeros(1, steps, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, output: StepOutput, batch: PackedBatch) -> StepSums:
        """Sums of one batch."""
        return cls(tuple(output.sums), torch.stack([value.detach().double() for value in output.sums.values()]))

    def add(self, output: StepOutput, batch: PackedBatch) -> StepSums:
        """These sums and one batch more."""
        return StepSums(self.names, self.table + StepSums.of(output, batch).table)

    def plus(self, other: StepSums) -> StepSums:
        """These sums and others; one of the two may have seen nothing."""
        if self.names != other.names:
            return max(self, other, key=lambda sums: len(sums.names))
        return StepSums(self.names, self.table + other.table)

    def reduce(self, strategy: Any) -> StepSums:
        """Summed over ranks; every rank must call it."""
        return StepSums(self.names, strategy.reduce(self.table, reduce_op="sum"))

    def metrics(self, trained: int) -> dict[str, float]:
        """Means by their names in the logs. One transfer to the host.

        Args:
            trained: K of the training: what is over all steps is over those.
        """
        sums = dict(zip(self.names, self.table.tolist(), strict=True))
        rows = sums["rows"]
        mean = {name: [value / max(count, 1.0) for value, count in zip(values, rows, strict=True)] for name, values in sums.items()}
        values: dict[str, float] = {}
        if "loss" not in sums:
            return {"loss": 0.0, "expected_acceptance_greedy": 1.0}
        values["loss"] = sum(part / max(count, 1.0) for part, count in zip(sums["objective"], sums["normaliser"], strict=True))
        for k in range(len(rows)):
            values[f"loss_{k}"] = mean["loss"][k]
            values[f"accuracy_{k}"] = mean["correct"][k]
            # of the positions where every earlier step was right
            values[f"conditional_accuracy_{k}"] = sums["correct_so_far"][k] / max(sums["correct_so_far"][k - 1] if k else rows[0], 1.0)
        first = max(rows[0], 1.0)
        values["expected_acceptance_greedy"] = 1.0 + sum(sums["correct_so_far"][:trained]) / first
        if "alpha" in sums:
            for k in range(len(rows)):
                values[f"alpha_{k}"] = mean["alpha"][k]
            values["expected_acceptance_sampling"] = 1.0 + sum(sums["alpha_so_far"][:trained]) / first
        return values


def logs_now(trainer: Any) -> bool:
    """Whether the step just done is one that is logged: every ``trainer.log_every_n_steps``-th, and none where that is 0 (Lightning's way to log none)."""
    every = trainer.log_every_n_steps
    return bool(every) and trainer.global_step % every == 0


def serving_walk(accepted: list[int], turns: list[int], k: int) -> tuple[int, int, list[int]]:
    """Walk along answers as a server does, jumping over what was accepted.

    At each stop the draft proposes ``k`` tokens, the first ``r = min(accepted, k)`` are right, and the server moves on by r + 1.

    Args:
        accepted: leading right steps of each supervised row, in order (``StepOutput.accepted``).
        turns: turn index of each of these rows; rows of a turn are consecutive, the first is where its answer begins.
        k: tokens proposed at a time.

    Returns:
        (stops, accepted tokens, stops at which position i was accepted for i < k). Acceptance length is 1 + accepted / stops.
    """
    stops, total = 0, 0
    positions = [0] * k
    row, n = 0, len(accepted)
    while row < n:
        end = row
        while end < n and turns[end] == turns[row]:
            end += 1
        while row < end:
            right = min(accepted[row], k)
            stops += 1
            total += right
            for i in range(right):
                positions[i] += 1
            row += right + 1
        row = end
    return stops, total, positions
