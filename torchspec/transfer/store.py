"""The hidden-state store: what every backend promises, and how one is opened.

A *server* owns the memory (started once a run by the coordinator, or external); a *store* is a client of it, one a process
or thread that writes or reads. Values are flat byte runs (``record.py``); nothing here knows what is inside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torchspec.errors import UserError
from torchspec.network import bare, is_loopback, split_host_port
from torchspec.paths import home

if TYPE_CHECKING:  # a client that only deletes (the coordinator) must not wait for torch
    from torch import Tensor

Address = dict[str, Any]
"""Plain values (JSON) that let any process open the store; its key ``kind`` says which backend."""


class StoreError(Exception):
    """An operation on the store that failed.

    Args:
        reason: ``missing`` (no such key), ``full`` (no room now: wait for credit), ``unreachable`` (server gone), ``io`` (all else).
        key: the key at fault, or "".
        detail: code and words of the backend.
    """

    def __init__(self, reason: Literal["missing", "full", "unreachable", "io"], key: str, detail: str) -> None:
        super().__init__(f"store {reason}: {detail}" + (f" (key {key})" if key else ""))
        self.reason = reason
        self.key = key
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.key, self.detail)


@dataclass(frozen=True)
class StoreConfig:
    """Where hidden states wait between engine and trainer."""

    kind: Literal["auto", "mooncake", "shm"] = "auto"
    """auto takes Mooncake when it imports and shared memory otherwise; the run says which."""
    budget: str = "1GiB"
    """Bytes of records alive at once, training and validation together; writers wait for credit inside it."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Mooncake transport."""
    rdma_devices: str = ""
    """Comma-separated RDMA device names (Mooncake), empty for all."""
    master: str | None = None
    """host:port of a running Mooncake master; None starts one for the run."""
    metadata: str | None = None
    """Metadata server URL of that master (or P2PHANDSHAKE); None with ``master`` means P2PHANDSHAKE."""
    host: str | None = None
    """Address under which this host's memory is reached by others; None means loopback, or the route to the coordinator."""
    shm_dir: str = "/dev/shm"
    """Directory of memory-backed files (kind shm)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shm_dir", home(self.shm_dir))
        for name, words in (("kind", ("auto", "mooncake", "shm")), ("protocol", ("tcp", "rdma"))):
            if getattr(self, name) not in words:
                raise UserError(f"data.store.{name}", getattr(self, name), "is unknown", f"use {', '.join(words[:-1])} or {words[-1]}")
        if not self.shm_dir:
            raise UserError("data.store.shm_dir", self.shm_dir, "is empty", "name a directory on a memory-backed file system (tmpfs), or leave it out")
        if self.master is not None:
            split_host_port(self.master, field="data.store.master")
        elif self.metadata is not None:
            fix = "give both, or neither to start a master for the run"
            raise UserError("data.store.metadata", self.metadata, "was given without data.store.master", fix)
        if self.rdma_devices and self.protocol != "rdma":
            problem = f"has no meaning for data.store.protocol={self.protocol}"
            raise UserError("data.store.rdma_devices", self.rdma_devices, problem, "leave it out, or set data.store.protocol to rdma")
        if self.kind == "shm" and (given := self.of_mooncake()):
            fix = "leave it out, or set data.store.kind to mooncake"
            raise UserError(f"data.store.{given[0]}", given[1], "has no meaning for data.store.kind=shm, which serves one host", fix)

    def of_mooncake(self) -> tuple[str, str] | None:
        """The first option that was given and that Mooncake alone obeys, with its value."""
        asked = {"protocol": self.protocol if self.protocol != "tcp" else "", "master": self.master, "host": self.host}
        local = self.host is None or is_loopback(bare(self.host))
        return next(((name, value) for name, value in asked.items() if value and not (name == "host" and local)), None)


def no_directory(shm_dir: str) -> UserError:
    """``data.store.shm_dir`` is not there."""
    return UserError("data.store.shm_dir", shm_dir, "is not a directory", "give a directory on a memory-backed file system (tmpfs)")


class Store(Protocol):
    """A client. Not thread-safe: open one a thread.

    Every method checks every return code of its backend.
    """

    kind: str

    def buffer(self, nbytes: int, *, device: str = "cpu") -> Tensor:
        """[nbytes] uint8 memory that the transport moves without another copy (registered; page-locked where CUDA is present).

        It belongs to the store until :meth:`release` or :meth:`close`. Memory that the transport cannot move by itself (a CUDA device
        without support in the transport) is given all the same and goes through a host copy.
        """
        ...

    def release(self, buffer: Tensor) -> None:
        """Give back what :meth:`buffer` gave (that very tensor); nothing may be moving into it or out of it."""
        ...

    def put(self, keys: Sequence[str], values: Sequence[Tensor]) -> None:
        """Write uint8 runs; whole when it returns. Values outside a :meth:`buffer` work too, at the cost of a copy.

        A key is written once: a put to a key that is there leaves its first value and is no error, so that a batch may be put again
        after :class:`StoreError` ``full``. A writer that dies inside a put leaves no value; until the backend gives that put up, another put
        of the same key may be refused as ``io``, so a new attempt takes a new key.

        Raises:
            StoreError: the first key that failed; keys before it are written, keys after it may be.
        """
        ...

    def get(self, keys: Sequence[str], outs: Sequence[Tensor]) -> list[int]:
        """Read each value into the head of the uint8 tensor beside it; returns the bytes of each.

        Raises:
            StoreError: ``missing``, ``unreachable``, or ``io`` (among them an ``out`` that is too small).
        """
        ...

    def exists(self, keys: Sequence[str]) -> list[bool]: ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete now, whoever reads; a key that is not there is fine."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class StoreServer(Protocol):
    """The memory behind a store, owned by the coordinator's process."""

    kind: str
    """mooncake or shm."""
    reason: str
    """Why this kind, for the log."""

    @property
    def address(self) -> Address:
        """What :func:`torchspec.transfer.open_store` takes; complete once started."""
        ...

    def start(self) -> None:
        """Start and wait until a client can connect.

        Raises:
            UserError: a missing binary or library (with the install line), no room, no free port.
        """
        ...

    def alive(self) -> bool: ...

    def close(self) -> None:
        """Stop every process and remove every file it made. Idempotent; works after a crash of its clients."""
        ...
