"""What holds of a block draft's loss and metrics whatever its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.blocks.packs import Setting, block_config, conversations, pack
from tests.parity import block_reference as reference
from torchspec.blocks import as_blocks
from torchspec.models.blocks import task as tasks
from torchspec.models.blocks.network import BlockDraft

KINDS = ("dflash", "dspark", "dflash2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_packs_loss_is_the_sum_of_its_conversations(kind: Any) -> None:
    setting = Setting.of(block_config(kind=kind), losses={"forward_kl": 1.0, "cross_entropy": 0.5})
    texts = conversations(setting.config)
    batch = pack(setting.config, texts)
    blocks = float(batch.counts[0])
    whole, gradients = setting.ours(batch)
    loss, summed = 0.0, {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    for text in texts:
        alone, found = setting.ours(pack(setting.config, [text], blocks=blocks))
        loss += float(alone)
        for name, gradient in found.items():
            summed[name] += gradient
    assert float(whole) == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_anchors_are_trained_alone(kind: Any) -> None:
    setting = Setting.of(block_config(kind=kind, num_layers=1))
    texts = conversations(setting.config)
    batch = pack(setting.config, texts, anchors=2)
    starts = [0, 8, 15]
    drawn = [[a - start for s, a in as_blocks(batch.rows).spans.tolist() if s == start] for start in starts]
    ours, expected = setting.ours(batch)[0], setting.expected(texts, drawn)[0]
    assert float(ours) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_in_chunks_is_the_same(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting.of(block_config(kind=kind), losses={"forward_kl": 1.0, "cross_entropy": 0.5})
    batch = pack(setting.config, conversations(setting.config))
    with torch.no_grad():
        whole = setting.task(batch, measure=True)
        monkeypatch.setattr(tasks, "_ROWS", 9)
        chunks = setting.task(batch, measure=True)
    assert torch.equal(whole.accepted, chunks.accepted) and torch.equal(whole.followed, chunks.followed)
    torch.testing.assert_close(whole.loss, chunks.loss)
    assert whole.sums.keys() == chunks.sums.keys()
    for name, values in whole.sums.items():
        torch.testing.assert_close(values, chunks.sums[name])


@pytest.mark.parametrize("kind", KINDS)
def test_objective_adds_up_to_the_loss(kind: Any) -> None:
    setting = Setting.of(block_config(kind=kind))
    output = setting.task(pack(setting.config, conversations(setting.config)))
    sums = output.sums
    assert float(sums["objective"].sum() / sums["rows"][0]) == pytest.approx(float(output.loss.detach()), rel=1e-9)


@pytest.mark.parametrize(("kind", "pruned"), [("dflash", False), ("dflash", True), ("dspark", False), ("dspark", True), ("dflash2", False)])
def test_accepted_is_what_the_served_proposal_has_right(kind: Any, pruned: bool) -> None:
    """On the target's greedy answers, where teacher forcing and the walk of a server agree."""
    kept = [i for i in range(40) if i % 5] if pruned else None
    setting = Setting.of(block_config(kind=kind, num_layers=1), kept=kept, seed=4)
    config = setting.config
    texts = []
    for text in conversations(config):
        ids = list(text.ids)
        aux, last = text.aux.clone(), text.last
        for t in range(len(ids) - 1):  # the text follows the target wherever it answers
            if text.mask[t] and text.mask[t + 1]:
                ids[t + 1] = int(setting.target.probabilities(last[t]).argmax())
        texts.append(reference.Conversation(ids, text.mask, aux, last))
    weights = {name: tensor.detach() for name, tensor in setting.weights.items()}
    head = setting.target.head[setting.kept]
    expected = []
    for text in texts:
        for a, depth in reference.depths(text.mask, setting.shape).items():
            tokens, _ = reference.proposal(weights, setting.shape, setting.target.table, head, text.ids, text.aux, a, setting.kept)
            right = 0
            while right < depth and tokens[right] == int(setting.target.probabilities(text.last[a + right]).argmax()):
                right += 1
            expected.append(right)
    output = setting.task(pack(config, texts), measure=True)
    assert output.accepted.tolist() == expected
    assert output.followed.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_accepted_where_the_target_agrees(kind: Any) -> None:
    """The target is made to say what the draft proposes, up to a slot of every block: the walk is as long."""
    setting = Setting.of(block_config(kind=kind, num_layers=1, block_size=5), seed=1)
    config, shape = setting.config, setting.shape
    weights = {name: tensor.detach() for name, tensor in setting.weights.items()}
    text = conversations(config)[2]
    a, depth = 6, 4
    ids, last = list(text.ids), text.last.clone()
    tokens, _ = reference.proposal(weights, shape, setting.target.table, setting.target.head, ids, text.aux, a, setting.kept)
    rows = setting.target.head * setting.target.norm
    for i in range(depth):
        ids[a + 1 + i] = tokens[i]
        last[a + i] = 50.0 * torch.linalg.lstsq(rows, 10.0 * torch.nn.functional.one_hot(torch.tensor(tokens[i]), 40).double()[:, None]).solution[:, 0]
    agrees = [int(setting.target.probabilities(last[a + i]).argmax()) == tokens[i] for i in range(depth)]
    expected = agrees.index(False) if False in agrees else depth
    batch = pack(config, [reference.Conversation(ids, text.mask, text.aux, last)])
    output = setting.task(batch, measure=True)
    block = (batch.rows.base + 1).tolist().index(a)
    assert expected > 1, "the case says nothing"
    assert int(output.accepted[block]) == expected
    assert int(output.followed[block]) >= expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_without_blocks_ties_every_weight(kind: Any) -> None:
    setting = Setting.of(block_config(kind=kind))
    text = conversations(setting.config)[0]
    batch = pack(setting.config, [replace(text, mask=[0] * len(text.mask))])
    output = setting.task(batch)
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in setting.task.draft.parameters())
    full = setting.task(pack(setting.config, [text]))
    assert full.sums.keys() == output.sums.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_changes_nothing(kind: Any) -> None:
    setting = Setting.of(block_config(kind=kind))
    batch = pack(setting.config, conversations(setting.config))
    before = setting.ours(batch)
    before = before[0], {name: gradient.clone() for name, gradient in before[1].items()}
    setting.task.draft.recompute = True
    after = setting.ours(batch)
    torch.testing.assert_close(before[0], after[0], rtol=1e-12, atol=0)
    for name, gradient in before[1].items():
        torch.testing.assert_close(after[1][name], gradient, rtol=1e-10, atol=1e-13)


def test_dflash2_starts_as_dflash() -> None:
    torch.manual_seed(0)
    plain, more = (BlockDraft(block_config(kind=kind), compute_dtype=torch.float64) for kind in ("dflash", "dflash2"))
    table = torch.randn(40, 16)
    for draft in (plain, more):
        draft.set_embedding(table)
    more.initialise()
    plain.load_state_dict({name: tensor for name, tensor in more.state_dict().items() if name in plain.state_dict()})
    config = block_config()
    batch = pack(config, conversations(config))
    states = [draft.double().blocks(batch, batch.rows, draft.context(batch)) for draft in (plain, more)]  # type: ignore[arg-type]
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-12)
