"""The hidden-state store: open a client, make a server, check it. Backends load when they are used; nothing here imports torch.

Example::

    server = make_server(config, run="a1b2", budget=parse_bytes(config.budget))
    server.start()                       # the coordinator
    store = open_store(server.address)   # any process; the address is plain values
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec.errors import UserError
from torchspec.network import bare, is_loopback
from torchspec.transfer.sizes import parse_bytes, show_bytes
from torchspec.transfer.store import Address, Store, StoreConfig, StoreError, StoreServer, no_directory

if TYPE_CHECKING:
    from torchspec.transfer.probe import StoreFacts

__all__ = [
    "Address",
    "Store",
    "StoreConfig",
    "StoreError",
    "StoreServer",
    "make_server",
    "open_store",
    "parse_bytes",
    "remove_leftovers",
    "selfcheck",
    "show_bytes",
]


def open_store(address: Address) -> Store:
    """A client of the store at ``address``. One a thread; close it.

    Raises:
        StoreError: ``unreachable``.
        UserError: the backend is not installed on this machine.
    """
    if address["kind"] == "shm":
        from torchspec.transfer.shm import ShmStore

        return ShmStore(address)
    if address["kind"] == "mooncake":
        from torchspec.transfer.mooncake import MooncakeStore

        return MooncakeStore(address)
    if address["kind"] == "shards":
        from torchspec.transfer.shard_reader import ShardStore

        return ShardStore(Path(address["folder"]))
    raise UserError("data.store.kind", address["kind"], "is unknown", "use mooncake or shm")


def make_server(
    config: StoreConfig,
    *,
    run: str,
    budget: int,
    largest: int = 0,
    expected_host: str | None = None,
    log_dir: str | os.PathLike[str] | None = None,
) -> StoreServer:
    """A server, not yet started; its ``kind`` and ``reason`` say which one and why.

    Args:
        config: what the user asked for.
        run: id of the run. Keys start with it.
        budget: bytes of records alive at once.
        largest: bytes of the largest record; 0 where nobody knows.
        expected_host: address under which other hosts reach this one, used where ``config.host`` is None; None is loopback.
        log_dir: folder for log files of child processes; None keeps none.

    Raises:
        UserError: the kind cannot work here.
    """
    host = bare(config.host or expected_host or "127.0.0.1")
    kind, reason = _choose(config, host)
    if config.kind == "auto" and config.shm_dir != StoreConfig.shm_dir and not Path(config.shm_dir).is_dir():  # also where Mooncake is there today
        raise no_directory(config.shm_dir)
    if kind == "mooncake":
        from torchspec.transfer.mooncake_server import MooncakeServer

        return MooncakeServer(config, run=run, budget=budget, largest=largest, reason=reason, host=host, log_dir=log_dir)
    if not is_loopback(host):
        problem = f"gives shared memory ({reason}), which serves one host, but others are to reach {host}"
        raise UserError("data.store.kind", config.kind, problem, "install Mooncake: make setup")
    from torchspec.transfer.shm_server import ShmServer

    return ShmServer(config, run=run, budget=budget, reason=reason)


def remove_leftovers(config: StoreConfig, *, run: str) -> None:
    """Remove the files of this run's store after its server was killed. Harmless otherwise; processes end by themselves."""
    from torchspec.transfer.shm_server import remove_run

    remove_run(config, run=run)


def selfcheck(config: StoreConfig) -> StoreFacts:
    """Start a store as ``config`` says, move 64 MB both ways, and say what was found. See :mod:`torchspec.transfer.probe`."""
    from torchspec.transfer import probe

    return probe.selfcheck(config)


def _choose(config: StoreConfig, host: str) -> tuple[str, str]:
    """Backend and the reason for it."""
    if config.kind == "shm":
        return "shm", "data.store.kind is shm"
    from torchspec.transfer.mooncake import load

    try:
        load(host)
    except UserError as error:
        if config.kind == "mooncake":
            raise
        if given := config.of_mooncake():
            problem = f"needs Mooncake, and Mooncake {error.problem}"
            raise UserError(f"data.store.{given[0]}", given[1], problem, error.fix) from error
        return "shm", f"Mooncake {error.problem}; {error.fix}"
    return "mooncake", "data.store.kind is mooncake" if config.kind == "mooncake" else "Mooncake is installed"
