"""Random block drafts and packs in fp64, ours and the reference's (``tests/parity/block_reference.py``), of the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.packs import PlainNorm
from tests.parity import block_reference as reference
from torchspec.batch import PackedBatch
from torchspec.blocks import Blocks
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.blocks.options import BlockOptions
from torchspec.models.blocks.task import BlockTask
from torchspec.models.ops.loss_formulas import LossWeights
from torchspec.models.target_head import TargetHead
from torchspec.supervision import turns

V = 40
MASK_TOKEN = 39
MASKS = [[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
"""An answer that ends before the text, two answers with a gap, one that begins with the text and one that ends with it."""


def block_config(**changes: Any) -> BlockConfig:
    plain: dict[str, Any] = {
        "kind": "dflash", "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": V,
        "draft_vocab_size": V, "aux_layers": (1, 3), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 64,
        "initializer_range": 0.3, "mask_token_id": MASK_TOKEN, "block_size": 4, "num_layers": 2, "markov_rank": 5, "conv_taps": 2, "conv_group": 4,
        "selector_rank": 5, "selector_candidates": 4,
    }  # fmt: skip
    return BlockConfig(**{**plain, **changes})


def conversation(config: BlockConfig, mask: list[int], seed: int) -> reference.Conversation:
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    ids = torch.randint(0, MASK_TOKEN, (len(mask),), generator=g).tolist()
    return reference.Conversation(ids, mask, make(len(mask), len(config.aux_layers) * config.hidden_size), make(len(mask), config.hidden_size))


def conversations(config: BlockConfig) -> list[reference.Conversation]:
    return [conversation(config, mask, seed) for seed, mask in enumerate(MASKS)]


def pack(config: BlockConfig, given: Sequence[reference.Conversation], *, anchors: int | float | None = None, blocks: float | None = None) -> PackedBatch:
    """Key of a conversation's draw: its place."""
    cu = np.cumsum([0] + [len(c.ids) for c in given])
    mask = np.array([m for c in given for m in c.mask], dtype=np.uint8)
    turn = turns(mask, cu)
    supervision = Blocks(config.block_size, config.shift, anchors)
    counts = supervision.counts(mask, cu).sum(0) if blocks is None else np.array([blocks])
    return PackedBatch(
        input_ids=torch.tensor([i for c in given for i in c.ids], dtype=torch.int64),
        position=torch.tensor([t for c in given for t in range(len(c.ids))], dtype=torch.int64),
        sequence=torch.tensor([s for s, c in enumerate(given) for _ in c.ids], dtype=torch.int64),
        turn=torch.from_numpy(turn),
        aux=torch.cat([c.aux for c in given]),
        last=torch.cat([c.last for c in given]),
        cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
        sample_ids=tuple(range(len(given))),
        counts=torch.tensor(counts, dtype=torch.float64),
        rows=supervision.rows(turn, cu, np.arange(len(given), dtype=np.uint64)),
    )


@dataclass
class Setting:
    """A draft of ours and the same one for the reference."""

    config: BlockConfig
    task: BlockTask
    weights: dict[str, Tensor]
    """Leaves of the reference's own graph, by name."""
    target: reference.Target
    kept: list[int]
    shape: reference.Shape
    how: reference.Objective

    @classmethod
    def of(cls, config: BlockConfig, *, kept: list[int] | None = None, losses: dict[str, float] | None = None, seed: int = 0, **options: Any) -> Setting:
        torch.manual_seed(seed)
        losses = losses or {"cross_entropy": 1.0}
        rows = kept or list(range(V))
        config = config.with_draft_vocabulary(len(rows))
        draft = BlockDraft(config, compute_dtype=torch.float64)
        draft.set_embedding(torch.randn(V, config.hidden_size))
        draft.initialise()
        with torch.no_grad():  # nothing at its neutral start, every norm with weights of its own
            for parameter in draft.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        norm, weight = 1 + 0.2 * torch.randn(config.hidden_size), torch.randn(V, config.hidden_size)
        head = TargetHead(weight, None, norm_module=PlainNorm(config.hidden_size), norm_tensors={"weight": norm}, scale=config.logit_scale)
        how = BlockOptions(**options)
        task = BlockTask(draft, head, draft_ids=None if kept is None else torch.tensor(kept), options=how, loss=LossWeights.of(losses)).to(torch.float64)
        task.mean_alpha.fill_(0.3)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        draft.inverse_frequencies = 10000.0**-half  # ours are rounded to fp32, as servers' are
        target = reference.Target(task.draft.embedding_table, weight.double(), norm.double(), config.logit_scale)
        shape = reference.Shape(
            config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.block_size, config.mask_token_id,
            causal=config.causal, window=config.sliding_window, predicts_at_anchor=config.kind == "dspark",
            taps=config.conv_taps if config.kind == "dflash2" else 0, group=config.conv_group,
            candidates=config.selector_candidates if config.kind == "dflash2" else 0, logit_scale=config.logit_scale,
        )  # fmt: skip
        wanted = reference.Objective(
            losses, how.weights, how.gamma, how.alpha, how.label, how.confidence if config.kind == "dspark" and config.confidence else 0.0,
            how.confidence_target, how.selector if config.kind == "dflash2" else 0.0, 0.3,
        )  # fmt: skip
        weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in task.draft.named_parameters()}
        return cls(config, task, weights, target, rows, shape, wanted)

    def ours(self, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients."""
        self.task.zero_grad()
        loss = self.task(batch).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in self.task.draft.named_parameters() if parameter.grad is not None}

    def expected(self, given: Sequence[reference.Conversation], anchors: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's."""
        loss = reference.objective(self.weights, self.shape, self.target, self.kept, given, self.how, anchors)
        found = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        return loss.detach(), {name: gradient for name, gradient in zip(self.weights, found, strict=True) if gradient is not None}


def difference(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest relative one of loss and gradients."""
    assert ours[1].keys() == theirs[1].keys(), ours[1].keys() ^ theirs[1].keys()
    worst = float((ours[0] - theirs[0]).abs() / theirs[0].abs())
    for name, gradient in theirs[1].items():
        worst = max(worst, float((ours[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)))
    return worst
