"""Logits of a block draft over a few fixed random rows: equal for two drafts that a server would run alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchspec.batch import PackedBatch
from torchspec.blocks import Blocks
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.family import Draft

_TOKENS = 8


@torch.no_grad()
def probe(draft: Draft, *, embedding: Tensor, head: Tensor) -> Tensor:
    """[rows, numbers] in fp32: logits, with whatever DSpark and DFlash 2 add to them.

    Args:
        draft: architecture and weights.
        embedding: [V, H] the target's.
        head: [V, H] the target's.
    """
    config: BlockConfig = draft.config
    network = BlockDraft(config)
    network.set_embedding(embedding.float())
    network.load_state_dict({name: draft.weights[name].float() for name, _ in network.named_parameters()}, strict=True)
    generator = torch.Generator().manual_seed(0)
    turn, bounds = np.zeros(_TOKENS, dtype=np.int64), np.array([0, _TOKENS])
    rows = Blocks(config.block_size, config.shift, None).rows(turn, bounds, np.zeros(1, dtype=np.uint64))
    batch = PackedBatch(
        input_ids=torch.randint(0, config.vocab_size, (_TOKENS,), generator=generator),
        position=torch.arange(_TOKENS),
        sequence=torch.zeros(_TOKENS, dtype=torch.int64),
        turn=torch.from_numpy(turn),
        aux=torch.randn(_TOKENS, len(config.aux_layers) * config.hidden_size, generator=generator),
        last=torch.zeros(_TOKENS, config.hidden_size),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        sample_ids=(0,),
        counts=torch.ones(1),
        rows=rows,
    )
    states = network.norm(network.blocks(batch, rows, network.context(batch)))[rows.slot]
    previous = batch.input_ids[rows.target]
    kept = head if draft.vocabulary is None else head[draft.vocabulary.draft_ids]
    found = [states @ kept.float().t()]
    if config.kind == "dspark":
        embedded = network.markov_head.embed(previous, torch.float32)
        found[0] = found[0] + embedded @ network.markov_head.markov_w2.weight.t()
        if config.confidence:
            found.append(network.confidence_head(states, embedded)[:, None])
    if config.kind == "dflash2":
        logits, candidates = found[0].topk(config.selector_candidates)
        found.append(network.candidate_selector(states, previous, candidates, logits))
    return torch.cat(found, dim=1) * config.logit_scale
