"""Clients of Mooncake: nothing owed is evicted or lost, in batches and in parts, and what cannot work says so."""

from __future__ import annotations

import importlib.abc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.transfer.processes import ROOT, eventually, mooncake_of, script
from torchspec.errors import UserError
from torchspec.transfer import StoreConfig, StoreError, make_server, mooncake, open_store, segment


def test_full_store_refuses_and_evicts_nothing(parts: int) -> None:
    """Twice the budget offered: the excess is refused with ``full``, and every record taken is there, byte for byte, long after."""
    one = mooncake_of(budget=32 << 20)
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
    one = mooncake_of(budget=budget)
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
    one = mooncake_of(budget=64 << 20)
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


@pytest.mark.parametrize("refuses", ["set-up", "memory"])
def test_a_second_client_that_cannot_be_had_is_done_without(monkeypatch: pytest.MonkeyPatch, refuses: str) -> None:
    monkeypatch.setattr(mooncake, "_WORTH", 0)
    monkeypatch.setattr(mooncake, "lanes", lambda most, **machine: 1)
    one = mooncake_of(budget=16 << 20)
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
    small = mooncake_of(budget=1 << 20)
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
    one = mooncake_of(budget=16 << 20)
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
    one = mooncake_of(budget=64 << 20, master=master[0])
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


def test_client_is_quiet() -> None:
    one = mooncake_of()
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
    one = mooncake_of()
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
