"""On-policy samples in the ledger: prompts that a worker answers, and steps that are announced together."""

from __future__ import annotations

import numpy as np
import pytest

from torchspec.engines import audit
from torchspec.engines.ledger import Ledger, ProtocolError
from torchspec.engines.messages import Damaged, Lease, Pack, PackReady, PartialAnswer, Sample


def ids(length: int) -> bytes:
    return np.arange(length, dtype="<i4").tobytes()


def prompts(index: int, *lengths: int, new_tokens: int = 5) -> Pack:
    return Pack(index, [Sample(10 * index + i, ids(length), PartialAnswer(new_tokens, seed=i)) for i, length in enumerate(lengths)])


def ledger_of(*, separate_answers: bool = False, world: int = 1, num_packs: int = 4, step_packs: int = 2, budget: int = 1000) -> Ledger:
    ledger = Ledger(
        prefix="run/1",
        budget=budget,
        reserve=0,
        nbytes=lambda tokens: 10 * tokens,
        max_attempts=2,
        max_failed_fraction=1.0,
        lease_timeout=10.0,
        separate_answers=separate_answers,
    )
    ledger.join("w", 100)
    for rank in range(world):
        ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=num_packs, world=world, step_packs=step_packs)
    return ledger


def pull(ledger: Ledger, worker: str = "w", samples: int = 100) -> list[Lease]:
    return ledger.pull(worker, samples, 10_000, 0.0)


def ready(ledger: Ledger) -> list[tuple[int, PackReady]]:
    found, ledger.out.ready = ledger.out.ready, []
    return found


def settle(ledger: Ledger) -> None:
    """What the coordinator does with keys to delete."""
    keys, ledger.out.delete = ledger.out.delete, []
    ledger.deleted(keys)
    audit.audit(ledger)


def test_credit_covers_the_longest_answer_and_the_record_says_how_long_it_was() -> None:
    ledger = ledger_of(step_packs=1)
    ledger.submit(0, "train", 0, [prompts(0, 3)])
    assert ledger.credit.alive == 10 * (3 + 5)
    (lease,) = pull(ledger)
    assert lease.generate_from == PartialAnswer(5, seed=0) and lease.ids == ids(3)
    ledger.finish("w", lease.id, 10 * 6, 5)  # two tokens of answer
    ((_, message),) = ready(ledger)
    assert (message.records[0].tokens, message.records[0].rows, message.answers) == (6, 5, [3])
    ledger.acknowledge(0, "train", 0, [0])
    settle(ledger)
    assert ledger.credit.alive == 0


@pytest.mark.parametrize("rows", [2, 8, 20])
def test_an_answer_that_is_empty_or_too_long_fails_its_sample_alone(rows: int) -> None:
    ledger = ledger_of(step_packs=1)
    ledger.submit(0, "train", 0, [prompts(0, 3, 3)])
    bad, good = pull(ledger)
    ledger.finish("w", bad.id, 10, rows)
    ledger.finish("w", good.id, 10 * 4, 3)
    settle(ledger)
    ((_, message),) = ready(ledger)
    assert [f.index for f in message.failed] == [0] and [r.index for r in message.records] == [1] and message.answers == [1]


def test_packs_of_a_step_are_announced_together_over_ranks() -> None:
    ledger = ledger_of(world=2)
    ledger.submit(0, "train", 0, [prompts(0, 3), prompts(2, 4)])
    leases = pull(ledger)
    assert len(leases) == 1  # credit is in order: pack 1 of the other rank is not there yet
    ledger.finish("w", leases[0].id, 10 * 5, 4)
    assert ready(ledger) == []
    ledger.submit(1, "train", 0, [prompts(1, 6, 7), Pack(3, [])])
    for lease, rows in zip(pull(ledger), (8, 11, 6), strict=True):
        ledger.finish("w", lease.id, 10 * (rows + 1), rows)
    found = ready(ledger)
    assert [(rank, m.pack, m.answers) for rank, m in found] == [(0, 0, [2, 3, 5]), (1, 1, [2, 3, 5]), (0, 2, [3]), (1, 3, [3])]
    for rank, message in found:
        ledger.acknowledge(rank, "train", 0, [message.pack])
    settle(ledger)
    assert ledger.credit.alive == 0 and audit.state(ledger)["queued"] == 0


