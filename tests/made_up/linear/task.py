"""The computation of one batch: target distribution, loss, metric sums. Everything that touches a parameter happens inside ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.made_up.linear.config import LinearConfig, LinearOptions
from tests.made_up.linear.network import LinearDraft
from torchspec.batch import PackedBatch
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.models.family import Build
from torchspec.models.metrics import StepOutput
from torchspec.models.ops.head_loss import HeadPlan, head_loss
from torchspec.models.ops.loss_formulas import LossWeights, mixing
from torchspec.models.ops.shared_weight import wide
from torchspec.models.target_head import TargetHead


class LinearTask(nn.Module):
    """Draft and frozen target head.

    Args:
        draft: the network to train.
        head: the target's norm and head, rows of the draft vocabulary first.
        loss: which losses, by weight.
        dtype: of the computation.
    """

    mean_alpha: Tensor

    def __init__(self, draft: LinearDraft, head: TargetHead, *, loss: LossWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.draft, self.target_head, self.loss, self.dtype = draft, head, loss, dtype
        self.register_buffer("mean_alpha", torch.zeros(1), persistent=False)

    @classmethod
    def build(cls, config: LinearConfig, options: LinearOptions, build: Build) -> LinearTask:
        """A fresh task. Raises UserError for what of ``build`` this family does not have."""
        for field, value, known in (
            ("model.train_head", build.train_head, True),
            ("model.recompute", build.recompute, False),
            ("model.matmul", build.fp8.name.lower(), "none"),
        ):
            if value != known:
                raise UserError(field, value, "is not for a linear draft", "leave it out")
        head = TargetHead.of(build.target).to(working_dtype(build.target.dtype, build.device))
        pruned = build.vocabulary is not None and build.vocabulary.size < config.vocab_size
        draft = LinearDraft(config)
        with torch.no_grad():
            if build.init != "random":
                rows = head.weight[build.vocabulary.draft_ids] if build.vocabulary is not None and pruned else head.weight
                draft.head.weight.copy_(rows.float() * options.head_scale)
            if build.init == "target" and (norm := head.rms_weight()) is not None:
                draft.input_norm.weight.copy_(norm)
        if build.vocabulary is not None and pruned:
            head.put_first(build.vocabulary.draft_ids)
        return cls(draft, head, loss=build.loss, dtype=build.compute_dtype)

    @property
    def watched(self) -> Tensor:
        """A small weight that every loss reaches."""
        return self.draft.input_norm.weight

    def forward(self, batch: PackedBatch, measure: bool = False) -> StepOutput:
        """Loss and sums [1] of a batch; rows [R_0] are those of step 0 of an unroll."""
        base, draft = batch.rows.base, self.draft
        alpha_asked = measure or self.loss.needs_alpha
        if not base.numel():  # a zero tied to every parameter: this rank takes part in every collective
            zero = torch.stack([parameter.float().sum() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0
            names = ["rows", "correct", "correct_so_far", *(["alpha", "alpha_so_far"] if alpha_asked else []), "loss", "objective", "normaliser"]
            return StepOutput(zero, {name: zero.detach()[None] for name in names}, base, base)
        rows = torch.arange(base.numel(), device=base.device)
        plan = HeadPlan(
            self.target_head,
            batch.last[base + 1],
            target=rows,  # each state's target is the row of its own
            uses=torch.ones_like(batch.rows.depth),
            group=torch.zeros_like(rows),  # one step
            scale=1.0 / batch.counts[:1].to(wide(self.dtype)).clamp(min=1.0),
            mixing=mixing(self.mean_alpha),
            weights=self.loss,
            eps=draft.config.eps,
            measure=measure,
            train=torch.is_grad_enabled(),
        )
        found = head_loss(plan, [batch.aux[base].to(self.dtype)], draft.input_norm.weight, draft.head.weight)
        loss_sum = found.per_row.sum()[None]
        right = found.hit.sum()[None].to(loss_sum.dtype)
        sums = {"rows": torch.full_like(right, base.numel()), "correct": right, "correct_so_far": right}
        if found.alpha is not None:
            sums |= {"alpha": found.alpha.sum()[None], "alpha_so_far": found.alpha.sum()[None]}
        followed = base.new_zeros(0)
        if found.chosen is not None:
            token = found.chosen if self.target_head.order is None else self.target_head.order[found.chosen]
            followed = (token == batch.input_ids[base + 2]).long()
        sums |= {"loss": loss_sum, "objective": loss_sum, "normaliser": sums["rows"]}  # the one step weighs 1
        return StepOutput(found.loss, sums, found.hit.long(), followed)
