"""Our block drafts and the ``speculators`` package's on the same written directory: loss and every gradient of one text.

Where definitions agree: hard labels are the target's most likely tokens, a text is one conversation whose answer lasts to
its end, and of its anchors those are taken that speculators takes, whose whole block is in the text. Two things differ,
and are taken into account here: speculators divides by the supervised slots, we by the sum of the slots' weights (by
their number under D-PACE); and a KL divergence lacks the cross-entropy's constant, which has no gradient.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.blocks.packs import pack
from tests.parity.block_reference import Conversation
from torchspec.blocks import as_blocks
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.formats import describe
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.blocks.options import BlockOptions
from torchspec.models.blocks.task import BlockTask
from torchspec.models.blocks.weighting import normaliser
from torchspec.models.ops.loss_formulas import LossWeights
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.target import Target

LENGTH, PROMPT = 24, 3
GAMMA = 4.0
THEIR_LOSSES = {"cross_entropy": "ce", "forward_kl": "kl_div", "tv": "tv", "reverse_kl": "rkl", "lk_alpha": "nla"}
SIZES: dict[str, dict[str, Any]] = {
    "dflash": {}, "dspark": {"markov_rank": 4}, "dflash2": {"conv_group": 4, "selector_rank": 4, "selector_candidates": 4}
}  # fmt: skip


def built(kind: Any, target: Target, *, losses: dict[str, float], weights: Any) -> BlockTask:
    """A random draft of ours, nothing at its neutral start."""
    config = BlockConfig.from_target(
        target, kind=kind, aux_layers=(1, 4, 7), num_layers=2, block_size=4, mask_token_id=39, initializer_range=0.2, **SIZES[kind]
    )  # fmt: skip
    torch.manual_seed(0)
    draft = BlockDraft(config)
    draft.set_embedding(read_embedding(target).float())
    draft.initialise()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    options = BlockOptions(weights=weights, gamma=GAMMA, label="argmax")
    return BlockTask(draft, TargetHead.of(target).float(), draft_ids=None, options=options, loss=LossWeights.of(losses))


def text(config: BlockConfig) -> Conversation:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 39, (LENGTH,), generator=generator).tolist()
    aux = torch.randn(LENGTH, len(config.aux_layers) * config.hidden_size, generator=generator)
    return Conversation(ids, [0] * PROMPT + [1] * (LENGTH - PROMPT), aux, torch.randn(LENGTH, config.hidden_size, generator=generator))


def ours(task: BlockTask, given: Conversation) -> tuple[float, dict[str, Tensor]]:
    """Loss of the blocks that fit whole, and gradients, by speculators' normaliser."""
    config = task.draft.config
    batch = pack(config, [given])
    whole = int((as_blocks(batch.rows).spans[:, 1] < LENGTH - config.block_size).sum())
    batch = replace(batch, rows=as_blocks(batch.rows).part(0, whole), counts=torch.tensor([float(whole)]))
    loss = task(batch).loss
    loss.backward()
    factor = normaliser(task.options.weights, config.horizon, GAMMA) / config.horizon  # all blocks are whole
    gradients = {name: p.grad * factor for name, p in task.draft.named_parameters() if p.grad is not None}
    return float(loss.detach()) * factor, gradients


def theirs(task: BlockTask, given: Conversation, target: Target, folder: Path, *, losses: dict[str, float], weights: str) -> tuple[float, dict[str, Tensor]]:
    """The same by speculators' class, read from a directory of ours."""
    from speculators.config import SpeculatorModelConfig
    from speculators.losses import resolve_loss_config
    from speculators.losses.eager import tv_loss
    from speculators.model import SpeculatorModel

    config = task.draft.config
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(describe(config, target, form="speculators", dtype=torch.float32)))
    save_file({name: p.detach().contiguous() for name, p in task.draft.named_parameters()}, folder / "model.safetensors")
    described: Any = SpeculatorModelConfig.from_pretrained(str(folder))
    described.transformer_layer_config._attn_implementation = "eager"
    model: Any = SpeculatorModel.from_pretrained(str(folder), config=described, dtype=torch.float32)
    named = {THEIR_LOSSES[name]: weight for name, weight in losses.items()}
    more = {"dspark": {"confidence_head_alpha": 1.0, "tv_loss_fn": tv_loss}, "dflash2": {"selector_loss_alpha": 1.0, "tv_loss_fn": tv_loss}}
    _, loss, _ = model(
        given.aux[None], torch.tensor(given.ids)[None], torch.tensor(given.mask)[None], given.last[None], torch.zeros(1, LENGTH, dtype=torch.int64),
        loss_config=resolve_loss_config(json.dumps(named), "eager"), gamma=GAMMA, max_anchors=LENGTH - config.block_size - PROMPT,
        per_position_loss_weight="dpace" if weights == "dpace" else "fixed-exp-decay", dpace_alpha=0.5, **more.get(config.kind, {}),
    )  # fmt: skip
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
