"""The computation of one batch of blocks: draft, the target's frozen head, loss, metric sums. This is what gets sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.blocks import BlockRows, as_blocks
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.loss import BlockPlan, BlockResult, block_loss, most_likely, soft_part
from torchspec.models.blocks.network import BlockDraft, Context
from torchspec.models.blocks.options import BlockOptions
from torchspec.models.blocks.selector import with_label
from torchspec.models.blocks.weighting import fixed_weights, normaliser
from torchspec.models.family import Build
from torchspec.models.metrics import StepOutput
from torchspec.models.ops.head_loss import target_distribution
from torchspec.models.ops.loss_formulas import LossWeights, mixing
from torchspec.models.ops.shared_weight import wide
from torchspec.models.target_head import TargetHead, is_tied, read_embedding, refuse_damaged

_ROWS = 2**14
"""Draft rows at a time where no gradient is asked for."""
_FLAT = 0.3
"""Scale of the final norm at the start: logits of a draft that knows nothing yet should be flat."""


@dataclass(frozen=True)
class _Part:
    """What some blocks of a batch give, [M] or [A, K]."""

    loss: Tensor
    sums: dict[str, Tensor]
    accepted: Tensor
    followed: Tensor


class BlockTask(nn.Module):
    """Draft and frozen target head.

    Args:
        draft: the network to train.
        head: the target's norm and head; its rows are sorted here.
        draft_ids: [W] target ids of the draft's rows; None for the whole vocabulary.
        options: how it is trained.
        loss: which losses, by weight.
    """

    mean_alpha: Tensor
    """[K] mean alpha of each slot over the previous optimizer step, 0 before the first; ``lk_lambda`` reads it."""
    fixed: Tensor

    def __init__(self, draft: BlockDraft, head: TargetHead, *, draft_ids: Tensor | None, options: BlockOptions, loss: LossWeights) -> None:
        super().__init__()
        self.draft, self.head, self.options, self.loss = draft, head, options, loss
        if draft_ids is not None:
            head.put_first(draft_ids)
        horizon = draft.config.horizon
        fixed = fixed_weights("uniform" if options.weights == "uniform" else "decay", horizon, options.gamma)
        self.normaliser = normaliser(options.weights, horizon, options.gamma)
        """What the losses of a block are divided by."""
        self.register_buffer("mean_alpha", torch.zeros(horizon), persistent=False)
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.float64), persistent=False)

    @classmethod
    def build(cls, config: BlockConfig, options: BlockOptions, build: Build) -> BlockTask:
        """A fresh task for a target; weights from torch's global random state.

        The head is the target's own and frozen, whatever ``train_head``. ``init: target`` flattens the final norm, as logits of a draft that knows nothing
        should be; the layers begin random in any case.

        Raises:
            UserError: 8-bit products.
        """
        target, vocabulary = build.target, build.vocabulary
        if build.fp8:
            raise UserError("model.matmul", str(build.fp8), "is not there for block drafts", "leave it out (bf16)")
        head = TargetHead.of(target).to(working_dtype(target.dtype, build.device))
        draft = BlockDraft(config, compute_dtype=build.compute_dtype, recompute=build.recompute)
        draft.set_embedding(head.weight if config.vocab_size == head.weight.shape[0] and is_tied(target) else read_embedding(target))
        draft.initialise()
        refuse_damaged(target, head, draft)
        if head.bias is not None:
            rank_zero_warn("the target's head has a bias, which servers of block drafts leave out: its rows are taken without it")
        norm = head.rms_weight()
        if build.init == "target" and norm is not None:
            with torch.no_grad():
                draft.norm.weight.copy_(_FLAT * norm)
        pruned = vocabulary is not None and vocabulary.size < config.vocab_size
        return cls(draft, head, draft_ids=vocabulary.draft_ids if vocabulary is not None and pruned else None, options=options, loss=build.loss)

    @property
    def watched(self) -> Tensor:
        """The final norm's weight, which every loss reaches."""
        return self.draft.norm.weight

    def forward(self, batch: PackedBatch, measure: bool = False) -> StepOutput:
        """Loss and metric sums of a batch.

        Args:
            batch: on this module's device; its ``rows`` are :class:`~torchspec.blocks.BlockRows`.
            measure: also alpha (validation).
        """
        rows = as_blocks(batch.rows)
        blocks = rows.base.shape[0]
        if not blocks:
            return self._nothing(measure)
        context = self.draft.context(batch)
        at_once = blocks if torch.is_grad_enabled() else max(_ROWS // rows.slots, 1)
        lows = range(0, blocks, at_once)
        parts = [self._part(batch, rows if at_once >= blocks else rows.part(low, min(low + at_once, blocks)), context, measure) for low in lows]
        sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in parts[0].sums}
        loss = torch.stack([part.loss for part in parts]).sum()
        return StepOutput(loss, sums, torch.cat([part.accepted for part in parts]), torch.cat([part.followed for part in parts]))

    # -- pieces

    def _part(self, batch: PackedBatch, rows: BlockRows, context: Context, measure: bool) -> _Part:
        draft, config, options = self.draft, self.draft.config, self.options
        states = draft.norm(draft.blocks(batch, rows, context)[rows.slot])
        number = rows.slot % config.block_size - config.shift
        token, previous = batch.input_ids[rows.target + 1], batch.input_ids[rows.target]
        kind = wide(draft.compute_dtype)
        confident = config.kind == "dspark" and config.confidence and options.confidence > 0
        wants_alpha = measure or (confident and options.confidence_target == "overlap")
        blocks = batch.counts[0].to(kind).clamp(min=1.0)
        last, wants_alpha = batch.last[rows.unique], wants_alpha or self.loss.needs_alpha
        if wants_alpha or soft_part(self.loss) != LossWeights():
            target = target_distribution(self.head, last, dtype=draft.compute_dtype, mass=wants_alpha)
        else:
            target = most_likely(self.head, last, dtype=draft.compute_dtype)
        plan = BlockPlan(
            head=self.head.weight[: self.head.width].to(draft.compute_dtype),
            logit_scale=config.logit_scale,
            target=target,
            index=rows.index,
            number=number,
            label=self._draft_rows(token) if options.label == "data" else None,
            depth=rows.depth,
            fixed=None if options.weights == "dpace" else self.fixed,
            alpha=options.alpha,
            normaliser=blocks * self.normaliser,
            losses=self.loss,
            mixing=mixing(self.mean_alpha).to(kind),
            measure=wants_alpha,
            candidates=config.selector_candidates if config.kind == "dflash2" else 0,
            train=torch.is_grad_enabled(),
        )
        embedded = draft.markov_head.embed(previous, draft.compute_dtype) if config.kind == "dspark" else None
        found = block_loss(states, plan, previous=embedded, markov=None if embedded is None else draft.markov_head.markov_w2.weight)
        weight = self.fixed.to(kind)[number] / (blocks * self.fixed.sum())
        hit, chosen, added, extra = found.hit, found.chosen, torch.zeros_like(found.per_slot), {}
        if confident and embedded is not None:
            said = draft.confidence_head(states, embedded)
            wanted = (found.alpha if options.confidence_target == "overlap" else hit).to(kind)  # type: ignore[union-attr]
            value = F.binary_cross_entropy_with_logits(said, wanted.detach(), reduction="none")
            added, extra = options.confidence * weight * value, {"confidence_loss": value, "confidence": said.sigmoid()}
        if config.kind == "dflash2":
            hit, chosen, value = self._select(states, previous, found, plan)
            added, extra = options.selector * weight * value, {"selector_loss": value}
        loss = found.loss + added.sum()
        objective = (found.weight * found.per_slot / self.normaliser + added.detach() * blocks).detach()
        return self._summed(rows, loss, number, token, found, hit, chosen, objective, extra)

    def _select(self, states: Tensor, previous: Tensor, found: BlockResult, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Through the selector: whether the served choice is the target's most likely token [M], the choice [M], and its loss [M].

        The choice follows the text's own token before it, as all of a block's draft tokens do until the first wrong one; a label that training puts among
        the candidates is none of a server's.
        """
        selector, best = self.draft.candidate_selector, plan.target.best[plan.index]
        assert self.head.order is None, "the selector's codebooks are by target tokens"
        label = best if plan.label is None else plan.label
        candidates, index, _ = with_label(found.candidates, label)
        both = torch.cat([candidates, found.candidates[:, -1:]], dim=1)  # and the one that the label may have replaced
        logits = torch.einsum("mh,mkh->mk", states, plan.head[both]) * plan.logit_scale
        scores = selector(states, previous, both, logits)
        value = F.cross_entropy(scores[:, :-1], index, reduction="none")
        served = torch.where(candidates == found.candidates, scores[:, :-1], scores[:, -1:]).detach()
        chosen = found.candidates.gather(1, served.argmax(1, keepdim=True))[:, 0]
        return chosen == best, chosen, value

    def _draft_rows(self, tokens: Tensor) -> Tensor:
        """Draft row of each target token, -1 outside the draft vocabulary."""
        if self.head.order is None:
            return tokens
        rows = torch.full_like(self.head.order, -1)
        rows[self.head.order[: self.head.width]] = torch.arange(self.head.width, device=rows.device)
        return rows[tokens]

    def _summed(
        self, rows: BlockRows, loss: Tensor, number: Tensor, token: Tensor, found: BlockResult, hit: Tensor, chosen: Tensor, objective: Tensor,
        extra: dict[str, Tensor],
    ) -> _Part:  # fmt: skip
        """Over a table [A, K] of block and slot."""
        horizon, blocks = self.draft.config.horizon, rows.base.shape[0]
        block = torch.div(rows.slot, rows.slots, rounding_mode="floor")

        def table(values: Tensor) -> Tensor:
            """With 0 where a slot is not supervised; those that are come first."""
            return torch.zeros(blocks, horizon, dtype=values.dtype, device=values.device).index_put_((block, number), values)

        right = table(hit.to(torch.int64)).cumprod(1)
        id_of = chosen if self.head.order is None else self.head.order[chosen]
        followed = table((id_of == token).to(torch.int64)).cumprod(1)
        kind = objective.dtype
        sums = {"rows": table(torch.ones_like(objective)).sum(0), "correct": table(hit.to(kind)).sum(0), "correct_so_far": right.sum(0).to(kind)}
        if found.alpha is not None:
            chance = table(found.alpha)
            sums |= {"alpha": chance.sum(0), "alpha_so_far": chance.cumprod(1).sum(0)}
        sums |= {name: table(values.detach()).sum(0) for name, values in extra.items()}
        sums |= {"loss": table(found.per_slot.detach()).sum(0), "objective": table(objective).sum(0)}
        sums["normaliser"] = torch.full_like(sums["objective"], blocks)
        return _Part(loss, sums, right.sum(1), followed.sum(1))

    def _nothing(self, measure: bool) -> StepOutput:
        """A zero tied to every trainable parameter."""
        zero = torch.stack([parameter.float().sum() for parameter in self.parameters() if parameter.requires_grad]).sum() * 0.0
        config, options = self.draft.config, self.options
        confident = config.kind == "dspark" and config.confidence and options.confidence > 0
        wants_alpha = measure or self.loss.needs_alpha or (confident and options.confidence_target == "overlap")
        names = ["rows", "correct", "correct_so_far", *(["alpha", "alpha_so_far"] if wants_alpha else [])]
        names += ["confidence_loss", "confidence"] if confident else ["selector_loss"] if config.kind == "dflash2" else []
        empty = torch.zeros(config.horizon, device=zero.device)
        nothing = torch.zeros(0, dtype=torch.int64, device=zero.device)
        return StepOutput(zero, {name: empty for name in [*names, "loss", "objective", "normaliser"]}, nothing, nothing)
