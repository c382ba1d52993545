"""A stand-in for the engine group inside a trainer's process: every submitted pack is ready at once, over a real shared-memory store."""

from __future__ import annotations

import os
import time
import types
from typing import Any

import numpy as np
import torch

from torchspec.data.datamodule import DraftDataModule
from torchspec.engines.messages import Pack, PackReady, RecordRef
from torchspec.transfer import StoreConfig, make_server, open_store
from torchspec.transfer.record import RecordSpec, seal, views


class Feeder:
    """What a ``TrainerClient`` does, with records made on the spot."""

    def __init__(self, address: dict[str, Any], spec: RecordSpec) -> None:
        self.welcome = types.SimpleNamespace(store=address)
        self.spec = spec
        self.store = open_store(address)
        self.ready: list[PackReady] = []

    def open_stage(self, stage: str, epoch: int, *, first_pack: int, num_packs: int, rank: int, world: int, step_packs: int = 0) -> None:
        self.ready.clear()
        self.keys: dict[int, list[str]] = {}

    def submit(self, stage: str, epoch: int, packs: list[Pack]) -> None:
        for pack in packs:
            refs = [
                self.write(f"{os.getpid()}/{id(self)}/{stage}/{epoch}/{s.index}/{time.monotonic_ns()}", s.index, np.frombuffer(s.ids, dtype="<i4"))
                for s in pack.samples
            ]
            self.keys[pack.index] = [ref.key for ref in refs]
            self.ready.append(PackReady(stage=stage, epoch=epoch, pack=pack.index, records=refs, failed=[]))

    def write(self, key: str, index: int, ids: np.ndarray) -> RecordRef:
        tokens = ids.shape[0]
        buffer = torch.zeros(self.spec.nbytes(tokens), dtype=torch.uint8)
        view_ids, aux, last = views(buffer, self.spec, tokens, tokens)
        view_ids.copy_(torch.from_numpy(ids.copy()))
        aux.copy_(view_ids[:, None] / 100)
        last.copy_(view_ids[:, None] / 50)
        self.store.put([key], [seal(buffer, self.spec, tokens, tokens, producer="feeder")])
        return RecordRef(index, key, buffer.numel(), tokens, tokens)

    def poll(self, timeout: float) -> PackReady | None:
        return self.ready.pop(0) if self.ready else None

    def acknowledge(self, stage: str, epoch: int, packs: list[int]) -> None:
        self.store.delete([key for pack in packs for key in self.keys.pop(pack)])

    def close_stage(self, stage: str, epoch: int) -> None:
        self.ready.clear()

    def close(self) -> None:
        self.store.close()


class FedDataModule(DraftDataModule):
    """The datamodule with feeders in place of an engine group."""

    def _start_group(self, training: bool) -> None:
        self.endpoint = "fed"  # type: ignore[assignment]

    def connect(self, name: str, role: str = "trainer") -> Any:
        if not hasattr(self, "_server"):
            self._server = make_server(StoreConfig(kind="shm", budget="16MiB"), run=f"fed-{os.getpid()}-{time.monotonic_ns()}", budget=16 << 20)
            self._server.start()
        return Feeder(self._server.address, self.spec)

    def close(self, *, loaders: bool = True) -> None:
        super().close(loaders=loaders)
        if hasattr(self, "_server"):
            self._server.close()
            del self._server
