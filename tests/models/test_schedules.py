"""Schedules: no step at rate 0 while there is training to do, right ends, refusal of nonsense."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from torchspec.errors import UserError
from torchspec.models.optim.schedules import WSD, Constant, Cosine, Linear, Schedule


def rates(make: type[Schedule], steps: int, **kwargs: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **kwargs)  # type: ignore[arg-type]
    schedule.set_total_steps(steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("make", [Constant, Linear, Cosine, WSD])
def test_first_step_trains_and_peak_is_reached(make: type[Schedule]) -> None:
    seen = rates(make, 20, warmup_steps=4)
    assert seen[0] == pytest.approx(2.0 / 5)
    assert seen[4] == pytest.approx(2.0)
    assert all(rate > 0 for rate in seen)
    assert all(b > a for a, b in pairwise(seen[:5]))


def test_shapes_after_warmup() -> None:
    assert rates(Constant, 10)[-1] == 2.0
    assert rates(Linear, 10)[5] == pytest.approx(1.0)
    assert rates(Cosine, 10)[5] == pytest.approx(1.0)
    wsd = rates(WSD, 10, decay=0.5)
    assert wsd[:6] == [2.0] * 6
    assert wsd[6:] == pytest.approx([1.6, 1.2, 0.8, 0.4])


def test_warmup_as_share_and_final() -> None:
    seen = rates(Linear, 100, warmup_steps=0.1, final=0.5)
    assert seen[9] < 2.0 and seen[10] == pytest.approx(2.0)
    assert seen[-1] == pytest.approx(1.0, abs=0.02)


def test_total_steps_of_the_user_wins() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Linear(optimizer, total_steps=10)
    schedule.set_total_steps(1000)
    assert schedule.total_steps == 10


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    whole = rates(Cosine, 12, warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Cosine(optimizer, warmup_steps=3)
    schedule.set_total_steps(12)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    saved, saved_optimizer = schedule.state_dict(), optimizer.state_dict()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Cosine(optimizer, warmup_steps=3)
    schedule.set_total_steps(12)
    schedule.load_state_dict(saved)
    optimizer.load_state_dict(saved_optimizer)
    assert optimizer.param_groups[0]["lr"] == whole[5]
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(whole[6])


@pytest.mark.parametrize(("make", "kwargs"), [
    (Linear, {"warmup_steps": -1}), (Linear, {"warmup_steps": math.nan}), (Linear, {"warmup_steps": math.inf}), (Linear, {"final": 2.0}),
    (WSD, {"decay": 0.0}), (Constant, {"final": 0.1}),
])  # fmt: skip
def test_nonsense_is_refused(make: type[Schedule], kwargs: dict[str, float]) -> None:
    with pytest.raises(UserError, match="Fix:"):
        rates(make, 10, **kwargs)
