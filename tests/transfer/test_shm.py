"""Shared memory alone: room, leftovers of the dead, and what must not be touched."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.transfer.processes import ROOT, eventually, gone, script
from torchspec.errors import UserError
from torchspec.transfer import StoreConfig, StoreError, make_server, open_store, remove_leftovers
from torchspec.transfer.shm_server import ShmServer, sweep

START = """
from torchspec.transfer import StoreConfig, make_server
server = make_server(StoreConfig(kind="shm", shm_dir=args[0]), run=args[1], budget=1 << 20)
server.start()
say(server.address["directory"])
input()
"""


@pytest.fixture(params=["memory", "disk"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory for the stores of one test: on the real /dev/shm, and on a disk, where deleting is slow and races last longer."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pytest-") as directory:
        yield Path(directory)


def server(parent: Path, run: str = "r", budget: int = 1 << 20) -> ShmServer:
    made = make_server(StoreConfig(kind="shm", shm_dir=str(parent)), run=run, budget=budget)
    assert isinstance(made, ShmServer)
    return made


def value(nbytes: int = 1000) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


def test_directory_is_private_and_removed(parent: Path) -> None:
    one = server(parent, run="a/../b c")
    one.start()
    path = Path(one.address["directory"])
    assert path.parent == parent and path.name == "torchspec-a_.._b_c"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    store = open_store(one.address)
    store.put(["x/1"], [value()])
    assert [stat.S_IMODE(file.stat().st_mode) for file in path.glob("r*")] == [0o600]
    one.close()
    assert list(parent.iterdir()) == []
    with pytest.raises(StoreError, match="removed"):
        store.put(["x/2"], [value()])
    with pytest.raises(StoreError, match="removed"):
        store.get(["x/1"], [value()])
    assert list(parent.iterdir()) == []


def test_no_room_at_start(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's 64 MB."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    with pytest.raises(UserError, match=r"^data.store.shm_dir=.* has 64.0 MiB free, less than data.store.budget \(1.0 GiB\).*--shm-size"):
        server(parent, budget=1 << 30).start()
    assert list(parent.iterdir()) == []


def test_no_such_directory(parent: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        server(parent / "nowhere").start()


def test_full_file_system(tmp_path: Path) -> None:
    """A really full tmpfs: an error with the reason, no SIGBUS; nothing half-written is left, and room made is room again."""
    code = (
        "import os, sys, torch\n"
        "from torchspec.transfer import StoreConfig, StoreError, make_server, open_store\n"
        "server = make_server(StoreConfig(kind='shm', shm_dir=sys.argv[1]), run='r', budget=7 << 20); server.start()\n"
        "store = open_store(server.address); mb = torch.ones(1 << 20, dtype=torch.uint8); done = []\n"
        "try:\n"
        "    for i in range(20): store.put([str(i)], [mb]); done.append(str(i))\n"
        "except StoreError as error: assert (error.reason, error.key) == ('full', str(len(done))), error\n"
        "assert 6 <= len(done) <= 8 and len(os.listdir(server.address['directory'])) == len(done) + 1\n"
        "for key in done: assert store.get([key], [mb.zero_()]) == [1 << 20] and mb.eq(1).all()\n"
        "store.delete(done[:1]); store.put(['again'], [mb]); server.close(); assert os.listdir(sys.argv[1]) == []\n"
        "print('fine')\n"
    )
    mount = f'mount -t tmpfs -o size=8m tmpfs {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CODE": code}
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr


def test_killed_server_is_swept_by_the_next(parent: Path) -> None:
    with script(START, str(parent), "dead") as owner:
        path = Path(owner.hear())
        store = open_store({"kind": "shm", "directory": str(path)})
        store.put(["x/1"], [value()])
        assert sweep(parent) == [], "swept a living store"
        owner.kill()
    assert path.is_dir()
    one = server(parent, run="next")
    one.start()
    assert [entry.name for entry in parent.iterdir()] == ["torchspec-next"]
    one.close()


def test_leftovers_of_one_run(parent: Path) -> None:
    config = StoreConfig(kind="shm", shm_dir=str(parent))
    with script(START, str(parent), "one") as owner, script(START, str(parent), "two") as other:
        paths = [Path(owner.hear()), Path(other.hear())]
        remove_leftovers(config, run="one")
        assert all(path.is_dir() for path in paths), "removed the files of a living server"
        owner.kill()
        remove_leftovers(config, run="one")
        remove_leftovers(config, run="one")
        remove_leftovers(config, run="never was")
        assert [path.is_dir() for path in paths] == [False, True]


def test_same_run_id(parent: Path) -> None:
    """Refused while its owner lives; taken over, emptied, once it is dead."""
    with script(START, str(parent), "same") as owner:
        path = Path(owner.hear())
        with pytest.raises(UserError, match="in use by another run"):
            server(parent, run="same").start()
        open_store({"kind": "shm", "directory": str(path)}).put(["old"], [value()])
        owner.kill()
        one = server(parent, run="same")
        one.start()
        assert open_store(one.address).exists(["old"]) == [False]
        one.close()


def test_sweep_touches_stores_only(parent: Path) -> None:
    (parent / "torchspec-mine").mkdir()
    (parent / "torchspec-mine" / "results.txt").write_text("precious")
    (parent / "torchspec-yours").mkdir()
    for name in ("open", "report.txt"):  # names of ours with another content
        (parent / "torchspec-yours" / name).write_text("precious")
    (parent / "torchspec-file").write_text("precious")
    (parent / "elsewhere").mkdir()
    (parent / "elsewhere" / "open").write_text("x")
    (parent / "torchspec-link").symlink_to(parent / "elsewhere")
    one = server(parent)
    one.start()
    one.close()
    assert (parent / "torchspec-mine" / "results.txt").read_text() == "precious"
    assert sorted(path.name for path in (parent / "torchspec-yours").iterdir()) == ["open", "report.txt"]
    assert (parent / "torchspec-file").exists() and (parent / "elsewhere" / "open").exists()
    with pytest.raises(UserError, match="is no store"):
        server(parent, run="mine").start()


def test_writers_do_not_keep_a_closing_server(parent: Path) -> None:
    """close() beside writers that never stop: it ends at once, nothing is left, each writer is told why."""
    one = server(parent)
    one.start()
    told: list[str] = []
    going = threading.Barrier(3)

    def write(name: int) -> None:
        store = open_store(one.address)
        try:
            for number in range(1_000_000):
                store.put([f"{name}/{number}"], [value(100)])
                if number == 50:
                    going.wait(timeout=30)
        except StoreError as error:
            told.append(error.reason)
        finally:
            store.close()

    writers = [threading.Thread(target=write, args=(name,), daemon=True) for name in range(2)]
    for writer in writers:
        writer.start()
    going.wait(timeout=30)
    closing = threading.Thread(target=one.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive(), "writers keep it from closing"
    for writer in writers:
        writer.join(timeout=10)
    assert told == ["unreachable"] * 2
    assert list(parent.iterdir()) == []


def test_interrupted_removal_is_taken_up(parent: Path) -> None:
    """A server that died while it removed its files: the next one still knows a store when it sees one."""
    with script(START, str(parent), "half") as owner:
        path = Path(owner.hear())
        store = open_store({"kind": "shm", "directory": str(path)})
        store.put(["x/1", "x/2"], [value(), value()])
        owner.kill()
    (path / "open").rename(path / "closed")
    with pytest.raises(StoreError) as raised:
        store.put(["x/3"], [value()])
    assert raised.value.reason == "unreachable"
    assert sweep(parent) == [path.name] and not path.exists()


def test_sweep_leaves_a_strangers_file(parent: Path) -> None:
    """A store with something in it that is not ours ends in finite time, and that something stays."""
    one = server(parent)
    one.start()
    stranger = Path(one.address["directory"]) / "notes.txt"
    stranger.write_text("precious")
    open_store(one.address).put(["x/1"], [value()])
    one.close()
    assert [file.name for file in stranger.parent.iterdir()] == ["notes.txt"]


def test_lock_outlives_no_process(parent: Path) -> None:
    """A child of the server's process (an engine worker) does not keep the lock of a dead server."""
    code = START.replace("input()", "import subprocess; say(subprocess.Popen(['sleep', '60']).pid); input()")
    with script(code, str(parent), "forks") as owner:
        path = Path(owner.hear())
        child = owner.hear()
        owner.kill()
        try:
            assert not gone(child)
            assert eventually(lambda: sweep(parent) == [path.name] or not path.exists(), seconds=5)
        finally:
            os.kill(child, signal.SIGKILL)


def test_alive_notices_a_removed_directory(parent: Path) -> None:
    one = server(parent)
    assert not one.alive()
    one.start()
    assert one.alive()
    shutil.rmtree(one.address["directory"])
    assert not one.alive()
    one.close()
