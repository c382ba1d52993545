"""An engine that the package has never heard of, named as ``package.module:NAME``, writes the records that ours writes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.parts import read_record, save_tiny, spec_of
from torchspec.engines.engine import Engine, EngineConfig, Job
from torchspec.engines.messages import Lease
from torchspec.engines.table import find_engine
from torchspec.engines.worker import build
from torchspec.target import TargetConfig
from torchspec.transfer import StoreConfig, StoreServer, make_server, open_store
from torchspec.transfer.record import Record

ENGINE = "tests.made_up.engine:PLAIN"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreServer]:
    made = make_server(StoreConfig(kind="shm", shm_dir=str(tmp_path)), run=secrets.token_hex(4), budget=16 << 20)
    made.start()
    yield made
    made.close()


def records_of(name: str, target: Path, server: StoreServer) -> list[Record]:
    """What an engine writes of four samples, one at a time."""
    job = Job(TargetConfig(str(target)), spec_of(target, (1, 4)), server.address, EngineConfig(deterministic=True), max_length=64, device="cpu")
    engine: Engine = build(find_engine(name), job)
    engine.start()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 96, (length,), generator=generator, dtype=torch.int32) for length in (5, 33, 2, 64)]
    leases = [Lease(i, secrets.token_hex(8), "train", i, ids.numpy().tobytes()) for i, ids in enumerate(samples)]
    engine.submit(leases)
    sizes: dict[int, int] = {}
    while len(sizes) < len(leases):
        finished, failed = engine.poll(5.0)
        assert not failed
        sizes |= {done.lease: done.nbytes for done in finished}
    engine.close()
    store = open_store(server.address)
    try:
        return [read_record(store, lease.key, sizes[lease.id], engine.spec) for lease in leases]
    finally:
        store.close()


def test_a_made_up_engine_writes_what_the_transformers_engine_writes(server: StoreServer, tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target")  # four blocks, so that 4 is the stream before the final norm
    for mine, ours in zip(records_of(ENGINE, target, server), records_of("transformers", target, server), strict=True):
        assert torch.equal(mine.input_ids, ours.input_ids)
        assert torch.equal(mine.aux, ours.aux) and torch.equal(mine.last, ours.last)