def test_a_damaged_record_is_answered_again_and_keeps_the_lengths_that_others_trained_with() -> None:
    ledger = ledger_of()
    ledger.submit(0, "train", 0, [prompts(0, 3), prompts(1, 3)])
    for lease in pull(ledger):
        ledger.finish("w", lease.id, 10 * 5, 4)
    first, second = (message for _, message in ready(ledger))
    ledger.acknowledge(0, "train", 0, [0])
    ledger.reissue(0, "train", 0, 1, [Damaged(10, second.records[0].key, "checksum")])
    settle(ledger)
    (lease,) = pull(ledger)
    assert lease.generate_from is not None and lease.key != second.records[0].key
    ledger.finish("w", lease.id, 10 * 7, 6)
    ((_, again),) = ready(ledger)
    assert again.answers == first.answers == [2, 2] and again.records[0].tokens == 7


def test_a_rank_that_leaves_does_not_hold_up_the_others_step() -> None:
    ledger = ledger_of(world=2)
    ledger.submit(0, "train", 0, [prompts(0, 3)])
    for lease in pull(ledger):
        ledger.finish("w", lease.id, 10 * 5, 4)
    assert ready(ledger) == []
    ledger.submit(1, "train", 0, [prompts(1, 3)])
    ledger.leave_stage(1, "train")
    settle(ledger)
    ((rank, message),) = ready(ledger)
    assert (rank, message.pack, message.answers) == (0, 0, [2])


def test_one_worker_answers_and_another_captures() -> None:
    ledger = ledger_of(separate_answers=True, step_packs=1)
    ledger.join("a", 100, answers=True)
    ledger.submit(0, "train", 0, [prompts(0, 3, 4)])
    assert pull(ledger) == []
    one, two = pull(ledger, "a")
    assert one.key == two.key == "" and one.generate_from is not None
    ledger.answered("a", one.id, ids(5))
    ledger.fail("a", two.id, "out of memory", retry=True)
    settle(ledger)
    (capture,) = pull(ledger)
    assert (capture.ids, capture.generate_from) == (ids(5), None)
    ledger.finish("w", capture.id, 10 * 5, 4)
    (two,) = pull(ledger, "a")
    ledger.answered("a", two.id, ids(9))
    (capture,) = pull(ledger)
    ledger.finish("w", capture.id, 10 * 9, 8)
    ((_, message),) = ready(ledger)
    assert message.answers == [2, 5]
    ledger.reissue(0, "train", 0, 0, [Damaged(0, message.records[0].key, "checksum")])
    settle(ledger)
    (capture,) = pull(ledger)
    assert (capture.ids, capture.generate_from) == (ids(5), None)  # what was said stays said


def test_a_lost_answering_worker_returns_its_prompts() -> None:
    ledger = ledger_of(separate_answers=True, step_packs=1)
    ledger.join("a", 100, answers=True)
    ledger.submit(0, "train", 0, [prompts(0, 3), prompts(1, 3)])
    pull(ledger, "a")
    ledger.close_stage(0, "train", 0)
    settle(ledger)
    assert ledger.leave("a", "died") == [] and ledger.credit.alive == 0
    ledger.open_stage(0, "train", 1, first_pack=0, num_packs=4, world=1, step_packs=1)
    ledger.submit(0, "train", 1, [prompts(0, 3)])
    ledger.join("a", 100, answers=True)
    (lease,) = pull(ledger, "a")
    assert ledger.leave("a", "died") == []
    audit.audit(ledger)
    ledger.join("b", 100, answers=True)
    (again,) = pull(ledger, "b")
    assert again.index == lease.index and again.id != lease.id


@pytest.mark.parametrize("answer", [ids(3), ids(9), b"\1" * 16])
def test_an_answer_that_does_not_continue_the_prompt_fails_it(answer: bytes) -> None:
    ledger = ledger_of(separate_answers=True, step_packs=1)
    ledger.join("a", 100, answers=True)
    ledger.submit(0, "train", 0, [prompts(0, 3)])
    (lease,) = pull(ledger, "a")
    ledger.answered("a", lease.id, answer)
    ((_, message),) = ready(ledger)
    assert "prompt of 3" in message.failed[0].reason and message.answers == []


def test_a_pass_begins_with_a_whole_step() -> None:
    ledger = ledger_of()
    with pytest.raises(ProtocolError):
        ledger.open_stage(0, "train", 1, first_pack=1, num_packs=4, world=1, step_packs=2)
    ledger.open_stage(0, "train", 1, first_pack=0, num_packs=4, world=2, step_packs=2)
    with pytest.raises(ProtocolError, match="another rank"):
        ledger.open_stage(1, "train", 1, first_pack=0, num_packs=4, world=2, step_packs=4)
