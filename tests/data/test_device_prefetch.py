"""Batches on their way to the device: one ahead, in order, nothing lost; the copies themselves where there is a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.test_loader import Lost, World
from torchspec.batch import PackedBatch
from torchspec.data.device_prefetch import CudaPrefetch, Prefetched
from torchspec.transfer import StoreConfig, make_server


class Recorder:
    """Notes what was begun and what was handed out."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def start(self, batch: PackedBatch) -> Prefetched:
        self.events.append(("start", batch.pack_index))
        return Prefetched(batch, None)

    def finish(self, begun: Prefetched) -> PackedBatch:
        self.events.append(("finish", begun.batch.pack_index))
        return begun.batch


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    server = make_server(StoreConfig(kind="shm", budget="8MiB"), run=f"test-staging-{time.monotonic_ns()}", budget=8 << 20)
    server.start()
    made = World(tmp_path, server.address)
    yield made
    for loader in made.loaders:
        loader.close()
    made.coordinator.store.close()
    server.close()


def test_the_copy_of_the_next_pack_begins_before_a_pack_is_handed_out(world: World) -> None:
    prefetch = Recorder()
    loader = world.loader(prefetch_to=prefetch, prefetch_packs=3)
    seen = []
    for batch in loader:
        seen.append(batch.pack_index)
        deadline = time.monotonic() + 5
        while loader.stats.packs < min(len(seen) + 3, len(world.plan)) and time.monotonic() < deadline:
            time.sleep(0.005)  # the trainer computes; one pack more than the next is there, so the next is in the queue
    packs = list(range(len(world.plan)))
    assert seen == packs
    at = {event: position for position, event in enumerate(prefetch.events)}
    assert len(at) == len(prefetch.events) == 2 * len(packs)  # each begun once and handed out once
    for pack in packs[2:-1]:  # nothing is there yet when the first one is handed out, and the last may still be in the thread's hand
        assert at["start", pack] < at["finish", pack - 1]
    for pack in packs[2:]:
        assert at["start", pack] > at["finish", pack - 2]  # never two ahead


def test_a_failure_comes_after_the_packs_before_it(world: World) -> None:
    prefetch = Recorder()
    stream = iter(world.loader(prefetch_to=prefetch, prefetch_packs=1, window_bytes=1))
    next(stream)
    world.coordinator.fault = lambda ready: None
    world.coordinator.lost = True
    handed = 1
    with pytest.raises(Lost):
        for _ in range(len(world.plan)):
            next(stream)
            handed += 1
    assert [pack for what, pack in prefetch.events if what == "finish"] == list(range(handed))


def test_a_pass_that_is_closed_lets_go_of_the_pack_ahead(world: World) -> None:
    prefetch = Recorder()
    loader = world.loader(prefetch_to=prefetch)
    assert next(iter(loader)).pack_index == 0
    assert [batch.pack_index for batch in loader] == list(range(len(world.plan)))  # a new pass begins at its beginning


def sums_of(batch: PackedBatch) -> torch.Tensor:
    return torch.stack([t.double().sum() for t in (batch.aux, batch.last, batch.input_ids, batch.rows.base)])


def test_two_passes_over_the_same_packs_hold_the_same_values(world: World) -> None:
    passes = [torch.stack([sums_of(batch) for batch in world.loader()]) for _ in range(2)]
    assert len(passes[0]) == len(world.plan) and torch.equal(*passes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetched_batches_hold_the_right_values_while_the_device_is_busy(world: World) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(4096, 4096, device=device)
    expected = [sums_of(batch) for batch in world.loader()]  # one pass after the other: what a pass has acknowledged is deleted
    sums = []
    for moved in world.loader(prefetch_to=CudaPrefetch(device), pin=True):
        busy = busy @ busy / 64.0  # keeps the trainer's stream behind
        assert moved.aux.device == device and moved.cu_seqlens.device.type == "cpu"
        sums.append(sums_of(moved))
        del moved
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))
