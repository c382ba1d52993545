"""Mooncake alone: its processes live and die as they should, nothing owed is evicted, and what cannot work says so."""

from __future__ import annotations

import importlib.abc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.transfer.processes import ROOT, eventually, gone, script
from torchspec.errors import UserError
from torchspec.transfer import StoreConfig, StoreError, make_server, mooncake, mooncake_server, open_store, segment
from torchspec.transfer.mooncake_server import MooncakeServer

START = """
from torchspec.transfer import StoreConfig, make_server
server = make_server(StoreConfig(kind="mooncake"), run="r", budget=1 << 20)
server.start()
say(server.pids)
input()
"""


def server(*, run: str = "r", budget: int = 1 << 20, log_dir: Path | None = None, **config: str) -> MooncakeServer:
    made = make_server(StoreConfig(kind="mooncake", **config), run=run, budget=budget, log_dir=log_dir)  # type: ignore[arg-type]
    assert isinstance(made, MooncakeServer)
    return made


@pytest.fixture(params=[1, 3], ids=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts in which the memory is held and clients behind one of ours: as on a small machine, and as on a large one."""
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: request.param)
    monkeypatch.setattr(mooncake, "_WORTH", 0)
    monkeypatch.setattr(mooncake_server, "_PART", 1 << 20)
    return int(request.param)


@pytest.fixture
def master() -> Iterator[tuple[str, int]]:
    """A master of somebody else: its address and process id."""
    process, port = segment.start_master("127.0.0.1", abandon_seconds=1)
    yield f"127.0.0.1:{port}", process.pid
    process.kill()
    process.wait()


def test_full_store_refuses_and_evicts_nothing(parts: int) -> None:
    """Twice the budget offered: the excess is refused with ``full``, and every record taken is there, byte for byte, long after."""
    one = server(budget=32 << 20)
    one.start()
    store = open_store(one.address)
    source, out = store.buffer(1 << 20), store.buffer(1 << 20)
    taken, refused = [], 0
    for number in range(160):  # the parts are rounded up
        try:
            store.put([f"r/{number}"], [source.fill_(number)])
            taken.append(number)
        except StoreError as error:
            assert (error.reason, error.key) == ("full", f"r/{number}")
            refused += 1
    assert len(taken) >= 32 and refused >= 20, "the budget must fit, and the store must be full"
    assert not eventually(lambda: not all(store.exists([f"r/{n}" for n in taken])), seconds=1.0), "evicted"
    for number in taken:
        assert store.get([f"r/{number}"], [out.zero_()]) == [1 << 20]
        assert out.eq(number).all()
    store.delete([f"r/{number}" for number in taken[:2]])
    store.put(["r/new"], [source])
    store.close()
    one.close()


def test_budget_fits_in_spite_of_fragments(parts: int) -> None:
    """Sizes over two decades, deleted out of order, the budget always nearly full: no put fails."""
    budget = 32 << 20
    one = server(budget=budget)
    one.start()
    store = open_store(one.address)
    buffer = store.buffer(4 << 20)
    chance = torch.Generator().manual_seed(0)
    live: list[tuple[str, int]] = []
    for number in range(600):
        size = int(4e4 * 10 ** (2 * torch.rand(1, generator=chance).item()))
        while sum(nbytes for _, nbytes in live) + size > budget:
            key, _ = live.pop(int(torch.randint(min(4, len(live)), (1,), generator=chance)))
            store.delete([key])
        store.put([f"r/{number}"], [buffer[:size]])
        live.append((f"r/{number}", size))
    assert all(store.exists([key for key, _ in live]))
    store.close()
    one.close()


def test_a_batch_goes_through_every_client_and_keeps_its_order(parts: int) -> None:
    one = server(budget=64 << 20)
    one.start()
    store = open_store(one.address)
    sizes = [1_000_000 + 7 * i for i in range(20)]
    source, out = store.buffer(sum(sizes)), store.buffer(sum(sizes))
    source.copy_(torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    keys = [f"r/{i}" for i in range(20)]
    store.put(keys, source.split(sizes))
    assert store.get(keys, out.split(sizes)) == sizes and torch.equal(source, out)
    clients = store._clients  # type: ignore[attr-defined]
    assert len(clients) == parts
    store.put(keys[:3], source.split(sizes)[3:6])  # as ever: a key is written once
    out.zero_()
    assert store.get(keys, out.split(sizes)) == sizes and torch.equal(source, out)
    store.delete(keys[4:9])
    with pytest.raises(StoreError) as raised:
        store.get(keys, out.split(sizes))
    assert (raised.value.reason, raised.value.key) == ("missing", keys[4])
    store.release(source)
    again = store.buffer(3_000_000)
    again.fill_(9)
    store.put(["r/a", "r/b"], again.split(1_500_000))
    assert store.get(["r/a", "r/b"], out[:3_000_000].split(1_500_000)) == [1_500_000] * 2 and out[:3_000_000].eq(9).all()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.get(["r/a"], [out[:10]])
    one.close()


def test_the_largest_record_fits_into_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: most)
    for largest, parts in ((0, 4), (100 << 20, 4), (300 << 20, 2), (3 << 30, 1)):
        made = make_server(StoreConfig(kind="mooncake"), run="r", budget=4 << 30, largest=largest)
        assert isinstance(made, MooncakeServer)
        assert made._parts == parts and (parts == 1 or made._part_nbytes >= 10 * largest)
        assert made._parts * made._part_nbytes >= 6 << 30


@pytest.mark.parametrize("refuses", ["set-up", "memory"])
def test_a_second_client_that_cannot_be_had_is_done_without(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    monkeypatch.setattr(mooncake, "_WORTH", 0)
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: 1)
    one = server(budget=16 << 20)
    one.start()
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: 2)
    store = open_store(one.address)
    buffer = store.buffer(2_000_000)

    class Refusing:
        closed = False

        def register_buffer(self, start: int, nbytes: int) -> int:
            return -600

        def close(self) -> None:
            self.closed = True

    other = Refusing()

    def connect() -> Refusing:
        if refuses == "set-up":
            raise StoreError("unreachable", "", "no")
        return other

    monkeypatch.setattr(store, "_connect", connect)
    for round in range(2):
        store.put([f"r/{round}a", f"r/{round}b"], buffer.split(1_000_000))
        assert store.get([f"r/{round}a", f"r/{round}b"], buffer.split(1_000_000)) == [1_000_000] * 2
        monkeypatch.setattr(store, "_connect", None)  # it is not asked again
    assert other.closed == (refuses == "memory") and len(store._clients) == 1  # type: ignore[attr-defined]
    store._clients.append(other)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="registering"):
        store.buffer(1_000_000)
    store._clients.pop()  # type: ignore[attr-defined]
    assert len(store._registered) == 1  # type: ignore[attr-defined]
    store.buffer(1_000_000)
    store.close()
    one.close()


@pytest.mark.parametrize("own_buffer", [True, False], ids=["buffer", "elsewhere"])
def test_put_that_fails_in_a_batch_is_named_and_the_batch_may_be_put_again(parts: int, own_buffer: bool) -> None:
    """Keys before the one that failed are written, keys after it may be; what was written is written once."""
    small = server(budget=1 << 20)
    small.start()
    store = open_store(small.address)
    keys, sizes = ["r/a", "r/b", "r/c"], [1000, 48 << 20, 1000]
    values = list((store.buffer(sum(sizes)) if own_buffer else torch.empty(sum(sizes), dtype=torch.uint8)).fill_(3).split(sizes))
    for _ in range(2):
        with pytest.raises(StoreError) as raised:
            store.put(keys, values)
        assert (raised.value.reason, raised.value.key) == ("full", keys[1])
        assert store.exists(keys)[:2] == [True, False]
    values[1] = values[1][:2000]
    values[0].fill_(4)
    store.put(keys, values)
    out = torch.empty(3000, dtype=torch.uint8)
    assert [store.get([key], [out])[0] for key in keys] == [1000, 2000, 1000]
    store.get(keys[:1], [out])
    assert out[:1000].eq(3).all()
    store.close()
    small.close()


def test_more_keys_in_a_call_than_a_connection_takes(parts: int) -> None:
    one = server(budget=16 << 20)
    one.start()
    store = open_store(one.address)
    source, out = store.buffer(3000 * 64), store.buffer(3000 * 64)
    source.copy_(torch.arange(3000).view(torch.uint8).repeat(8))
    keys = [f"r/{i}" for i in range(3000)]
    store.put(keys, source.split(64))
    assert store.get(keys, out.split(64)) == [64] * 3000 and torch.equal(source, out)
    store.close()
    one.close()


def test_shares_of_a_call() -> None:
    assert mooncake.shared([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert mooncake.shared([7], 4) == [[0]]
    groups = mooncake.shared([3, 9, 2, 8, 4, 4, 1], 3)
    assert sorted(i for group in groups for i in group) == list(range(7)) and all(group == sorted(group) for group in groups)
    assert mooncake.lanes(4, protocol="rdma", cores=1) == 1 and mooncake.lanes(4, protocol="tcp", cores=10_000) == 1
    assert mooncake.lanes(4, protocol="tcp", cores=1) == min(4, len(os.sched_getaffinity(0)))


def test_space_of_a_killed_put_comes_back(master: tuple[str, int]) -> None:
    one = server(budget=64 << 20, master=master[0])
    one.start()
    code = (
        "import torch\nfrom torchspec.transfer import open_store\nstore = open_store(args[0])\nvalue = store.buffer(64 << 20); value.fill_(1)\n"
        "say(0); input(); store.put(['r/half'], [value]); say(1); input()"
    )
    store = open_store(one.address)
    mb16 = store.buffer(16 << 20)

    def room() -> int:
        """Records of 16 MiB that fit."""
        keys: list[str] = []
        try:
            while True:
                store.put([f"r/{len(keys)}"], [mb16])
                keys.append(f"r/{len(keys)}")
        except StoreError as error:
            assert error.reason == "full"
        store.delete(keys)
        return len(keys)

    before = room()
    for attempt in range(20):
        with script(code, one.address) as writer:
            writer.hear()
            writer.tell()
            deadline = time.monotonic() + 0.002 * (attempt + 1)
            while time.monotonic() < deadline:  # somewhere inside the put
                pass
            writer.kill()
        if not store.exists(["r/half"])[0] and room() < before:
            break
        store.delete(["r/half"])
    else:
        pytest.skip("never hit the middle of a put")
    with pytest.raises(StoreError, match="never finished") as raised:
        store.put(["r/half"], [mb16])
    assert raised.value.reason == "io"
    assert eventually(lambda: room() == before, seconds=20)
    store.close()
    one.close()


def test_killed_parent_takes_its_processes_along() -> None:
    with script(START) as parent:
        pids = parent.hear()
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
        parent.kill()
    assert eventually(lambda: all(gone(pid) for pid in pids), seconds=5)


def test_interrupt_of_the_group_leaves_the_server_to_its_owner() -> None:
    with script(START) as parent:
        pids = parent.hear()
        for pid in pids:
            assert os.getpgid(pid) != os.getpgid(0), "a Ctrl-C of the terminal would reach it"
        parent.tell()
        assert parent.end() == 0
    assert eventually(lambda: all(gone(pid) for pid in pids), seconds=5), "the end of the owner's process is the end of the server"


def test_started_in_a_thread_that_ends() -> None:
    """(A parent-death signal would kill the server with the thread.)"""
    one = server()
    thread = threading.Thread(target=one.start)
    thread.start()
    thread.join()
    store = open_store(one.address)
    store.put(["r/1"], [torch.ones(10, dtype=torch.uint8)])
    assert one.alive() and store.exists(["r/1"]) == [True]
    store.close()
    one.close()


@pytest.mark.parametrize("victim", [0, 1], ids=["holder", "master"])
def test_dead_process_is_noticed(victim: int) -> None:
    one = server()
    one.start()
    assert one.alive()
    pids = one.pids
    os.kill(pids[victim], signal.SIGKILL)
    assert eventually(lambda: not one.alive(), seconds=2)
    assert eventually(lambda: all(gone(pid) for pid in pids), seconds=2), "one without the other is of no use"
    one.close()
    one.close()


def test_given_master_outlives_the_run(master: tuple[str, int], parts: int) -> None:
    """Two runs at one master: the end of one removes its records and memory, not the other's."""
    first, second = server(run="one", master=master[0]), server(run="two", master=master[0])
    first.start()
    second.start()
    assert len(first.pids) == 1
    store = open_store(second.address)
    value = torch.ones(1000, dtype=torch.uint8)
    for number in range(8):
        store.put([f"one/{number}", f"two/{number}"], [value, value])
    kept = store.get([f"two/{number}" for number in range(8)], [value] * 8)
    assert kept == [1000] * 8
    first.close()
    assert store.exists([f"one/{number}" for number in range(8)]) == [False] * 8
    assert second.alive() and not gone(master[1])
    store.close()
    second.close()
    assert not gone(master[1])


def test_given_master_that_dies_is_noticed(master: tuple[str, int]) -> None:
    one = server(master=master[0])
    one.start()
    os.kill(master[1], signal.SIGKILL)
    assert eventually(lambda: not one.alive(), seconds=10)
    one.close()


def test_no_master_at_the_address() -> None:
    one = server(master=f"127.0.0.1:{segment.free_port('127.0.0.1')}")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"store\.master='127.* did not come up: .*refused"):
        one.start()
    assert time.monotonic() - began < 20
    assert not one.alive()


