"""Client of a Mooncake store: register memory, put, get, force-delete; every return code is looked at.

Mooncake 0.3.14 as measured, and what is done about it here:

* a put of a key that exists, *or whose first put never ended*, returns 0 and writes nothing: existence is asked after each put;
* in a batch, keys after a failed one are written all the same, as the contract allows;
* a remove within the read lease answers -706: removal is always forced;
* a call on a closed client crashes the process: closed clients are refused here;
* ``setup`` tries a dead master 20 times, 90 s: the port is probed first, and ``setup`` gets one try;
* protocol rdma without an RDMA device silently becomes TCP: refused;
* TCP opens a connection for every transfer, and each closed one keeps a port for a minute: connections are kept;
* all TCP of a client goes through one thread, 0.3 s of it for every GB, on either side: on a machine with cores to spare, a client of ours
  has several of Mooncake's and shares the keys of a call among them, and so has the process that holds the memory (``segment.py``);
* the TCP of a client takes 1024 transfers at once: a call is cut into smaller ones;
* TCP goes in pieces of 64 KiB, and a CUDA build asks the driver about the memory with each: they are 1 MiB here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchspec.errors import UserError
from torchspec.network import route_to, split_host_port
from torchspec.transfer.store import Address, StoreError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

INSTALL_LIBRARIES = "apt-get install -y libibverbs1 librdmacm1 libnuma1"
INSTALL_WHEEL = "pip install mooncake-transfer-engine-non-cuda (no GPU), mooncake-transfer-engine (CUDA 12) or mooncake-transfer-engine-cuda13"

SETTINGS = {
    "MC_STORE_CLIENT_METRIC": "0",
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_RPC_TIMEOUT_MS": "10000",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_SLICE_SIZE": str(1 << 20),
}
"""Mooncake's environment variables as they are set for every process that uses it, unless they are set already."""

_LANES = 2
"""Clients of Mooncake's behind one of ours, at most."""
_CORES = 8
"""Of the machine, for each of them: a client that waits for a transfer keeps a core busy, and its transport another."""
_WORTH = 16_000_000
"""Bytes of a call from which more than one of them is used."""
_MOST_KEYS = 256
"""Of one call to Mooncake."""

_CODES = {
    -10: "buffer overflow",
    -101: "segment not found",
    -200: "no room in the memory segments",
    -300: "invalid version",
    -400: "invalid key",
    -500: "write failed",
    -600: "invalid parameters, or the value does not fit the memory given",
    -601: "illegal client",
    -703: "the put of this key has not ended",
    -704: "no such key",
    -706: "key is leased by a reader",
    -800: "transfer failed: the process that holds the memory does not answer",
    -900: "the master does not answer",
    -901: "the master did not answer in time",
}
_MISSING, _FULL, _UNREACHABLE = {-703, -704}, {-200}, {-101, -800, -900, -901}


