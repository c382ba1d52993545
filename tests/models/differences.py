"""How far the fast path is from the slow reference, as numbers: tests put a bound on them, ``benchmarks/numerics.py`` prints them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import reference
from tests.models.packs import Conversation, conversation, counts, draft_config, head_weight, pack, task
from tests.models.variants import VARIANTS
from torchspec.models.eagle3.task import DraftTask

STEPS = 3
WEIGHTS = [1.0, 0.8, 0.5]
MASKS = [[0, 0, 1, 1, 1, 1], [1], [0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1, 1, 1], [1, 1], [0, 0, 0], [1, 1, 1, 1, 1]]
PRUNED = [1, 4, 5, 9, 11, 12, 17, 18, 20, 23, 25, 26, 28, 30, 31, 33, 36, 38, 39]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float(((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).detach())


def made_for(variant: str, draft_ids: list[int] | None) -> tuple[DraftTask, list[Conversation]]:
    """A random fp64 task of a variant, and awkward conversations for it."""
    config = draft_config(**VARIANTS[variant]).with_draft_vocabulary(len(draft_ids) if draft_ids else 40)
    return task(config, draft_ids=draft_ids, step_weights=WEIGHTS), [conversation(config, mask, seed) for seed, mask in enumerate(MASKS)]


def against_reference(variant: str, draft_ids: list[int] | None) -> dict[str, float]:
    """``loss``, each metric sum and each ``gradient of`` a parameter: relative difference in fp64 (frequency tables are fp32, as everywhere)."""
    made, conversations = made_for(variant, draft_ids)
    config, over = made.draft.config, counts(conversations, STEPS)
    weights = {name: p.detach().double().clone().requires_grad_() for name, p in made.draft.named_parameters()}
    table = weights["embed_tokens.weight"] if config.owns_embedding else made.draft.embedding_table.double()
    head: dict[str, Any] = {"head": head_weight(made).double(), "head_norm": made.head.norm_weight.double(), "head_eps": 1e-5}
    total = torch.zeros((), dtype=torch.float64)
    sums: dict[str, Tensor] = {}
    for c in conversations:
        value, one = reference.loss(
            config, weights, table, ids=c.ids, mask=c.mask, aux=c.aux, last=c.last,
            draft_ids=draft_ids or list(range(config.vocab_size)), step_weights=WEIGHTS, counts=over, **head,
        )  # fmt: skip
        total = total + value
        sums = {name: sums.get(name, torch.zeros(STEPS)) + torch.tensor(values, dtype=torch.float64) for name, values in one.items()}
    total.backward()

    output = made(pack(config, conversations, STEPS), measure=True)
    output.loss.backward()
    found = {"loss": relative(output.loss, total)} | {name: relative(output.sums[name].double(), values) for name, values in sums.items()}
    for name, parameter in made.draft.named_parameters():
        slow = weights[name].grad
        assert parameter.grad is not None and slow is not None, name
        found[f"gradient of {name}"] = relative(parameter.grad, slow)
    return found


def packing(variant: str) -> float:
    """Relative difference of a conversation's loss between packs: all together, each alone, backwards."""
    made, conversations = made_for(variant, None)
    config, over = made.draft.config, counts(conversations, STEPS)
    together = made(pack(config, conversations, STEPS, global_counts=over)).loss
    apart = torch.stack([made(pack(config, [c], STEPS, global_counts=over)).loss for c in conversations]).sum()
    backwards = made(pack(config, conversations[::-1], STEPS, global_counts=over)).loss
    return max(relative(together, apart), relative(together, backwards))