@pytest.mark.parametrize("master_address", ["localhost", "host:", ":50051", "h:99999999", "h:x"])
def test_bad_master_address(master_address: str) -> None:
    with pytest.raises(UserError, match=r"store\.master=.* is not host:port"):
        server(master=master_address).start()


def test_metadata_without_master() -> None:
    with pytest.raises(UserError, match="without store.master"):
        server(metadata="http://127.0.0.1:1/metadata").start()


def test_taken_port_costs_a_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], segment.free_port("127.0.0.1"), segment.free_port("127.0.0.1"), segment.free_port("127.0.0.1")]
        process, port = segment.start_master("127.0.0.1", pick_port=lambda host: ports.pop(0))
        assert port != taken.getsockname()[1] and not ports
        process.kill()
        process.wait()


def test_all_ports_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(RuntimeError, match="ended at once"):
            segment.start_master("127.0.0.1", pick_port=lambda host: int(taken.getsockname()[1]))


def test_listens_is_about_one_process(master: tuple[str, int]) -> None:
    address, pid = master
    port = int(address.rpartition(":")[2])
    assert segment.listens(pid, port)
    assert not segment.listens(os.getpid(), port)


def test_two_servers_at_once() -> None:
    one, two = server(run="one"), server(run="two")
    threads = [threading.Thread(target=s.start) for s in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.address["master"] != two.address["master"]
    one.close()
    two.close()


def test_another_address_than_loopback() -> None:
    """What other hosts will use: master, holder and clients on this machine's own address."""
    try:
        host = mooncake.route_to("10.255.255.255", 9)
    except OSError:
        host = "127.0.0.1"
    if host.startswith("127."):
        pytest.skip("this machine has no other address")
    one = make_server(StoreConfig(kind="mooncake"), run="r", budget=8 << 20, expected_host=host)
    one.start()
    assert one.address["master"].startswith(f"{host}:")
    store, value = open_store(one.address), torch.arange(200, dtype=torch.uint8)
    store.put(["r/1"], [value])
    assert store.get(["r/1"], [value.zero_()]) == [200] and value[199] == 199
    store.close()
    one.close()


def test_unresolvable_host() -> None:
    with pytest.raises(UserError, match=r"store\.host='no such host'"):
        server(host="no such host").start()


@pytest.mark.skipif(Path("/sys/class/infiniband").is_dir(), reason="has RDMA")
def test_rdma_without_device_is_refused() -> None:
    """(Mooncake itself would carry on over TCP.)"""
    with pytest.raises(UserError, match=r"store\.protocol='rdma' needs an RDMA device"):
        server(protocol="rdma").start()


def test_log_file(tmp_path: Path) -> None:
    one = server(log_dir=tmp_path / "logs")
    one.start()
    one.close()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["mooncake.log"]
    assert "Master service started" in (tmp_path / "logs" / "mooncake.log").read_text()


def test_client_is_quiet() -> None:
    one = server()
    one.start()
    code = (
        "import json, sys, torch\nfrom torchspec.transfer import StoreError, open_store\nstore = open_store(json.loads(sys.argv[1]))\n"
        "store.buffer(1000)\n"
        "try: store.get(['no'], [torch.empty(5, dtype=torch.uint8)])\n"
        "except StoreError: print('told')\n"
        "store.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(one.address)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("told\n", "")
    one.close()


@pytest.mark.parametrize("chosen", ["", "0"], ids=["ours", "user's"])
def test_connections_are_kept_unless_the_user_says_otherwise(chosen: str) -> None:
    """A connection that its client closed keeps a port for a minute (state 06): none does, or one a transfer."""
    one = server()
    one.start()
    code = (
        "import json, sys\nfrom torchspec.transfer import open_store\nstore = open_store(json.loads(sys.argv[1]))\nvalue = store.buffer(1000)\n"
        "for i in range(30): store.put([f'r/{i}'], [value])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in mooncake.SETTINGS} | {"PYTHONPATH": str(ROOT)}
    if chosen:
        environment["MC_TCP_ENABLE_CONNECTION_POOL"] = chosen
    subprocess.run([sys.executable, "-c", code, json.dumps(one.address)], env=environment, check=True)
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    ended = Counter(int(end.rpartition(":")[2], 16) for row in rows for end in row[1:3] if row[3] == "06")
    found = sum(count for port, count in ended.items() if segment.listens(one.pids[0], port))
    one.close()
    assert found >= 30 if chosen else found < 10, found


class _Broken(importlib.abc.MetaPathFinder):
    """Makes ``import mooncake.store`` fail as it does without libibverbs."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mooncake.store":
            raise ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory")


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mooncake.store", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"libibverbs.so.1.*Fix: apt-get install -y libibverbs1 librdmacm1 libnuma1"):
        make_server(StoreConfig(kind="mooncake"), run="r", budget=1)
    chosen = make_server(StoreConfig(kind="auto"), run="r", budget=1)
    assert chosen.kind == "shm" and "libibverbs" in chosen.reason
    with pytest.raises(UserError, match="libibverbs"):  # a given master asks for Mooncake
        make_server(StoreConfig(kind="auto", master="h:1"), run="r", budget=1)
    with pytest.raises(UserError, match="serves one host"):
        make_server(StoreConfig(kind="auto"), run="r", budget=1, expected_host="10.0.0.1")


def test_wheel_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not installed.*Fix: pip install mooncake-transfer-engine-non-cuda"):
        make_server(StoreConfig(kind="mooncake"), run="r", budget=1)
    assert make_server(StoreConfig(kind="auto"), run="r", budget=1).kind == "shm"


def test_binary_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mooncake, "load", lambda: SimpleNamespace(__file__=str(tmp_path / "store.so")))
    with pytest.raises(UserError, match="mooncake_master, which is missing"):
        segment.start_master("127.0.0.1")


def test_nothing_heavy_is_imported() -> None:
    """The coordinator makes servers and deletes records before, and without, torch; a plain import does not even touch Mooncake."""
    code = (
        "import sys\n"
        "import torchspec.transfer as t\n"
        "assert not {'torch', 'mooncake', 'mooncake.store', 'ray', 'wandb'} & sys.modules.keys()\n"
        "for kind in ('shm', 'mooncake'):\n"
        "    server = t.make_server(t.StoreConfig(kind=kind), run='light', budget=1 << 20); server.start()\n"
        "    store = t.open_store(server.address); store.delete(['a']); assert store.exists(['a']) == [False]; store.close(); server.close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.parametrize("kind", ["shm", "mooncake", "auto"])
def test_selfcheck(kind: str) -> None:
    from torchspec.transfer import selfcheck

    facts = selfcheck(StoreConfig(kind=kind))  # type: ignore[arg-type]
    assert facts.kind == ("mooncake" if kind == "auto" else kind)
    assert facts.put_gb_s > 0.01 and facts.get_gb_s > 0.01
    assert not [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"torchspec-selfcheck-{os.getpid()}")]
