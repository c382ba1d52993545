"""Random drafts, targets and packs for tests of the mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.target_head import TargetHead
from torchspec.supervision import Unroll, turns


class PlainNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def draft_config(**changes: Any) -> DraftConfig:
    plain: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 40, "draft_vocab_size": 40,
        "target_hidden_size": 16,
        "aux_layers": (1, 2, 3), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return DraftConfig(**{**plain, **changes})


@dataclass(frozen=True)
class Conversation:
    ids: list[int]
    mask: list[int]
    aux: Tensor
    last: Tensor


def conversation(config: DraftConfig, mask: list[int], seed: int) -> Conversation:
    g = torch.Generator().manual_seed(seed)
    T, D = len(mask), config.target_hidden_size
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Conversation(torch.randint(0, config.vocab_size, (T,), generator=g).tolist(), mask, make(T, len(config.aux_layers) * D), make(T, D))


def head_weight(made: DraftTask) -> Tensor:
    """[V, D] of the target's head, in the target's order."""
    head = made.head
    return head.weight if head.order is None else head.weight[head.order.argsort()]


def task(config: DraftConfig, *, draft_ids: list[int] | None, step_weights: list[float], dtype: torch.dtype = torch.float64, seed: int = 0) -> DraftTask:
    torch.manual_seed(seed)
    draft = Eagle3Draft(config, compute_dtype=dtype)
    draft.initialise()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    D, V = config.target_hidden_size, config.vocab_size
    head = TargetHead(torch.randn(V, D), None, norm_module=PlainNorm(D), norm_tensors={"weight": 1 + 0.2 * torch.randn(D)})
    if not config.owns_embedding:
        draft.set_embedding(torch.randn(V, config.hidden_size))
    made = DraftTask(draft, head, draft_ids=None if draft_ids is None else torch.tensor(draft_ids), step_weights=step_weights)
    made = made.to(torch.float64) if dtype == torch.float64 else made
    return made


def counts(conversations: list[Conversation], steps: int) -> list[float]:
    bounds = np.cumsum([0] + [len(c.mask) for c in conversations])
    total = Unroll(steps).counts(np.array([m for c in conversations for m in c.mask], dtype=np.uint8), bounds).sum(axis=0)
    return [float(max(c, 1)) for c in total]


def pack(
    config: DraftConfig, conversations: list[Conversation], steps: int, *, dtype: torch.dtype = torch.float64, global_counts: list[float] | None = None
) -> PackedBatch:
    cu = np.cumsum([0] + [len(c.ids) for c in conversations])
    mask = np.array([m for c in conversations for m in c.mask], dtype=np.uint8)
    turn = turns(mask, cu)
    D = config.target_hidden_size
    cat = lambda parts, width: torch.cat(parts).to(dtype) if parts else torch.zeros(0, width, dtype=dtype)  # noqa: E731
    return PackedBatch(
        input_ids=torch.tensor([i for c in conversations for i in c.ids], dtype=torch.int64),
        position=torch.tensor([t for c in conversations for t in range(len(c.ids))], dtype=torch.int64),
        sequence=torch.tensor([s for s, c in enumerate(conversations) for _ in c.ids], dtype=torch.int64),
        turn=torch.from_numpy(turn),
        aux=cat([c.aux for c in conversations], len(config.aux_layers) * D),
        last=cat([c.last for c in conversations], D),
        cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
        sample_ids=tuple(range(len(conversations))),
        counts=torch.tensor(global_counts or counts(conversations, steps)),
        rows=Unroll(steps).rows(turn, cu),
    )
