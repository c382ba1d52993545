"""The fast path against the slow reference: values, gradients and metric sums, over every option and awkward packs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import reference
from tests.models.packs import Conversation, conversation, counts, draft_config, pack, task
from torchspec.models.draft_config import DraftConfig
from torchspec.models.task import DraftTask

STEPS = 3
WEIGHTS = [1.0, 0.8, 0.5]
MASKS = [[0, 0, 1, 1, 1, 1], [1], [0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1, 1, 1], [1, 1], [0, 0, 0], [1, 1, 1, 1, 1]]
PRUNED = [1, 4, 5, 9, 11, 12, 17, 18, 20, 23, 25, 26, 28, 30, 31, 33, 36, 38, 39]


def expected(
    made: DraftTask, config: DraftConfig, conversations: list[Conversation], draft_ids: list[int] | None, over: list[float]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    weights = {name: p.detach().double().clone().requires_grad_() for name, p in made.draft.named_parameters()}
    table = weights["embed_tokens.weight"] if config.owns_embedding else made.draft.embedding_table.double()
    total = torch.zeros((), dtype=torch.float64)
    sums: dict[str, list[float]] = {}
    for c in conversations:
        value, one = reference.loss(
            config, weights, table, ids=c.ids, mask=c.mask, aux=c.aux, last=c.last, head=made.head.weight.double(),
            head_norm=made.head.norm_weight.double(), head_eps=1e-5,
            draft_ids=draft_ids or list(range(config.vocab_size)), step_weights=WEIGHTS, counts=over,
        )  # fmt: skip
        total = total + value
        sums = one if not sums else {name: [a + b for a, b in zip(sums[name], one[name], strict=True)] for name in one}
    total.backward()
    return total, {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in weights.items()}, sums


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True, "norm_output": True},
    {"norm_output": True},
    {"attention_bias": True},
    {"qk_norm": True},
    {"num_layers": 2},
    {"num_layers": 2, "norm_output": True, "qk_norm": True},
    {"hidden_size": 12, "head_dim": 6},
    {"aux_layers": (2,)},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
]


@pytest.mark.parametrize("draft_ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())[:60] or "plain")
def test_equals_the_reference(options: dict[str, Any], draft_ids: list[int] | None) -> None:
    config = draft_config(**options).with_draft_vocabulary(len(draft_ids) if draft_ids else 40)
    made = task(config, draft_ids=draft_ids, step_weights=WEIGHTS)
    conversations = [conversation(config, mask, seed) for seed, mask in enumerate(MASKS)]
    over = counts(conversations, STEPS)
    total, gradients, sums = expected(made, config, conversations, draft_ids, over)

    output = made(pack(config, conversations, STEPS), measure=True)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-7)
    for name, values in sums.items():
        assert output.sums[name].tolist() == pytest.approx(values, rel=1e-7), name
    for name, parameter in made.draft.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_accepted_is_the_run_of_right_steps() -> None:
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    conversations = [conversation(config, [0] + [1] * 12, seed) for seed in range(6)]
    output = made(pack(config, conversations, STEPS))
    accepted = output.accepted
    assert [int((accepted > k).sum()) for k in range(STEPS)] == [int(v) for v in output.sums["correct_so_far"]]


def test_loss_does_not_depend_on_what_a_conversation_is_packed_with() -> None:
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    conversations = [conversation(config, mask, seed) for seed, mask in enumerate(MASKS)]
    over = counts(conversations, STEPS)
    together = made(pack(config, conversations, STEPS, global_counts=over)).loss
    apart = sum(made(pack(config, [c], STEPS, global_counts=over)).loss for c in conversations)
    backwards = made(pack(config, conversations[::-1], STEPS, global_counts=over)).loss
    assert together.item() == pytest.approx(apart.item(), rel=1e-12)
    assert together.item() == pytest.approx(backwards.item(), rel=1e-12)


@pytest.mark.parametrize("conversations", [[], [[0, 0, 0, 1]], [[1]]], ids=["empty pack", "nothing supervised", "one token"])
def test_a_pack_without_supervision_gives_zero_gradients(conversations: list[list[int]]) -> None:
    config = draft_config().with_draft_vocabulary(len(PRUNED))
    made = task(config, draft_ids=PRUNED, step_weights=WEIGHTS).float()
    output = made(pack(config, [conversation(config, mask, 0) for mask in conversations], STEPS, dtype=torch.float32), measure=True)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in made.draft.parameters())


def test_last_row_of_a_record_is_never_read() -> None:
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    given = [conversation(config, [0, 1, 1, 1, 1], 1), conversation(config, [0, 1, 1, 1], 2)]
    spoiled = [
        Conversation(c.ids, c.mask, c.aux.index_fill(0, torch.tensor([len(c.ids) - 1]), 1e6), c.last.index_fill(0, torch.tensor([len(c.ids) - 1]), 1e6))
        for c in given
    ]
    assert made(pack(config, given, STEPS)).loss.item() == made(pack(config, spoiled, STEPS)).loss.item()


def test_bf16_is_near_fp32() -> None:
    config = draft_config()
    conversations = [conversation(config, [0] + [1] * 20, seed) for seed in range(4)]
    wide = task(config, draft_ids=None, step_weights=WEIGHTS, dtype=torch.float32)
    narrow = task(config, draft_ids=None, step_weights=WEIGHTS, dtype=torch.bfloat16)
    narrow.head.to(torch.bfloat16)
    losses = []
    for made, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
        output = made(pack(config, conversations, STEPS, dtype=dtype))
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    for (name, a), b in zip(wide.draft.named_parameters(), narrow.draft.parameters(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.97, (name, cosine)
        assert b.grad.dtype == torch.float32
