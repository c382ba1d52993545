"""A put and a get of 64 MB through a store made for the purpose: does transfer work on this machine, and how fast?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from torchspec.errors import UserError
from torchspec.transfer import make_server, open_store
from torchspec.transfer.store import StoreConfig

_NBYTES = 64_000_000


@dataclass(frozen=True)
class StoreFacts:
    """What :func:`selfcheck` found."""

    kind: str
    """mooncake or shm."""
    reason: str
    """Why that kind was chosen."""
    put_gb_s: float
    """10^9 bytes a second, one writer, best of three."""
    get_gb_s: float
    start_s: float
    """Seconds until the store was ready."""


def selfcheck(config: StoreConfig) -> StoreFacts:
    """Start a store as ``config`` says, move 64 MB both ways, compare, and take it down.

    Raises:
        UserError: the store cannot work here; the message says what to do.
        StoreError: it started, and a put or get failed.
    """
    import torch

    run = f"selfcheck-{os.getpid()}-{time.monotonic_ns():x}"
    began = time.perf_counter()
    server = make_server(config, run=run, budget=2 * _NBYTES)
    try:
        server.start()
        started = time.perf_counter() - began
        store = open_store(server.address)
        try:
            source, sink = store.buffer(_NBYTES), store.buffer(_NBYTES)
            source.random_(0, 256)
            sink.zero_()  # also touches the memory, which is not the store's time
            put, get = [], []
            for attempt in range(3):
                key = f"{run}/{attempt}"
                t0 = time.perf_counter()
                store.put([key], [source])
                t1 = time.perf_counter()
                store.get([key], [sink])
                t2 = time.perf_counter()
                store.delete([key])
                put.append(t1 - t0)
                get.append(t2 - t1)
            if not torch.equal(source, sink):
                raise UserError("data.store.kind", server.kind, "gave back other bytes than were put", "check the memory and the network of this machine")
        finally:
            store.close()
    finally:
        server.close()
    return StoreFacts(server.kind, server.reason, _NBYTES / min(put) / 1e9, _NBYTES / min(get) / 1e9, started)
