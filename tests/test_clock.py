"""What a device's time goes to: by a clock of the test's own, and on a GPU by its events."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchspec.callbacks import clock
from torchspec.callbacks.clock import BatchClock, Clocked


class Now:
    """Stands in for the module's ``time``."""

    def __init__(self) -> None:
        self.at = 100.0

    def monotonic(self) -> float:
        return self.at


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    made = Now()
    monkeypatch.setattr(clock, "time", made)
    return made


def batch(watch: BatchClock, now: Now, *, between: float, waited: float, busy: float, tokens: int) -> None:
    now.at += between
    watch.begin(waited)
    now.at += busy
    watch.end(tokens)


def test_times_add_up_and_only_waiting_for_data_is_starving(now: Now) -> None:
    watch = BatchClock(torch.device("cpu"))
    batch(watch, now, between=9.0, waited=8.0, busy=1.0, tokens=10)  # nothing before it: engines start in that time
    batch(watch, now, between=0.5, waited=8.25, busy=2.0, tokens=20)  # a quarter of a second of the gap was something else
    batch(watch, now, between=0.25, waited=9.25, busy=1.0, tokens=30)  # the loop waited for longer than the device stood still
    watch.pause()
    batch(watch, now, between=60.0, waited=9.5, busy=1.0, tokens=40)
    times = watch.settle()
    assert (times.tokens, times.busy_s, times.between_s, times.starved_s) == (100, 5.0, 0.75, 0.5)
    watch.reset()
    batch(watch, now, between=5.0, waited=9.5, busy=1.0, tokens=7)
    batch(watch, now, between=1.0, waited=10.0, busy=1.0, tokens=7)
    watch.end(3)  # no batch was begun
    times = watch.settle()
    assert (times.tokens, times.busy_s, times.between_s, times.starved_s) == (14, 2.0, 6.0, 0.5)


def test_a_callback_counts_after_the_steps_to_skip_and_not_while_it_validates(now: Now) -> None:
    """Two batches a step, and a run that goes on from step 5."""
    stats = SimpleNamespace(wait_s=0.0)
    trainer: Any = SimpleNamespace(global_step=5, datamodule=SimpleNamespace(loader_stats=lambda stage: stats))
    module = SimpleNamespace(device=torch.device("cpu"))
    one = Clocked(skip=1)
    one.on_validation_start(trainer, module)  # before the training
    one.on_train_start(trainer, module)
    for number in range(6):
        now.at += 1.0
        stats.wait_s += 0.25
        batch = SimpleNamespace(num_tokens=10**number)
        one.on_train_batch_start(trainer, module, batch, number)
        now.at += 2.0
        trainer.global_step += number % 2
        one.on_train_batch_end(trainer, module, None, batch, number)
        if number == 4:
            one.on_validation_start(trainer, module)
            now.at += 60.0
    times = one.clock.settle()
    assert (times.tokens, times.busy_s, times.between_s, times.starved_s) == (111100, 8.0, 3.0, 0.75)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loop_that_waits_while_the_device_computes_costs_nothing() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    watch = BatchClock(a.device)

    def train(waited_s: float) -> None:
        watch.begin(waited_s)
        for _ in range(40):
            a @ a  # in fp32, a few milliseconds each
        watch.end(1)

    train(0.0)
    watch.reset()
    train(0.0)
    time.sleep(0.01)
    train(0.01)  # the device still computes
    times = watch.settle(wait=True)
    assert times.tokens == 2 and times.busy_s > 0.03 and times.starved_s < 0.003
    time.sleep(0.2)
    train(0.21)
    assert watch.settle(wait=True).starved_s == pytest.approx(0.2, abs=0.03)
