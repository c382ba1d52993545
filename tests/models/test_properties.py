"""Properties of the loss over random packs: what a conversation is packed with, in which order, and what stands where no supervised position looks do not
matter. Which positions are supervised: ``tests/test_batch.py``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.differences import PRUNED, STEPS, WEIGHTS, relative
from tests.models.packs import Conversation, conversation, counts, draft_config, pack, task
from torchspec.models.eagle3.task import DraftTask
from torchspec.models.ops.loss_formulas import LossWeights

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=6)
LOSSES = [{"forward_kl": 1.0}, {"tv": 1.0, "jsd": 0.5}, {"lk_lambda": 1.0}]
SOME = settings(max_examples=15, deadline=None)


def made_with(loss: dict[str, float], *, pruned: bool) -> DraftTask:
    ids = PRUNED if pruned else None
    made = task(draft_config(num_layers=2, norm_output=True).with_draft_vocabulary(len(ids) if ids else 40), draft_ids=ids, step_weights=WEIGHTS)
    made.loss = LossWeights.of(loss)
    return made


MADE = [made_with(loss, pruned=pruned) for loss in LOSSES for pruned in (False, True)]


def loss_of(made: DraftTask, conversations: list[Conversation], over: list[float]) -> torch.Tensor:
    return made(pack(made.draft.config, conversations, STEPS, global_counts=over)).loss.detach()


@SOME
@given(masks=MASKS, which=st.integers(0, len(MADE) - 1), order=st.randoms(use_true_random=False), cut=st.integers(0, 6))
def test_a_loss_is_the_sum_over_conversations_however_they_are_packed(masks: list[list[int]], which: int, order: object, cut: int) -> None:
    made = MADE[which]
    conversations = [conversation(made.draft.config, mask, seed) for seed, mask in enumerate(masks)]
    over = counts(conversations, STEPS)
    together = loss_of(made, conversations, over)
    shuffled = list(conversations)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    apart = loss_of(made, shuffled[:cut], over) + loss_of(made, shuffled[cut:], over)
    assert relative(together, apart) < 1e-12 or float((together - apart).abs()) < 1e-12


@SOME
@given(mask=st.lists(st.integers(0, 1), min_size=3, max_size=14), which=st.integers(0, len(MADE) - 1), seed=st.integers(0, 99))
def test_nothing_after_the_last_supervised_position_matters(mask: list[int], which: int, seed: int) -> None:
    """With its last turn over at token e, a conversation's loss reads tokens up to e, aux states up to e - 2 and last states up to e - 1."""
    made = MADE[which]
    whole = conversation(made.draft.config, mask, seed)
    ends = [t for t in range(1, len(mask)) if mask[t] and mask[t - 1]]
    if not ends:
        return
    end = ends[-1]
    over = counts([whole], STEPS)
    spoiled = replace(
        whole,
        ids=whole.ids[: end + 1] + [0] * (len(mask) - end - 1),
        aux=torch.cat([whole.aux[: end - 1], torch.full_like(whole.aux[end - 1 :], 1e3)]),
        last=torch.cat([whole.last[:end], torch.full_like(whole.last[end:], 1e3)]),
    )
    assert torch.equal(loss_of(made, [whole], over), loss_of(made, [spoiled], over))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_of_any_input_changes_the_loss(shift: int) -> None:
    """The alignment is not decided by luck: tokens, aux states, last states or mask moved by one position give another loss."""
    made = MADE[0]
    given = conversation(made.draft.config, [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1], 7)
    over = counts([given], STEPS)
    right = loss_of(made, [given], over)
    moved = [
        replace(given, ids=np.roll(given.ids, shift).tolist()),
        replace(given, aux=given.aux.roll(shift, 0)),
        replace(given, last=given.last.roll(shift, 0)),
        replace(given, mask=np.roll(given.mask, shift).tolist()),
    ]
    assert all(relative(loss_of(made, [other], over), right) > 1e-3 for other in moved)