def load(host: str = "") -> ModuleType:
    """Import ``mooncake.store`` (no torch comes with it), quietly.

    Args:
        host: address that this process will use: with an IPv6 one Mooncake must know before its first import, or its TCP uses IPv4 alone.

    Raises:
        UserError: the wheel or a system library is missing; the fix is the line that installs it.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ":" in host:
        os.environ.setdefault("MC_USE_IPV6", "1")
    try:
        import mooncake.store
    except ModuleNotFoundError as error:
        raise UserError("data.store.kind", "mooncake", f"needs Mooncake, which is not installed ({error})", INSTALL_WHEEL) from error
    except ImportError as error:
        fix = f"{INSTALL_LIBRARIES}; on a CUDA machine also check that the wheel fits its CUDA version"
        raise UserError("data.store.kind", "mooncake", f"cannot load Mooncake ({error})", fix) from error
    if not {"MC_LOG_LEVEL", "MC_LOG_DIR", "GLOG_logtostderr"} & os.environ.keys():
        _log_level(mooncake.store, 3)
    module: ModuleType = mooncake.store
    return module


def _log_level(module: ModuleType, level: int) -> None:
    """Lowest glog level that is printed, 3 being fatal: what goes wrong comes back as a code, so its lines on stderr say nothing new."""
    try:
        ctypes.c_int.in_dll(ctypes.CDLL(module.__file__), "_ZN3fLI17FLAGS_minloglevelE").value = level
    except (OSError, ValueError):
        pass  # a build without that symbol prints more


def check_rdma(protocol: str) -> None:
    """Refuse rdma on a machine without an RDMA device (Mooncake would fall back to TCP without a word).

    Raises:
        UserError: there is none.
    """
    devices = Path("/sys/class/infiniband")
    if protocol == "rdma" and not (devices.is_dir() and any(devices.iterdir())):
        raise UserError("data.store.protocol", protocol, "needs an RDMA device, and /sys/class/infiniband shows none", "set data.store.protocol to tcp")


def connect(*, host: str, master: str, metadata: str, protocol: str, rdma_devices: str, segment: int = 0) -> Any:
    """A set-up ``MooncakeDistributedStore`` that contributes ``segment`` bytes.

    Raises:
        StoreError: ``unreachable``: the master does not answer.
    """
    module = load(host)
    check_rdma(protocol)
    try:
        with socket.create_connection(split_host_port(master, field="data.store.master"), timeout=5):
            pass
    except OSError as error:
        raise StoreError("unreachable", "", f"Mooncake master {master}: {error}") from error
    client = module.MooncakeDistributedStore()
    code = client.setup(host, metadata, segment, 0, protocol, rdma_devices, master)
    if code != 0:
        raise StoreError("unreachable", "", f"Mooncake set-up at master {master}, metadata {metadata}, host {host}: {_words(code)}")
    return client


class MooncakeStore:
    """A client that contributes no memory.

    Args:
        address: ``kind``, ``master`` (host:port), ``metadata`` (URL or P2PHANDSHAKE), ``protocol``, ``rdma_devices``.

    Raises:
        UserError: Mooncake does not load here.
        StoreError: ``unreachable``.
    """

    kind = "mooncake"

    def __init__(self, address: Address) -> None:
        self._clients: list[Any] = []
        self._buffers: list[Tensor] = []
        self._registered: list[tuple[int, int]] = []  # [start, end) addresses
        self._stage: Tensor | None = None
        master_host, master_port = split_host_port(address["master"], field="data.store.master")
        try:
            host = route_to(master_host, master_port)
        except OSError as error:
            raise StoreError("unreachable", "", f"Mooncake master {address['master']}: {error}") from error
        module = load(host)
        self._pinned = module.ReplicateConfig()
        self._pinned.with_hard_pin = True  # never evicted: a full store says so instead
        self._connect = functools.partial(
            connect, host=host, master=address["master"], metadata=address["metadata"], protocol=address["protocol"], rdma_devices=address["rdma_devices"]
        )
        self._lanes = lanes(_LANES, protocol=address["protocol"], cores=_CORES)
        self._clients.append(self._connect())

    def buffer(self, nbytes: int, *, device: str = "cpu") -> Tensor:
        """[nbytes] uint8 registered with the transport; page-locked where CUDA is present.

        A CUDA device works with the CUDA wheels; where the transport refuses the memory, it is given unregistered and goes through a
        host copy.
        """
        import torch

        self._open()
        pin = device == "cpu" and torch.cuda.is_available()
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin)
        start = tensor.data_ptr()
        movable = tensor.device.type == "cpu" or _moves_cuda(str(load().__file__))
        code = self._register(start, nbytes) if movable else -600
        if code == 0:
            self._registered.append((start, start + nbytes))
        elif tensor.device.type == "cpu":
            raise StoreError("io", "", f"registering {nbytes} bytes: {_words(code)}")
        self._buffers.append(tensor)
        return tensor

    def _register(self, start: int, nbytes: int) -> int:
        """With all clients, or, when one refuses, with none; returns its code."""
        for number, client in enumerate(self._clients):
            code = int(client.register_buffer(start, nbytes))
            if code != 0:
                for earlier in self._clients[:number]:
                    earlier.unregister_buffer(start)
                return code
        return 0

    def release(self, buffer: Tensor) -> None:
        self._open()
        span = (buffer.data_ptr(), buffer.data_ptr() + buffer.numel())
        if span in self._registered:  # memory that the transport refused is not
            self._registered.remove(span)
            code = min(client.unregister_buffer(span[0]) for client in self._clients)
            if code != 0:
                raise StoreError("io", "", f"giving back {buffer.numel()} bytes: {_words(code)}")
        self._buffers = [kept for kept in self._buffers if kept is not buffer]

    def put(self, keys: Sequence[str], values: Sequence[Tensor]) -> None:
        client = self._open()
        for at, (key, value) in enumerate(zip(keys, values, strict=True)):
            if value.numel() == 0:
                if at:
                    self.put(keys[:at], values[:at])
                raise StoreError("io", key, "value is empty")
            _wait_for_device(value)
        if all(self._is_registered(value) for value in values):
            codes = self._move("batch_put_from", keys, values, self._pinned)
        else:
            codes = []
            for key, value in zip(keys, values, strict=True):
                source = value if self._is_registered(value) else self._staged(value.numel()).copy_(value)
                codes += client.batch_put_from([key], [source.data_ptr()], [value.numel()], self._pinned)
                if codes[-1] < 0:
                    break
            keys = keys[: len(codes)]
        for key, code, there in zip(keys, codes, client.batch_is_exist(list(keys)), strict=True):
            _check(code, key)
            _check(min(there, 0), key)
            if not there:
                raise StoreError("io", key, "an earlier put of this key was never finished; take another key")

    def get(self, keys: Sequence[str], outs: Sequence[Tensor]) -> list[int]:
        client = self._open()
        for out in outs:
            _wait_for_device(out)
        if all(self._is_registered(out) for out in outs):
            sizes = self._move("batch_get_into", keys, outs)
            for key, size in zip(keys, sizes, strict=True):
                _check(size, key)
            return sizes
        sizes = []
        for key, out in zip(keys, outs, strict=True):
            stage = out if self._is_registered(out) else self._staged(out.numel())
            (size,) = client.batch_get_into([key], [stage.data_ptr()], [out.numel()])
            _check(size, key)
            if stage is not out:
                out[:size].copy_(stage[:size])
            sizes.append(size)
        return sizes

    def _move(self, method: str, keys: Sequence[str], tensors: Sequence[Tensor], *more: Any) -> list[int]:
        """Call a batch method of Mooncake's clients, each with its share of the keys; returns their codes in the order of the keys."""
        shares = [list(range(len(keys)))]
        if self._lanes > 1 and sum(tensor.numel() for tensor in tensors) >= _WORTH:
            shares = shared([tensor.numel() for tensor in tensors], self._lanes)
            self._widen(len(shares))
            shares = shares if len(self._clients) >= len(shares) else [list(range(len(keys)))]
        codes = [0] * len(keys)
        errors: list[BaseException] = []

        def run(client: Any, share: list[int]) -> None:
            try:
                for at in range(0, len(share), _MOST_KEYS):
                    some = share[at : at + _MOST_KEYS]
                    found = getattr(client, method)([keys[i] for i in some], [tensors[i].data_ptr() for i in some], [tensors[i].numel() for i in some], *more)
                    for i, code in zip(some, found, strict=True):
                        codes[i] = code
            except BaseException as error:
                errors.append(error)

        # A transfer that never ends keeps its thread for good, which must not keep the process: no pool, whose threads are waited for at exit.
        threads = [threading.Thread(target=run, args=job, daemon=True) for job in zip(self._clients[1:], shares[1:], strict=False)]
        for thread in threads:
            thread.start()
        run(self._clients[0], shares[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return codes

    def _widen(self, number: int) -> None:
        """Have so many clients that all know the memory. One that cannot be had is done without from now on: more of them are for speed alone."""
        while len(self._clients) < number:
            more = None
            try:
                more = self._connect()
                for start, end in self._registered:
                    _check(more.register_buffer(start, end - start), "")
            except StoreError as error:
                log.warning("going on with %d of %d clients of the store: %s", len(self._clients), number, error)
                self._lanes = len(self._clients)
                if more is not None:
                    more.close()
                return
            self._clients.append(more)

    def exists(self, keys: Sequence[str]) -> list[bool]:
        found = self._open().batch_is_exist(list(keys))
        for key, there in zip(keys, found, strict=True):
            _check(min(there, 0), key)
        return [there == 1 for there in found]

    def delete(self, keys: Sequence[str]) -> None:
        for key, code in zip(keys, self._open().batch_remove(list(keys), True), strict=True):
            if code not in _MISSING:
                _check(code, key)

    def close(self) -> None:
        """Takes up to a second for each of Mooncake's clients, with the interpreter lock held: Mooncake waits for a heartbeat thread."""
        clients, self._clients = self._clients, []
        for client in clients:
            for start, _ in self._registered:
                client.unregister_buffer(start)
            client.close()
        self._registered.clear()
        self._buffers.clear()
        self._stage = None

    def _open(self) -> Any:
        if not self._clients:
            raise StoreError("unreachable", "", "this client is closed")
        return self._clients[0]

    def _is_registered(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(low <= start and start + tensor.numel() <= high for low, high in self._registered)

    def _staged(self, nbytes: int) -> Tensor:
        """[nbytes] of registered host memory for values that are not in a buffer; grows in powers of two."""
        if self._stage is None or self._stage.numel() < nbytes:
            if self._stage is not None:
                self.release(self._stage)
            self._stage = self.buffer(max(1 << 20, 1 << (nbytes - 1).bit_length()))
        return self._stage[:nbytes]


def lanes(most: int, *, protocol: str, cores: int) -> int:
    """Clients of Mooncake's to move bytes with side by side on this machine.

    Args:
        most: at most.
        protocol: over RDMA one does.
        cores: of the machine for each.
    """
    return max(1, min(most, len(os.sched_getaffinity(0)) // cores)) if protocol == "tcp" else 1


def shared(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Positions of ``sizes`` in up to ``most`` groups of about the same sum; none is empty, and positions ascend in each."""
    groups: list[list[int]] = [[] for _ in range(min(most, len(sizes)))]
    sums = [0] * len(groups)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = sums.index(min(sums))
        groups[least].append(i)
        sums[least] += sizes[i]
    return [sorted(group) for group in groups]


@functools.cache
def _moves_cuda(library: str) -> bool:
    """Whether this Mooncake build is linked against CUDA (the wheel without takes any pointer, and would read device memory as host memory)."""
    return b"libcudart" in Path(library).read_bytes()


def _wait_for_device(tensor: Tensor) -> None:
    """The transport touches device memory outside of the caller's CUDA stream, so what the stream still does with it must be done."""
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.current_stream(tensor.device).synchronize()


def _words(code: int) -> str:
    return f"code {code}, {_CODES.get(code, 'unknown')}"


def _check(code: int, key: str) -> None:
    """Raise the :class:`StoreError` that a negative code stands for."""
    if code >= 0:
        return
    if code in _MISSING:
        raise StoreError("missing", key, _words(code))
    if code in _FULL:
        raise StoreError("full", key, _words(code))
    raise StoreError("unreachable" if code in _UNREACHABLE else "io", key, _words(code))
