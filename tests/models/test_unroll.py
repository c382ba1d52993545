"""The fast path against the slow reference: values, gradients and metric sums, over every option and awkward packs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_flatten

from tests.models.differences import PRUNED, STEPS, WEIGHTS, against_reference, made_for, packing
from tests.models.packs import Conversation, conversation, draft_config, pack, task
from tests.models.variants import VARIANTS
from torchspec.errors import UserError
from torchspec.models.eagle3 import network
from torchspec.models.ops import mlp
from torchspec.models.training.parallelize import check_reduced


@pytest.mark.parametrize("draft_ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(variant: str, draft_ids: list[int] | None) -> None:
    found = against_reference(variant, draft_ids)
    assert {name: value for name, value in found.items() if not value < 1e-6} == {}


@pytest.mark.parametrize("variant", ["plain", "attention_bias", "MLA"])
def test_equals_the_reference_with_embeddings_of_all_rows_projected(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a single layer does where nearly all rows are supervised."""
    monkeypatch.setattr(network, "_NEARLY_ALL", 0.0)
    found = against_reference(variant, PRUNED)
    assert {name: value for name, value in found.items() if not value < 1e-6} == {}


def test_accepted_is_the_run_of_right_steps() -> None:
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    conversations = [conversation(config, [0] + [1] * 12, seed) for seed in range(6)]
    output = made(pack(config, conversations, STEPS))
    accepted = output.accepted
    assert [int((accepted > k).sum()) for k in range(STEPS)] == [int(v) for v in output.sums["correct_so_far"]]


@pytest.mark.parametrize("slice_rows", [5, 1000])
def test_recompute_in_slices_changes_nothing(slice_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_SLICE", slice_rows)
    found = []
    for recompute in (False, True):
        made, conversations = made_for("two layers", PRUNED)
        made.draft.recompute = recompute
        output = made(pack(made.draft.config, conversations, STEPS))
        output.loss.backward()
        found.append([output.loss.detach(), *(p.grad for p in made.draft.parameters())])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_result_shows_its_tensors_to_fsdp() -> None:
    """FSDP2 hooks into those that torch's pytree finds in the output; torch 2.11 looks into no dataclass, and trained nothing."""
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    output = made(pack(config, [conversation(config, [0] + [1] * 8, 0)], STEPS))
    assert any(leaf is output.loss for leaf in tree_flatten(output)[0])


def test_a_step_without_gradients_is_refused_when_sharded() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="no sharded parameter"):
        check_reduced(optimizer)
    weight.grad = torch.zeros(2)
    check_reduced(optimizer)


@pytest.mark.parametrize("variant", ["plain", "MLA", "three layers, Qwen3, EAGLE-3.1"])
def test_loss_does_not_depend_on_what_a_conversation_is_packed_with(variant: str) -> None:
    assert packing(variant) < 1e-12


def test_dynamic_rope_is_refused_where_servers_differ() -> None:
    made, _ = made_for("RoPE dynamic", None)
    config = made.draft.config
    longest = config.max_position_embeddings - STEPS + 1
    made(pack(config, [conversation(config, [0] + [1] * (longest - 1), 0)], STEPS))
    with pytest.raises(UserError, match="max_length"):
        made(pack(config, [conversation(config, [0] + [1] * longest, 0)], STEPS))


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


def test_rows_that_are_not_consecutive_are_refused() -> None:
    """Step k takes embeddings and targets from entry j + k: a pack whose rows of a turn have a hole would get others'."""
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=WEIGHTS)
    batch = pack(config, [conversation(config, [0] + [1] * 9, 0)], STEPS)
    rows = batch.rows
    assert rows.consecutive()
    holes = [replace(rows, base=rows.base + (rows.base > 3)), replace(rows, index=(rows.index[0], *[rows.index[0]] * (STEPS - 1)))]
    for spoiled in holes:
        with pytest.raises(AssertionError, match="not consecutive"):
            made(replace(batch, rows=spoiled))


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


def test_validation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``no_grad`` the head's pass makes the same loss without the products of its backward."""
    import torchspec.models.ops.head_loss as loss_module

    made, conversations = made_for("plain", None)
    batch = pack(made.draft.config, conversations, STEPS)
    wanted: list[bool] = []
    plain = loss_module.row_losses
    monkeypatch.setattr(loss_module, "row_losses", lambda *args, gradient, measure: wanted.append(gradient) or plain(*args, gradient=gradient, measure=measure))
    trained = made(batch).loss
    with torch.no_grad():
        assert made(batch).loss.item() == trained.item()
    assert wanted == [True, False]
