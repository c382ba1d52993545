"""Owner of a shared-memory store: creates its directory, keeps it locked, removes it; sweeps what killed runs left.

The server's process holds a lock (``flock``) on the directory itself. The kernel drops it when the process dies, however it dies,
and in whatever PID namespace; so a store whose lock can be taken is a leftover, and the next server on the host removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from torchspec.errors import UserError
from torchspec.transfer.shm import OPEN_MARK, nameless_file, unlink_if_there
from torchspec.transfer.sizes import show_bytes
from torchspec.transfer.store import Address, StoreConfig, no_directory

PREFIX = "torchspec-"
_SAYS = "TorchSpec store"
"""How marks begin."""
_CLOSED_MARK = "closed"
"""What ``OPEN_MARK`` is renamed to when removal begins. A directory with neither is no store, and nobody's to sweep."""


class ShmServer:
    """Owner of the directory ``<shm_dir>/torchspec-<run>``.

    Args:
        config: ``shm_dir`` is read.
        run: id of the run.
        budget: bytes of records alive at once.
        reason: why this kind of store, for the log.
    """

    kind = "shm"

    def __init__(self, config: StoreConfig, *, run: str, budget: int, reason: str) -> None:
        self.reason = reason
        self._parent = Path(config.shm_dir)
        self._path = _run_directory(config, run)
        self._budget = budget
        self._lock: int | None = None

    @property
    def address(self) -> Address:
        return {"kind": "shm", "directory": str(self._path)}

    def start(self) -> None:
        if self._lock is not None:
            return
        if not self._parent.is_dir():
            raise no_directory(str(self._parent))
        sweep(self._parent)
        free = shutil.disk_usage(self._parent).free
        if free < self._budget:
            raise UserError(
                "data.store.shm_dir",
                str(self._parent),
                f"has {show_bytes(free)} free, less than data.store.budget ({show_bytes(self._budget)})",
                "enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g), point data.store.shm_dir to a larger tmpfs, or lower data.store.budget",
            )
        self._lock = self._create()
        try:
            os.close(nameless_file(self._lock))
            self._path.joinpath(OPEN_MARK).write_text(f"{_SAYS} of process {os.getpid()}; swept by the next run once that is gone\n")
        except OSError as error:
            self.close()
            raise UserError("data.store.shm_dir", str(self._parent), f"cannot hold nameless files ({error.strerror})", "give a directory on a tmpfs") from error

    def alive(self) -> bool:
        return self._lock is not None and os.fstat(self._lock).st_nlink > 0

    def close(self) -> None:
        if self._lock is not None:
            _remove(self._path, self._lock)
            self._lock = None

    def _create(self) -> int:
        """Create and lock the run's directory; a leftover of the same name is removed first. Returns the lock's descriptor."""
        for _ in range(100):
            try:
                os.mkdir(self._path, 0o700)
            except FileExistsError:
                if not _sweep_one(self._path):
                    raise UserError(
                        "data.store.shm_dir", str(self._path), "is in use by another run or is no store", "choose another run id or data.store.shm_dir"
                    ) from None
                continue
            except OSError as error:
                raise UserError("data.store.shm_dir", str(self._parent), f"cannot be written ({error.strerror})", "give a writable tmpfs") from error
            lock = _lock(self._path)
            if lock is not None:
                return lock
            # A sweeper locked the directory between the two calls, and removes it: once more.
        raise UserError("data.store.shm_dir", str(self._path), "was swept by others again and again", "start again")


def sweep(parent: Path) -> list[str]:
    """Remove every ``torchspec-*`` directory in ``parent`` whose server is dead; returns their names."""
    try:
        found = sorted(entry.path for entry in os.scandir(parent) if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [os.path.basename(path) for path in found if _sweep_one(Path(path))]


def remove_run(config: StoreConfig, *, run: str) -> bool:
    """Remove what the dead server of ``run`` left; False when there is nothing, or the server lives."""
    path = _run_directory(config, run)
    return path.is_dir() and _sweep_one(path)


def _run_directory(config: StoreConfig, run: str) -> Path:
    return Path(config.shm_dir) / (PREFIX + re.sub(r"[^A-Za-z0-9_.-]", "_", run))


def _lock(path: Path) -> int | None:
    """A locked descriptor of the directory, or None: locked by another, not ours, or gone."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, there = os.fstat(lock), os.stat(path)
        if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino) and held.st_uid == os.geteuid():
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _sweep_one(path: Path) -> bool:
    """Remove a leftover store; True when there is nothing at ``path`` any more."""
    lock = _lock(path)
    if lock is not None:
        names = os.listdir(lock)
        if any(name in names and _is_mark(name, lock) for name in (OPEN_MARK, _CLOSED_MARK)) or not names:
            _remove(path, lock)
        else:
            os.close(lock)
    return not path.exists()


def _is_mark(name: str, lock: int) -> bool:
    """Whether a file is a mark of ours, and not somebody's that has its name."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=lock)
    except OSError:
        return False
    try:
        return os.read(file, len(_SAYS)) == _SAYS.encode()
    except OSError:
        return False
    finally:
        os.close(file)


def _remove(path: Path, lock: int) -> None:
    """Delete a store while its lock is held, then let go.

    The mark is renamed first: each living writer can still link the one record it was at, so there are at most as many further rounds as
    writers. (Without that, on ext4, two busy writers kept a close going for minutes.) What is not ours is left, and so is the directory
    then. The mark goes last, so that a sweep cut short can be taken up again.
    """
    try:
        with suppress(FileNotFoundError):
            os.rename(OPEN_MARK, _CLOSED_MARK, src_dir_fd=lock, dst_dir_fd=lock)
        while True:
            for name in os.listdir(lock):
                if name.startswith("r"):
                    unlink_if_there(name, lock)
            unlink_if_there(_CLOSED_MARK, lock)
            try:
                os.rmdir(path)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
            if any(not name.startswith("r") for name in os.listdir(lock)):
                return
    finally:
        os.close(lock)
