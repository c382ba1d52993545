"""Which packs their ranks are told of, and when: a pack as soon as it is whole, or (on-policy) the packs of an optimizer step together.

On-policy no plan knows how long the answers are, and a loss is normalised over the whole step: each pack is announced with the answer lengths of its step.
"""

from __future__ import annotations

from torchspec.engines.ledger_state import Out, PackState, PassState
from torchspec.engines.messages import PackReady


def whole(out: Out, pack: PackState) -> None:
    """Nothing of a pack is waited for."""
    if pack.owner.step_packs:
        announce_step(out, pack.owner, pack.owner.step_of(pack.index))
    else:
        _announce(out, pack, None)


def announce_step(out: Out, passed: PassState, step: int) -> None:
    """Announce the packs of an optimizer step when all of them are whole. A pack that was produced again later is announced with the lengths of the first
    time, which the step's other packs were trained with."""
    first = step * passed.step_packs
    indices = [i for i in range(first, min(first + passed.step_packs, passed.end)) if passed.rank_of(i) not in passed.closed]
    packs = [pack for i in indices if (pack := passed.packs.get(i)) is not None]
    if not packs:
        return
    if step not in passed.answers:
        if len(packs) < len(indices) or not all(pack.granted and not pack.waiting for pack in packs):
            return
        passed.answers[step] = [s.record.tokens - s.prompt for pack in packs for s in pack.samples if s.record is not None]
    for pack in packs:
        if pack.granted and not pack.waiting and not pack.announced:
            _announce(out, pack, passed.answers[step])


def forget_step(passed: PassState, pack: PackState) -> None:
    """A pack has ended: the answer lengths of its step go with the step's last pack."""
    if passed.step_packs and not any(passed.step_of(i) == passed.step_of(pack.index) for i in passed.packs):
        passed.answers.pop(passed.step_of(pack.index), None)


def _announce(out: Out, pack: PackState, answers: list[int] | None) -> None:
    pack.announced = True
    records = [sample.record for sample in pack.samples if sample.record is not None]
    failed = [sample.failure for sample in pack.samples if sample.failure is not None]
    stage, epoch = pack.owner.stage, pack.owner.epoch
    out.ready.append((pack.rank, PackReady(stage=stage, epoch=epoch, pack=pack.index, records=records, failed=failed, answers=answers)))
