"""The coordinator's rules, one at a time. ``test_ledger_model.py`` tries them in random order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from torchspec.engines import audit
from torchspec.engines.ledger import Ledger, ProtocolError
from torchspec.engines.ledger_state import Out
from torchspec.engines.messages import Damaged, Lease, Pack, PackReady, Sample

BYTES = 100
"""Bytes of a token in these tests."""


def make(**changes: Any) -> Ledger:
    given: dict[str, Any] = {"budget": 10_000, "reserve": 0, "max_attempts": 3, "max_failed_fraction": 1.0, "lease_timeout": 10.0}
    return Ledger(prefix="run/0", nbytes=lambda tokens: BYTES * tokens, **{**given, **changes})


def pack(index: int, *lengths: int) -> Pack:
    """Samples 100 * index, 100 * index + 1, ... of these lengths."""
    return Pack(index, [Sample(100 * index + i, np.zeros(length, dtype="<i4").tobytes()) for i, length in enumerate(lengths)])


def out(ledger: Ledger) -> Out:
    taken = ledger.out.take()
    audit.audit(ledger)
    return taken


def finish(ledger: Ledger, worker: str, leases: list[Lease]) -> None:
    for lease in leases:
        tokens = len(lease.ids) // 4
        ledger.finish(worker, lease.id, BYTES * tokens, tokens)


def delete(ledger: Ledger) -> list[str]:
    """What the cleaner does: delete what is to be deleted, and say so."""
    keys, ledger.out.delete = ledger.out.delete, []
    ledger.deleted(keys)
    return keys


def drain(ledger: Ledger, worker: str = "w") -> list[PackReady]:
    """Work off everything that has credit."""
    while leases := ledger.pull(worker, 64, 10**6, 0.0):
        finish(ledger, worker, leases)
    return [message for _, message in out(ledger).ready]


@pytest.fixture
def one() -> Ledger:
    """One rank, one worker, a training pass of 8 packs."""
    ledger = make()
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=8, world=1)
    ledger.join("w", 1000)
    return ledger


def test_a_pack_is_ready_when_its_last_sample_is(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3, 4), pack(1, 5)])
    leases = one.pull("w", 64, 1000, 0.0)
    assert [(lease.stage, lease.index, len(lease.ids)) for lease in leases] == [("train", 0, 12), ("train", 1, 16), ("train", 100, 20)]
    finish(one, "w", leases[1:])
    assert [m.pack for _, m in out(one).ready] == [1]
    finish(one, "w", leases[:1])
    (_, ready), *more = out(one).ready
    assert ready.pack == 0 and not more and not ready.failed
    assert [(r.index, r.key, r.nbytes, r.tokens, r.rows) for r in ready.records] == [(0, leases[0].key, 300, 3, 3), (1, leases[1].key, 400, 4, 4)]


def test_an_empty_pack_is_ready_at_once_but_in_order(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0)])
    assert [m.pack for _, m in out(one).ready] == [0]
    one.acknowledge(0, "train", 0, [0])


def test_credit_returns_after_the_deletion_not_at_the_acknowledgement() -> None:
    ledger = make(budget=1000)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=4, world=1)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 6), pack(1, 6)])
    (ready,) = drain(ledger)
    assert ledger.credit.alive == 600 and ledger.waits_for_credit
    ledger.acknowledge(0, "train", 0, [0])
    keys = out(ledger).delete
    assert keys == [ready.records[0].key]
    assert ledger.credit.alive == 600 and not ledger.has_work
    ledger.deleted(keys)
    assert ledger.has_work and ledger.credit.alive == 600
    assert [m.pack for m in drain(ledger)] == [1]


def test_packs_of_all_ranks_are_merged_in_plan_order() -> None:
    ledger = make(budget=1000)
    for rank in (0, 1):
        ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=6, world=2)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 5), pack(2, 5), pack(4, 5)])
    assert [lease.index for lease in ledger.pull("w", 64, 1000, 0.0)] == [0]  # pack 1 is not there: 2 must not take its credit
    ledger.submit(1, "train", 0, [pack(1, 5)])
    assert [lease.index for lease in ledger.pull("w", 64, 1000, 0.0)] == [100]


def test_a_rank_that_left_holds_nobody_up() -> None:
    ledger = make()
    for rank in (0, 1):
        ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=6, world=2)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 5), pack(2, 5)])
    ledger.leave_stage(1, "train")
    assert [m.pack for m in drain(ledger)] == [0, 2]


def opens(ledger: Ledger, rank: int) -> None:
    ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=6, world=2)


def test_a_rank_that_was_lost_does_not_begin_the_same_pass_apart_from_the_others() -> None:
    """Its pass would wait for theirs, and theirs for its next step: what a rank of a killed run does whose last words arrive late."""
    ledger = make()
    opens(ledger, 0)
    opens(ledger, 1)
    ledger.leave_stage(1, "train")
    with pytest.raises(ProtocolError, match="rank 1 was lost in train epoch 0.* start all ranks anew"):
        opens(ledger, 1)
    ledger.leave_stage(0, "train")
    assert not ledger.passes
    for rank in (1, 0):  # all anew
        opens(ledger, rank)
        ledger.submit(rank, "train", 0, [pack(rank, 5), pack(2 + rank, 5)])
    ledger.join("w", 100)
    assert sorted(m.pack for m in drain(ledger)) == [0, 1, 2, 3]


@pytest.mark.parametrize("first", [0, 1])
def test_a_pass_whose_only_rank_was_lost_gives_way_to_the_same_one_begun_anew(first: int) -> None:
    ledger = make(budget=1000)
    opens(ledger, 1)
    ledger.submit(1, "train", 0, [pack(1, 5)])
    ledger.leave_stage(1, "train")  # before the others came
    for rank in (first, 1 - first):
        if first == 0 and rank == 1:
            with pytest.raises(ProtocolError, match="start all ranks anew"):
                opens(ledger, rank)
            return
        opens(ledger, rank)
        ledger.submit(rank, "train", 0, [pack(rank, 5), pack(2 + rank, 5)])
    ledger.join("w", 100)
    assert len(ledger.passes) == 1 and [m.pack for m in drain(ledger)] == [0, 1]
    for rank in (0, 1):
        ledger.acknowledge(rank, "train", 0, [rank])
    delete(ledger)
    assert [m.pack for m in drain(ledger)] == [2, 3]


def test_validation_has_its_reserve_and_goes_first() -> None:
    ledger = make(budget=1000, reserve=400)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=4, world=1)
    ledger.open_stage(0, "validate", 7, first_pack=0, num_packs=4, world=1)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 3), pack(1, 3), pack(2, 3)])
    assert ledger.credit.alive == 600  # never a byte of the reserve
    ledger.submit(0, "validate", 7, [pack(0, 4)])
    assert ledger.credit.alive == 1000
    assert [lease.stage for lease in ledger.pull("w", 64, 1000, 0.0)] == ["validate", "train", "train"]
    out(ledger)


def test_what_validation_borrows_training_waits_for() -> None:
    ledger = make(budget=1000, reserve=200)
    ledger.open_stage(0, "validate", 0, first_pack=0, num_packs=4, world=1)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=4, world=1)
    ledger.join("w", 100)
    ledger.submit(0, "validate", 0, [pack(0, 9)])
    ledger.submit(0, "train", 0, [pack(0, 2)])
    assert ledger.credit.alive == 900
    ledger.close_stage(0, "validate", 0)
    out(ledger)
    assert ledger.credit.alive == 200


def test_a_pack_that_never_fits_stops_the_run_and_names_the_field() -> None:
    ledger = make(budget=1000, reserve=200)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=1, world=1)
    ledger.submit(0, "train", 0, [pack(0, 9)])
    assert ledger.out.stop is not None and "data.store.budget" in ledger.out.stop


def test_a_lost_workers_samples_go_to_others_under_new_keys(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3, 4)])
    old = one.pull("w", 64, 1000, 0.0)
    keys = one.leave("w", "killed")
    assert sorted(keys) == sorted(lease.key for lease in old)
    one.join("v", 1000)
    assert one.pull("v", 64, 1000, 0.0) == []  # the old attempts' bytes may still be there
    assert sorted(delete(one)) == sorted(keys)
    new = one.pull("v", 64, 1000, 0.0)
    assert [lease.index for lease in new] == [lease.index for lease in old]
    assert not {lease.key for lease in new} & {lease.key for lease in old}
    finish(one, "v", new)
    assert [m.pack for _, m in out(one).ready] == [0]


def test_workers_that_are_told_to_end_cost_no_attempt(one: Ledger) -> None:
    """Nodes that are given back, one after the other, with the same sample in hand: it is not given up, nor taken for a poisonous one."""
    one.submit(0, "train", 0, [pack(0, 3, 4)])
    one.leave("w", "told to end", in_order=True)
    for i in range(10):
        one.join(f"w{i}", 1000)
        assert len(one.pull(f"w{i}", 64, 1000, 0.0)) == 2  # the last attempt would travel alone
        one.leave(f"w{i}", "told to end", in_order=True)
        delete(one)
    one.join("v", 1000)
    finish(one, "v", one.pull("v", 64, 1000, 0.0))
    ((_, ready),) = out(one).ready
    assert not ready.failed and len(ready.records) == 2


def test_late_and_double_results_are_harmless(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    (lease,) = one.pull("w", 1, 100, 0.0)
    finish(one, "w", [lease, lease])
    one.fail("w", lease.id, "late", retry=True)
    one.finish("w", 10**9, 1, 1)
    taken = out(one)
    assert len(taken.ready) == 1 and taken.delete == []


def test_a_sample_is_given_up_after_max_attempts_with_its_reason(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3, 4)])
    for attempt in range(3):
        for lease in one.pull("w", 64, 1000, 0.0):
            if lease.index == 0:
                one.fail("w", lease.id, f"reason {attempt}", retry=True)
            else:
                finish(one, "w", [lease])
        delete(one)
    (_, ready), *_ = out(one).ready
    assert [r.index for r in ready.records] == [1]
    assert [(f.index, f.reason, f.attempts) for f in ready.failed] == [(0, "reason 2", 3)]
    one.acknowledge(0, "train", 0, [0])


def test_a_failure_that_is_final_is_not_tried_again(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    (lease,) = one.pull("w", 1, 100, 0.0)
    one.fail("w", lease.id, "broken", retry=False)
    assert out(one).ready[0][1].failed[0].attempts == 1


def test_a_sample_too_long_for_the_engine_fails_alone(one: Ledger) -> None:
    one.submit(0, "train", 0, [Pack(0, [Sample(0, b"\0" * 4 * 50), Sample(1, b"\0" * 4 * 8)])])
    one.join("small", 10)
    leases = one.pull("small", 64, 1000, 0.0)
    assert [lease.index for lease in leases] == [1]
    finish(one, "small", leases)
    (_, ready), *_ = out(one).ready
    assert [f.index for f in ready.failed] == [0] and "50 tokens" in ready.failed[0].reason


def test_one_poison_sample_does_not_take_its_neighbours_along() -> None:
    """Sample 5 kills every worker that holds it; all others must arrive."""
    ledger = make()
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=1, world=1)
    ledger.submit(0, "train", 0, [pack(0, *[3] * 12)])
    deaths = 0
    ready: list[PackReady] = []
    while not ready:
        ledger.join("w", 100)
        held: list[Lease] = []
        while True:
            more = ledger.pull("w", 8, 10**6, 0.0)
            held += more
            if any(lease.index == 5 for lease in held):
                deaths += 1
                ledger.leave("w", "killed")
                break
            if not more:
                if not held:
                    break
                finish(ledger, "w", [held.pop(0)])
        if "w" in ledger.leases.workers:
            ledger.leave("w", "end")
        delete(ledger)
        ready = [message for _, message in out(ledger).ready]
    assert deaths == 3
    assert [f.index for f in ready[0].failed] == [5] and len(ready[0].records) == 11


def test_a_sample_on_its_last_attempt_travels_alone(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    for _ in range(2):
        one.fail("w", one.pull("w", 1, 100, 0.0)[0].id, "died", retry=True)
        delete(one)
    one.submit(0, "train", 0, [pack(1, 3)])
    (last,) = one.pull("w", 64, 100, 0.0)
    assert last.index == 0 and one.pull("w", 64, 100, 0.0) == []
    finish(one, "w", [last])
    assert [lease.index for lease in one.pull("w", 64, 100, 0.0)] == [100]


def test_a_record_that_could_not_be_read_is_produced_again(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3, 4)])
    (ready,) = drain(one)
    bad = ready.records[0]
    one.reissue(0, "train", 0, 0, [Damaged(bad.index, bad.key, "checksum")])
    assert out(one).delete == [bad.key]
    one.reissue(0, "train", 0, 0, [Damaged(bad.index, bad.key, "checksum")])  # said twice
    assert out(one).delete == []
    with pytest.raises(ProtocolError):
        one.acknowledge(0, "train", 0, [0])
    one.deleted([bad.key])
    (again,) = drain(one)
    assert [r.index for r in again.records] == [r.index for r in ready.records]
    assert again.records[0].key != bad.key and again.records[1] == ready.records[1]
    one.acknowledge(0, "train", 0, [0])
    one.deleted(out(one).delete)
    assert one.credit.alive == 0


def test_a_closed_pass_gives_everything_back_when_its_workers_have_settled(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3), pack(1, 3), pack(2, 3)])
    first, second = one.pull("w", 2, 1000, 0.0)
    finish(one, "w", [first])
    one.close_stage(0, "train", 0)
    taken = out(one)
    assert taken.cancel == [("w", second.id)] and taken.delete == [first.key]
    one.deleted(taken.delete)
    assert one.credit.alive == 300  # the cancelled lease may still write
    finish(one, "w", [second])
    taken = out(one)
    assert taken.delete == [second.key] and not taken.ready
    one.deleted(taken.delete)
    assert one.credit.alive == 0 and not one.has_work
    one.acknowledge(0, "train", 0, [0])  # late: nothing happens


def test_a_cancelled_lease_that_is_never_settled_is_overdue(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    one.pull("w", 1, 1000, 0.0)
    one.close_stage(0, "train", 0)
    assert one.overdue(9.0) == {} and one.overdue(11.0) == {"w": 1}
    assert one.leave("w", "killed") == delete(one)
    assert one.credit.alive == 0


def test_a_rank_may_be_a_pass_ahead_with_the_same_epoch() -> None:
    """Rank 0 begins the next part of epoch 0 while rank 1 has not closed the first part."""
    ledger = make()
    ledger.join("w", 100)
    for rank in (0, 1):
        ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=4, world=2)
        ledger.submit(rank, "train", 0, [pack(rank, 3), pack(rank + 2, 3)])
    drain(ledger)
    for index in (0, 2):
        ledger.acknowledge(0, "train", 0, [index])
    ledger.open_stage(0, "train", 0, first_pack=4, num_packs=8, world=2)
    ledger.submit(0, "train", 0, [pack(4, 3), pack(6, 3)])
    ledger.acknowledge(1, "train", 0, [1, 3])
    ledger.open_stage(1, "train", 0, first_pack=4, num_packs=8, world=2)
    ledger.submit(1, "train", 0, [pack(5, 3)])
    assert [m.pack for m in drain(ledger)] == [4, 5, 6]


def test_a_later_pass_takes_no_credit_from_an_earlier_one() -> None:
    ledger = make(budget=1000)
    ledger.join("w", 100)
    for rank in (0, 1):
        ledger.open_stage(rank, "train", 0, first_pack=0, num_packs=2, world=2)
    ledger.submit(0, "train", 0, [pack(0, 5)])
    drain(ledger)
    ledger.acknowledge(0, "train", 0, [0])
    ledger.deleted(out(ledger).delete)
    ledger.open_stage(0, "train", 1, first_pack=0, num_packs=2, world=2)
    ledger.submit(0, "train", 1, [pack(0, 10)])
    assert not ledger.has_work  # rank 1 has not submitted pack 1 of epoch 0 yet
    ledger.submit(1, "train", 0, [pack(1, 10)])
    assert [lease.index for lease in ledger.pull("w", 64, 1000, 0.0)] == [100]


def test_ranks_that_disagree_on_a_pass_are_refused() -> None:
    ledger = make()
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=4, world=2)
    with pytest.raises(ProtocolError, match="another rank"):
        ledger.open_stage(1, "train", 0, first_pack=0, num_packs=6, world=2)


@pytest.mark.parametrize("wrong", [pack(1, 3), pack(0, 3), pack(9, 3)], ids=["another rank's", "twice", "beyond the end"])
def test_a_pack_that_is_not_due_is_refused(wrong: Pack) -> None:
    ledger = make()
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=8, world=2)
    ledger.submit(0, "train", 0, [pack(0, 3)])
    with pytest.raises(ProtocolError):
        ledger.submit(0, "train", 0, [wrong])


def test_too_many_failures_stop_the_run_with_the_last_reason() -> None:
    ledger = make(max_failed_fraction=0.1)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=2, world=1)
    ledger.submit(0, "train", 0, [pack(0, *[3] * 10), pack(1, *[3] * 10)])
    ledger.join("w", 100)
    leases = ledger.pull("w", 64, 1000, 0.0)
    for lease in leases[:2]:
        ledger.fail("w", lease.id, "bad luck", retry=False)
    assert ledger.out.stop is None  # 2 of 20
    ledger.fail("w", leases[2].id, "worse luck", retry=False)
    assert (
        ledger.out.stop is not None and "3 of about 20" in ledger.out.stop and "worse luck" in ledger.out.stop and "max_failed_fraction=0.1" in ledger.out.stop
    )


@pytest.mark.parametrize(("nbytes", "rows"), [(301, 3), (300, 1), (300, 4), (0, 3), (-1, 3)])
def test_a_record_of_another_size_than_its_credit_is_refused(one: Ledger, nbytes: int, rows: int) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    (lease,) = one.pull("w", 1, 100, 0.0)
    one.finish("w", lease.id, nbytes, rows)
    taken = out(one)
    assert taken.delete == [lease.key] and [f.index for f in taken.ready[0][1].failed] == [0]


def test_a_worker_is_given_what_it_has_room_for(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 30, 30, 30)])
    assert len(one.pull("w", 2, 1000, 0.0)) == 2
    assert one.pull("w", 2, 20, 0.0) == []  # holds two, and the next does not fit
    one.join("empty", 1000)
    assert len(one.pull("empty", 2, 20, 0.0)) == 1  # holds nothing: it must not starve


def test_state_counts_samples_by_where_they_are() -> None:
    ledger = make(budget=1000)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=8, world=1)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 2, 2, 2), pack(1, 2), pack(2, 4, 3)])
    leases = ledger.pull("w", 3, 100, 0.0)
    finish(ledger, "w", leases[:1])
    assert audit.state(ledger) == {"budget": 1000, "bytes_alive": 800, "queued": 2, "ready_for_work": 1, "leased": 2, "finished": 1, "failed": 0}


def test_damaged_records_of_a_pack_go_together_even_where_one_is_given_up() -> None:
    """Announced in between, the pack would name a record that is about to be deleted."""
    ledger = make(max_attempts=2)
    ledger.open_stage(0, "train", 0, first_pack=0, num_packs=1, world=1)
    ledger.join("w", 100)
    ledger.submit(0, "train", 0, [pack(0, 3, 4)])
    first, second = ledger.pull("w", 2, 100, 0.0)
    ledger.fail("w", first.id, "no luck", retry=True)
    finish(ledger, "w", [second])
    delete(ledger)
    (ready,) = drain(ledger)
    ledger.reissue(0, "train", 0, 0, [Damaged(r.index, r.key, "checksum") for r in ready.records])
    taken = out(ledger)
    assert taken.ready == [] and sorted(taken.delete) == sorted(r.key for r in ready.records)
    ledger.deleted(taken.delete)
    (again,) = drain(ledger)
    assert [f.index for f in again.failed] == [0] and [r.index for r in again.records] == [1]


def test_a_rank_that_skips_a_pass_holds_nobody_up() -> None:
    """Rank 0 opens validation 1, rank 1 goes straight to validation 2: pass 1 waits for nothing of rank 1."""
    ledger = make()
    ledger.join("w", 100)
    ledger.open_stage(0, "validate", 1, first_pack=0, num_packs=4, world=2)
    ledger.submit(0, "validate", 1, [pack(0, 3), pack(2, 3)])
    ledger.open_stage(1, "validate", 2, first_pack=0, num_packs=4, world=2)
    assert [m.pack for m in drain(ledger)] == [0, 2]
    ledger.acknowledge(0, "validate", 1, [0, 2])
    ledger.close_stage(0, "validate", 1)
    delete(ledger)
    assert len(ledger.passes) == 1 and ledger.credit.alive == 0


@pytest.mark.parametrize("ids", [b"", b"\0" * 6], ids=["none", "half a number"])
def test_ids_that_are_no_numbers_are_refused(one: Ledger, ids: bytes) -> None:
    with pytest.raises(ProtocolError, match="int32"):
        one.submit(0, "train", 0, [Pack(0, [Sample(0, ids)])])


def test_the_audit_sees_credit_that_leaks_and_records_that_vanish(one: Ledger) -> None:
    one.submit(0, "train", 0, [pack(0, 3)])
    (ready,) = drain(one)
    one.credit.take("train", 1)
    with pytest.raises(AssertionError, match="credit of train is 301 bytes, its living packs hold 300"):
        audit.audit(one)
    one.credit.give_back("train", 1)
    audit.audit(one)
    one.deleted([ready.records[0].key])
    with pytest.raises(AssertionError, match="deleted while it is owed"):
        audit.audit(one)
