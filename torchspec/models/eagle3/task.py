"""The whole training computation of one batch in one module: draft, target head, loss, metric sums. This is what gets sharded.

Everything that touches a parameter happens inside ``forward``, so that FSDP2 gathers once and a rank with nothing to supervise still takes part in every
collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.family import Build
from torchspec.models.metrics import StepOutput
from torchspec.models.ops.fp8 import check
from torchspec.models.ops.head_loss import HeadPlan, HeadResult, head_loss
from torchspec.models.ops.loss_formulas import FORWARD_KL, LossWeights, mixing
from torchspec.models.ops.shared_weight import wide
from torchspec.models.target_head import TargetHead, is_tied, read_embedding, refuse_damaged
from torchspec.supervision import as_unroll

_FLAT = 0.3
"""Scale of the final norm at the start, see :func:`start_from_target`."""
_NOISE = 0.1
"""What is left of fc's random weights there."""


class DraftTask(nn.Module):
    """Draft and frozen target head.

    Args:
        draft: the network to train.
        head: the target's norm and head; its rows are sorted here.
        draft_ids: [W] target ids of the draft's rows; None for the whole vocabulary.
        step_weights: [K] w_k.
        loss: which losses, by weight.
    """

    step_weights: Tensor
    mean_alpha: Tensor
    """[K] mean alpha of each depth over the previous optimizer step, 0 before the first; ``lk_lambda`` reads it."""

    def __init__(self, draft: Eagle3Draft, head: TargetHead, *, draft_ids: Tensor | None, step_weights: list[float], loss: LossWeights = FORWARD_KL) -> None:
        super().__init__()
        self.draft = draft
        self.head = head
        if draft_ids is not None:
            head.put_first(draft_ids)
        self.loss = loss
        self.register_buffer("mean_alpha", torch.zeros(len(step_weights)), persistent=False)
        self.register_buffer("step_weights", torch.tensor(step_weights, dtype=torch.float64), persistent=False)

    @classmethod
    def build(cls, config: DraftConfig, build: Build, *, step_weights: list[float]) -> DraftTask:
        """A fresh task for a target; weights from torch's global random state.

        Args:
            config: the draft's architecture.
            build: the rest. ``init``: ``random``, ``target_head`` for that with the target's head, or ``target`` for
                :func:`start_from_target`; where the hidden sizes differ all three are ``random``. Without ``train_head`` the head stays at
                :func:`served_rows`, whatever ``init``. ``recompute`` and ``fp8``: see :class:`~torchspec.models.eagle3.network.Eagle3Draft`.
            step_weights: [K] w_k.

        Raises:
            UserError: ``train_head`` is off for a draft of another hidden size than the target's.
        """
        target, vocabulary, device, init, train_head = build.target, build.vocabulary, build.device, build.init, build.train_head
        alike = config.hidden_size == config.target_hidden_size
        if not train_head and not alike:
            problem = f"needs a draft of the target's hidden size {config.target_hidden_size}: this one's is {config.hidden_size}"
            raise UserError("model.train_head", False, problem, "leave hidden_size out of the draft's file, or train the head")
        if build.fp8:
            names = ("hidden_size", "intermediate_size", "draft_vocab_size")
            check(device, build.fp8, {name: getattr(config, name) for name in names})
        head = TargetHead.of(target).to(working_dtype(target.dtype, device))
        draft = Eagle3Draft(config, compute_dtype=build.compute_dtype, recompute=build.recompute, fp8=build.fp8)
        draft.initialise()
        if not config.owns_embedding:
            draft.set_embedding(head.weight if config.vocab_size == head.weight.shape[0] and is_tied(target) else read_embedding(target))
        refuse_damaged(target, head, draft)
        pruned = vocabulary is not None and vocabulary.size < config.vocab_size
        ids = vocabulary.draft_ids if vocabulary is not None and pruned else None
        if init == "target" and alike:
            start_from_target(draft, head, ids)
        elif alike and (init == "target_head" or not train_head):
            with torch.no_grad():
                draft.lm_head.weight.copy_(served_rows(head, ids))
        if not train_head:
            draft.lm_head.weight.requires_grad_(False)
            if head.bias is not None:
                rank_zero_warn("model.train_head=false: the target's head has a bias, which a draft's head cannot have; its rows are taken without it")
        return cls(draft, head, draft_ids=ids, step_weights=step_weights, loss=build.loss)

    @property
    def watched(self) -> Tensor:
        """The final norm's weight, which every loss reaches."""
        return self.draft.norm.weight

    def forward(self, batch: PackedBatch, measure: bool = False) -> StepOutput:
        """Loss and metric sums of a batch.

        Args:
            batch: on this module's device.
            measure: also alpha (validation).
        """
        draft, rows = self.draft, as_unroll(batch.rows)
        steps = rows.steps
        if rows.base.shape[0] == 0:
            return self._nothing(steps, measure)
        norm = draft.norm.cast()
        states = draft(batch, norm)
        last = batch.last[rows.base + 1]
        weights, alpha = self._of_steps(steps)
        scale = weights.to(wide(draft.compute_dtype)) / batch.counts.clamp(min=1.0)
        plan = HeadPlan(
            self.head,
            last,
            target=torch.cat([entries + k for k, entries in enumerate(rows.index)]),
            uses=target_uses(rows.depth),
            group=rows.step,
            scale=scale,
            mixing=mixing(alpha),
            weights=self.loss,
            eps=norm.eps,
            measure=measure,
            train=torch.is_grad_enabled(),
            fp8=draft.fp8,
        )
        return self._summed(head_loss(plan, states, norm.weight, draft.lm_head.weight), batch)

    def _of_steps(self, steps: int) -> tuple[Tensor, Tensor]:
        """Weight and mean alpha of each step. A batch may be unrolled further than is trained (validation): those steps
        weigh nothing."""
        trained = self.step_weights.shape[0]
        if steps == trained:
            return self.step_weights, self.mean_alpha
        weights = F.pad(self.step_weights, (0, max(steps - trained, 0)))[:steps]
        return weights, self.mean_alpha[torch.arange(steps, device=weights.device).clamp(max=trained - 1)]

    def _summed(self, result: HeadResult, batch: PackedBatch) -> StepOutput:
        """Over a table [K, R_0] of step and step-0 row, so that the number of operations is that of the sums and not of the steps."""
        rows = as_unroll(batch.rows)
        steps, total = rows.steps, rows.base.shape[0]
        loss_sum = torch.stack([part.sum() for part in result.per_row.split([entries.shape[0] for entries in rows.index])])
        place = torch.cat(rows.index) + rows.step * total

        def table(values: Tensor, kind: torch.dtype) -> Tensor:
            """With 0 where a step does not supervise a row; the steps that do are the first ones."""
            return torch.zeros(steps * total, dtype=kind, device=place.device).index_copy_(0, place, values.to(kind)).view(steps, total)

        right = table(result.hit, torch.int64)
        so_far = right.cumprod(0)
        found = {"rows": (rows.where >= 0).sum(1), "correct": right.sum(1), "correct_so_far": so_far.sum(1)}
        if result.alpha is not None:
            chance = table(result.alpha, result.alpha.dtype)
            found |= {"alpha": chance.sum(1), "alpha_so_far": chance.cumprod(0).sum(1)}
        followed = torch.zeros(0, dtype=torch.int64, device=place.device)
        if result.chosen is not None:
            token = result.chosen if self.head.order is None else self.head.order[result.chosen]
            followed = table(token == batch.input_ids[rows.at + rows.step + 2], torch.int64).cumprod(0).sum(0)
        sums = {name: values.to(loss_sum.dtype) for name, values in found.items()}
        objective = self._of_steps(steps)[0].double() * loss_sum.double()
        return StepOutput(result.loss, {**sums, "loss": loss_sum, "objective": objective, "normaliser": sums["rows"]}, so_far.sum(0), followed)

    def _nothing(self, steps: int, measure: bool) -> StepOutput:
        """A zero tied to every trainable parameter."""
        zero = torch.stack([parameter.float().sum() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0
        alpha = ["alpha", "alpha_so_far"] if measure or self.loss.needs_alpha else []
        names = ["rows", "correct", "correct_so_far", *alpha, "loss", "objective", "normaliser"]
        empty = torch.zeros(steps, device=self.step_weights.device)
        nothing = torch.zeros(0, dtype=torch.int64, device=empty.device)
        return StepOutput(zero, {name: empty for name in names}, nothing, nothing)


def target_uses(depth: Tensor) -> Tensor:
    """[R_0] states that have each step-0 row as their target, of the depths [R_0] of the rows: entry i is a state at steps 0 .. depth_i - 1, with targets
    i .. i + depth_i - 1."""
    total = depth.shape[0]
    change = torch.zeros(total + 1, dtype=torch.int64)
    change[:total] += 1
    change.index_add_(0, torch.arange(total) + depth, torch.full_like(depth, -1))
    return change[:total].cumsum(0)


@torch.no_grad()
def start_from_target(draft: Eagle3Draft, head: TargetHead, draft_ids: Tensor | None) -> None:
    """Begin near what the target already knows: its head, its final norm, and the last aux state passed on by fc.

    The norm starts at 0.3 of the target's, because logits of a draft that knows nothing yet should be flat: at full scale the first steps only unlearn
    false certainty.
    Measured on SmolLM2-135M (K=4, W=8192, 200k tokens, one seed; acceptance length of the serving walk, k=3): random start 1.377, target's head and norm
    1.335, norm at 0.3 1.401, with fc as
    here 1.464.

    Args:
        draft: with random weights; changed in place.
        head: of the target.
        draft_ids: [W] rows to take from the head; None for all.
    """
    draft.lm_head.weight.copy_(served_rows(head, draft_ids))
    norm = head.rms_weight()
    if norm is not None:
        draft.norm.weight.copy_(_FLAT * norm)
    draft.fc.weight.mul_(_NOISE)
    draft.fc.weight[:, -draft.config.target_hidden_size :] += torch.eye(draft.config.target_hidden_size)


def served_rows(head: TargetHead, draft_ids: Tensor | None) -> Tensor:
    """[W, D] rows of the target's head as a draft's own: a server multiplies by them and does nothing else, so the
    target's logit scale is in them.

    A soft cap leaves their order; a bias has no place in a draft's head.

    Args:
        head: of the target, its rows not sorted yet.
        draft_ids: [W] rows to take; None for all.
    """
    assert head.order is None, "ids are rows of a head in the target's order"
    rows = head.weight if draft_ids is None else head.weight[draft_ids]
    return rows if head.scale == 1.0 else rows.float() * head.scale
