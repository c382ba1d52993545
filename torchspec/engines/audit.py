"""The ledger's books: counters for whoever asks, and the audit that says whether credit, keys, leases and samples still agree.

The audit is an assertion of the delivery contract at one moment: credit = bytes that living packs hold = at least what is in the store, and every sample is in
exactly one place. Property tests call it after every event; ``TORCHSPEC_AUDIT=1`` makes a coordinator do so as well (the chaos benchmark runs that way).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torchspec.engines.ledger import Ledger
from torchspec.engines.ledger_state import KINDS, kind_of


def state(ledger: Ledger) -> dict[str, Any]:
    """Counters of docs/design.md, "Group metrics"."""
    leases = ledger.leases
    packs = [pack for passed in ledger.passes for pack in passed.packs.values()]
    return {
        "budget": ledger.credit.budget,
        "bytes_alive": ledger.credit.alive,
        "queued": sum(len(pack.samples) for pack in packs if not pack.granted),
        "ready_for_work": sum(len(queue) for queue in leases.all_queues) + len(leases.retrying),
        "leased": sum(len(worker.leases) for worker in leases.workers.values()),
        "finished": sum(sample.record is not None for pack in packs for sample in pack.samples),
        "failed": ledger.failed,
    }


def audit(ledger: Ledger) -> None:
    """Compare the books with each other.

    Raises:
        AssertionError: naming what does not agree. It is a defect of the coordinator, never of a client.
    """
    leases = ledger.leases
    living = {id(p): p for passed in ledger.passes for p in passed.packs.values() if p.granted}
    living |= {id(p): p for p in leases.paying.values()}
    for kind in KINDS:
        held = sum(p.nbytes for p in living.values() if kind_of(p.owner.stage) == kind)
        assert ledger.credit.of(kind) == held, f"credit of {kind} is {ledger.credit.of(kind)} bytes, its living packs hold {held}"
        assert held <= ledger.credit.most(kind), f"{held} bytes of {kind} are alive, {ledger.credit.most(kind)} are allowed"
    assert ledger.credit.alive <= ledger.credit.budget, f"{ledger.credit.alive} bytes are alive, the budget is {ledger.credit.budget}"

    assert all(key in pack.keys for key, pack in leases.paying.items()), "a key is paid for by a pack that does not know it"
    assert all(leases.paying.get(key) is pack for pack in living.values() for key in pack.keys), "a key of a living pack is paid for by none"
    assert leases.retrying.keys() <= leases.paying.keys(), "a sample waits for the deletion of a key that is gone"

    places = Counter(id(sample) for queue in leases.all_queues for sample in queue)
    places += Counter(id(sample) for worker in leases.workers.values() for sample in worker.leases.values())
    places += Counter(id(sample) for sample in leases.retrying.values() if not sample.pack.ended)
    expected = Counter(id(s) for p in living.values() if not p.ended for s in p.samples if s.record is None and s.failure is None)
    assert places == expected, f"{(expected - places).total()} samples are nowhere, {(places - expected).total()} in two places or unwanted"

    for name, worker in leases.workers.items():
        assert worker.deadlines.keys() == worker.leases.keys() | worker.cancelled.keys(), f"leases and deadlines of {name} differ"
        assert not worker.leases.keys() & worker.cancelled.keys(), f"a lease of {name} is both held and cancelled"
    for pack in living.values():
        if not pack.ended:
            waiting = sum(s.record is None and s.failure is None for s in pack.samples)
            assert pack.waiting == waiting, f"pack {pack.index} waits for {pack.waiting} samples, {waiting} are not there"
            whole_alone = waiting == 0 and not pack.owner.step_packs  # else it also waits for its step
            assert waiting == 0 if pack.announced else not whole_alone, f"pack {pack.index} is announced: {pack.announced}, with {waiting} samples not there"
            held_keys = [s.key for s in pack.samples if s.record is not None]
            assert all(key in pack.keys for key in held_keys), f"a finished record of pack {pack.index} was deleted while it is owed"
