"""Shared memory of one host: the embedded store, one file a record in a directory of /dev/shm.

A put writes a nameless file (``O_TMPFILE``) and links it under its key when it is whole, so a writer killed half-way leaves
neither a value nor bytes, and the first writer of a key wins. The space is reserved before the first byte (``posix_fallocate``), and
bytes go through ``write`` and ``read``, never through a mapping: a full file system is an error code here, not a SIGBUS.
"""

from __future__ import annotations

import errno
import os
import stat
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchspec.transfer.store import Address, StoreError

if TYPE_CHECKING:
    from torch import Tensor

OPEN_MARK = "open"
"""File in the directory while the server takes records. Each put looks for it, so a writer adds at most one record after it is gone."""
_REMOVED = "the store's directory was removed"
_CHUNK = 1 << 30
"""Bytes of one read or write call; Linux moves at most 2 GiB - 4 KiB in one."""


class ShmStore:
    """A client of the directory.

    Args:
        address: ``{"kind": "shm", "directory": ...}``.

    Raises:
        StoreError: ``unreachable``, the directory is not there.
    """

    kind = "shm"

    def __init__(self, address: Address) -> None:
        try:
            self._directory: int | None = os.open(address["directory"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError("unreachable", "", f"{address['directory']}: {os.strerror(error.errno or 0)}") from error
        self._buffers: list[Tensor] = []

    def buffer(self, nbytes: int, *, device: str = "cpu") -> Tensor:
        """[nbytes] uint8; page-locked where CUDA is present. On a CUDA device it is plain device memory that goes through a host copy."""
        import torch

        pin = device == "cpu" and torch.cuda.is_available()
        self._buffers.append(torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin))
        return self._buffers[-1]

    def release(self, buffer: Tensor) -> None:
        self._buffers = [kept for kept in self._buffers if kept is not buffer]

    def put(self, keys: Sequence[str], values: Sequence[Tensor]) -> None:
        directory = self._open()
        for key, value in zip(keys, values, strict=True):
            name = _file_name(key)
            if value.numel() == 0:
                raise StoreError("io", key, "value is empty")
            try:
                os.stat(OPEN_MARK, dir_fd=directory)
                file = nameless_file(directory)
                try:
                    data = _bytes_of(value.cpu())
                    os.posix_fallocate(file, 0, len(data))
                    _write(file, data)
                    # Through /proc and with a directory descriptor, so that linkat gets AT_SYMLINK_FOLLOW, which names a nameless file.
                    os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=directory)
                except FileExistsError:
                    pass
                finally:
                    os.close(file)
            except OSError as error:
                # What a call on a directory that is being removed says differs between file systems; the mark does not.
                if not _is_file(directory, OPEN_MARK):
                    raise StoreError("unreachable", key, _REMOVED) from error
                raise _store_error(error, key) from error

    def get(self, keys: Sequence[str], outs: Sequence[Tensor]) -> list[int]:
        directory = self._open()
        sizes = []
        for key, out in zip(keys, outs, strict=True):
            try:
                file = os.open(_file_name(key), os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
                try:
                    size = os.fstat(file).st_size
                    if size > out.numel():
                        raise StoreError("io", key, f"value of {size} bytes does not fit the {out.numel()} given")
                    host = out if out.device.type == "cpu" else out.new_empty(size, device="cpu")
                    _read(file, _bytes_of(host)[:size], key)
                    if host is not out:
                        out[:size].copy_(host)
                finally:
                    os.close(file)
            except OSError as error:
                raise _store_error(error, key) from error
            sizes.append(size)
        return sizes

    def exists(self, keys: Sequence[str]) -> list[bool]:
        directory = self._open()
        return [_is_file(directory, _file_name(key)) for key in keys]

    def delete(self, keys: Sequence[str]) -> None:
        directory = self._open()
        for key in keys:
            try:
                unlink_if_there(_file_name(key), directory)
            except OSError as error:
                raise _store_error(error, key) from error

    def close(self) -> None:
        directory, self._directory = self._directory, None
        self._buffers.clear()
        if directory is not None:
            os.close(directory)

    def _open(self) -> int:
        """The directory's descriptor.

        Raises:
            StoreError: ``unreachable``: this client is closed, or the server removed the directory.
        """
        if self._directory is None:
            raise StoreError("unreachable", "", "this client is closed")
        if os.fstat(self._directory).st_nlink == 0:
            raise StoreError("unreachable", "", _REMOVED)
        return self._directory


def nameless_file(directory: int) -> int:
    """A new file without a name, open for writing; gone with its descriptor unless it is linked."""
    return os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory)


def unlink_if_there(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def _file_name(key: str) -> str:
    """Key as one file name: percent-encoded, so that different keys give different names and none holds a slash or starts with a dot.

    Raises:
        StoreError: ``io``, an empty key or one that is too long for a file name.
    """
    name = "r" + urllib.parse.quote(key, safe="=,:")
    if not key or len(name) > 255:
        raise StoreError("io", key, "key is empty or longer than a file name (254 characters once encoded)")
    return name


def _is_file(directory: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory).st_mode)
    except FileNotFoundError:
        return False


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")


def _write(file: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + _CHUNK], done)


def _read(file: int, into: memoryview, key: str) -> None:
    done = 0
    while done < len(into):
        got = os.preadv(file, [into[done : done + _CHUNK]], done)
        if got == 0:
            raise StoreError("io", key, f"value ends after {done} of {len(into)} bytes")
        done += got


def _store_error(error: OSError, key: str) -> StoreError:
    if error.errno == errno.ENOENT:
        return StoreError("missing", key, "no such key")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return StoreError("full", key, f"no room in the shared-memory directory ({error.strerror})")
    return StoreError("io", key, str(error))
