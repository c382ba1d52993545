"""Every loss by its textbook formula, one row at a time in fp64, with gradients by autograd through plain softmaxes; and ours on the same random states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.models.differences import relative
from tests.models.packs import PlainNorm
from torchspec.models.ops.head_loss import HeadPlan, head_loss
from torchspec.models.ops.loss_formulas import LossWeights, mixing
from torchspec.models.target_head import TargetHead

V, D, H = 23, 8, 6
PRUNED = [0, 2, 3, 5, 7, 11, 12, 13, 17, 19, 22]
NAMES = ["forward_kl", "cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda"]
SCALE = [0.5, 0.3]
MEAN_ALPHA = [0.4, 0.2]


def textbook(name: str, z: Tensor, full: Tensor, ids: list[int], mean_alpha: float) -> Tensor:
    """One row: draft logits z over ``ids``, target probabilities ``full`` over the vocabulary."""
    q = torch.softmax(z, 0)
    true = full[ids]
    p = true / true.sum()
    alpha = sum(torch.minimum(true[v], q[v]) for v in range(len(ids)))
    if name == "forward_kl":
        return -(p * q.log()).sum()
    if name == "cross_entropy":
        return -q[ids.index(int(full.argmax()))].log()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    if name == "jsd":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    if name == "tv":
        return 1 - alpha  # type: ignore[no-any-return]
    if name == "lk_alpha":
        return -alpha.log()  # type: ignore[union-attr]
    share = math.exp(-3.0 * mean_alpha)
    return share * textbook("forward_kl", z, full, ids, 0.0) + (1 - share) * textbook("tv", z, full, ids, 0.0)


class Setting:
    """Random states, norm and heads: a vocabulary of 23, or ``ids`` of it, two steps.

    Args:
        ids: of a pruned draft vocabulary; None for the whole.
    """

    def __init__(self, ids: list[int] | None) -> None:
        torch.manual_seed(3)
        kind = torch.float64
        self.ids = ids
        self.head = TargetHead(torch.randn(V, D), None, norm_module=PlainNorm(D), norm_tensors={"weight": 1 + 0.2 * torch.randn(D)}).to(kind)
        if ids is not None:
            self.head.put_first(torch.tensor(ids))
        self.last = torch.randn(9, D, dtype=kind)
        self.index = (torch.tensor([0, 1, 2, 4, 5, 7, 8]), torch.tensor([0, 1, 4, 7]))
        self.states = [torch.randn(len(i), H, dtype=kind, requires_grad=True) for i in self.index]
        self.norm = (1 + 0.3 * torch.randn(H, dtype=kind)).requires_grad_()
        self.weight = torch.randn(len(ids) if ids else V, H, dtype=kind).requires_grad_()

    def inputs(self) -> list[Tensor]:
        return [*self.states, self.norm, self.weight]

    def expected(self, weights: dict[str, float], label: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[float]]:
        """Loss, gradients and loss sums by step, of the textbook; with labels cross-entropy is theirs."""
        ids = self.ids or list(range(V))
        total, sums = torch.zeros((), dtype=torch.float64), []
        for k, (index, state) in enumerate(zip(self.index, self.states, strict=True)):
            summed = torch.zeros((), dtype=torch.float64)
            for row, j in enumerate(index.tolist()):
                full = torch.softmax(self.head.logits(self.last[j + k][None])[0], 0)
                x = state[row]
                z = self.weight @ (x / torch.sqrt((x * x).mean() + 1e-5) * self.norm)
                given = None if label is None else int(label[len(self.index[0]) * k + row])
                if given is not None and given >= 0:
                    summed = summed - weights.get("cross_entropy", 0.0) * torch.log_softmax(z, 0)[given]
                if int(full.argmax()) not in ids:
                    continue
                left = weights if given is None else {name: w for name, w in weights.items() if name != "cross_entropy"}
                summed = summed + sum(w * textbook(name, z, full, ids, MEAN_ALPHA[k]) for name, w in left.items())
            total = total + SCALE[k] * summed
            sums.append(float(summed.detach()))
        return total, list(torch.autograd.grad(total, self.inputs())), sums

    def found(self, weights: dict[str, float], measure: bool, label: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[float]]:
        """Loss, gradients of three times the loss, and loss sums by step, of the fast path."""
        losses = LossWeights.of(weights)
        target = torch.cat([entries + k for k, entries in enumerate(self.index)])
        plan = HeadPlan(
            self.head, self.last, target=target, uses=target.bincount(minlength=self.last.shape[0]),
            group=torch.cat([torch.full_like(entries, k) for k, entries in enumerate(self.index)]), scale=torch.tensor(SCALE, dtype=torch.float64),
            mixing=mixing(torch.tensor(MEAN_ALPHA, dtype=torch.float64)), weights=losses, eps=1e-5, measure=measure, train=True, label=label,
        )  # fmt: skip
        result = head_loss(plan, self.states, self.norm, self.weight)
        sums = [float(part.sum()) for part in result.per_row.split([len(entries) for entries in self.index])]
        return result.loss, list(torch.autograd.grad(result.loss * 3.0, self.inputs())), sums


def against_textbook(weights: dict[str, float], ids: list[int] | None) -> dict[str, float]:
    """Relative differences of ``value`` and ``gradient``."""
    setting = Setting(ids)
    total, slow, _ = setting.expected(weights)
    value, fast, _ = setting.found(weights, False)
    return {"value": relative(value, total), "gradient": max(relative(got, 3.0 * want) for want, got in zip(slow, fast, strict=True))}
