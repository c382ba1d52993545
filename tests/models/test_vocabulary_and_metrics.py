"""The draft vocabulary, the serving walk, and metrics that add up."""

from __future__ import annotations

import pytest
import torch

from tests.models.packs import conversation, draft_config, pack, task
from torchspec.errors import UserError
from torchspec.models.metrics import StepSums, serving_walk
from torchspec.models.vocabulary import VocabularyMapping


def test_most_frequent_tokens_ties_by_id_end_tokens_always() -> None:
    counts = torch.tensor([5, 1, 5, 0, 9, 5, 0])
    mapping = VocabularyMapping.from_counts(counts, 4, always=[6])
    assert mapping.draft_ids.tolist() == [0, 2, 4, 6]
    assert mapping.d2t.tolist() == [0, 1, 2, 3] and mapping.t2d.nonzero()[:, 0].tolist() == [0, 2, 4, 6]
    assert (torch.arange(4) + mapping.d2t).tolist() == mapping.draft_ids.tolist()
    assert mapping.coverage(counts) == pytest.approx(19 / 25)


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError):
        VocabularyMapping.from_counts(torch.ones(4, dtype=torch.int64), 5)
    with pytest.raises(UserError):
        VocabularyMapping(torch.tensor([3, 1]), 5)


def walk_slowly(right: list[int], k: int) -> tuple[int, int]:
    """One answer, as a server goes."""
    at = stops = accepted = 0
    while at < len(right):
        r = 0
        while r < k and r < right[at]:
            r += 1
        stops, accepted, at = stops + 1, accepted + r, at + r + 1
    return stops, accepted


@pytest.mark.parametrize("seed", range(20))
def test_serving_walk(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randint(0, 5, (int(n),), generator=generator).tolist() for n in torch.randint(1, 12, (6,), generator=generator)]
    stops, accepted, positions = serving_walk([r for a in answers for r in a], [i for i, a in enumerate(answers) for _ in a], 3)
    slow = [walk_slowly(answer, 3) for answer in answers]
    assert (stops, accepted) == (sum(s for s, _ in slow), sum(a for _, a in slow))
    assert sum(positions) == accepted and sorted(positions, reverse=True) == positions


def test_metrics_add_up_over_packs() -> None:
    config = draft_config()
    made = task(config, draft_ids=None, step_weights=[1.0, 0.8])
    conversations = [conversation(config, [0] + [1] * n, n) for n in (4, 9, 14)]
    together = StepSums.of(made(pack(config, conversations, 2), measure=True), pack(config, conversations, 2))
    apart = None
    for c in conversations:
        batch = pack(config, [c], 2)
        output = made(batch, measure=True)
        apart = StepSums.of(output, batch) if apart is None else apart.add(output, batch)
    assert apart is not None
    ours, theirs = apart.metrics(2), together.metrics(2)
    assert ours == pytest.approx(theirs)
    assert ours["expected_acceptance_greedy"] >= 1.0 and {"alpha_0", "alpha_1", "conditional_accuracy_1"} <= ours.keys()
