"""The processes behind a Mooncake store live and die as they should, and say what keeps them from it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.transfer.processes import eventually, gone, mooncake_of, script
from torchspec.errors import UserError
from torchspec.transfer import StoreConfig, make_server, mooncake, open_store, segment
from torchspec.transfer.mooncake_server import MooncakeServer

START = """
from torchspec.transfer import StoreConfig, make_server
server = make_server(StoreConfig(kind="mooncake"), run="r", budget=1 << 20)
server.start()
say(server.pids)
input()
"""


def test_the_largest_record_fits_into_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: most)
    for largest, parts in ((0, 4), (100 << 20, 4), (300 << 20, 2), (3 << 30, 1)):
        made = make_server(StoreConfig(kind="mooncake"), run="r", budget=4 << 30, largest=largest)
        assert isinstance(made, MooncakeServer)
        assert made._parts == parts and (parts == 1 or made._part_nbytes >= 10 * largest)
        assert made._parts * made._part_nbytes >= 6 << 30


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
    one = mooncake_of()
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
    one = mooncake_of()
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
    first, second = mooncake_of(run="one", master=master[0]), mooncake_of(run="two", master=master[0])
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
    one = mooncake_of(master=master[0])
    one.start()
    os.kill(master[1], signal.SIGKILL)
    assert eventually(lambda: not one.alive(), seconds=10)
    one.close()


def test_no_master_at_the_address() -> None:
    one = mooncake_of(master=f"127.0.0.1:{segment.free_port('127.0.0.1')}")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"store\.master='127.* did not come up: .*refused"):
        one.start()
    assert time.monotonic() - began < 20
    assert not one.alive()


@pytest.mark.parametrize("master_address", ["localhost", "host:", ":50051", "h:99999999", "h:x"])
def test_bad_master_address(master_address: str) -> None:
    with pytest.raises(UserError, match=r"store\.master=.* is not host:port"):
        mooncake_of(master=master_address).start()


def test_metadata_without_master() -> None:
    with pytest.raises(UserError, match="without data.store.master"):
        mooncake_of(metadata="http://127.0.0.1:1/metadata").start()


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
    one, two = mooncake_of(run="one"), mooncake_of(run="two")
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
        mooncake_of(host="no such host").start()


@pytest.mark.skipif(Path("/sys/class/infiniband").is_dir(), reason="has RDMA")
def test_rdma_without_device_is_refused() -> None:
    """(Mooncake itself would carry on over TCP.)"""
    with pytest.raises(UserError, match=r"store\.protocol='rdma' needs an RDMA device"):
        mooncake_of(protocol="rdma").start()


def test_log_file(tmp_path: Path) -> None:
    one = mooncake_of(log_dir=tmp_path / "logs")
    one.start()
    one.close()
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["mooncake.log"]
    assert "Master service started" in (tmp_path / "logs" / "mooncake.log").read_text()


def test_binary_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mooncake, "load", lambda: SimpleNamespace(__file__=str(tmp_path / "store.so")))
    with pytest.raises(UserError, match="mooncake_master, which is missing"):
        segment.start_master("127.0.0.1")
