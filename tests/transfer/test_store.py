"""What every store promises, on the real backends: the same tests for shared memory and for Mooncake with its own master."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.transfer.processes import script
from torchspec.transfer import Store, StoreConfig, StoreError, StoreServer, make_server, open_store
from torchspec.transfer.record import RecordError, RecordSpec, open_record, seal, views

OPEN = """
import torch
from torchspec.transfer import StoreError, open_store
torch.set_num_threads(1)
store = open_store(args[0])
"""
SPEC = RecordSpec(target="t", tokenizer="k", aux_layers=(1, 2, 3), hidden_size=32, dtype="bfloat16")


def pattern(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nbytes", [1, 63, 4096, 1_000_003, 7 << 20, 64 << 20])
@pytest.mark.parametrize("own_buffer", [True, False], ids=["buffer", "elsewhere"])
def test_round_trip(store: Store, new_key: Callable[[], str], nbytes: int, own_buffer: bool) -> None:
    key, value = new_key(), pattern(nbytes)
    if own_buffer:
        source, out = store.buffer(nbytes), store.buffer(nbytes + 100)
        source.copy_(value)
    else:
        source, out = value, torch.empty(nbytes + 100, dtype=torch.uint8)
    out.fill_(7)
    store.put([key], [source])
    assert store.get([key], [out]) == [nbytes]
    assert torch.equal(out[:nbytes], value)
    if own_buffer:
        assert out[nbytes:].eq(7).all(), "wrote behind the value"
    store.delete([key])


def test_batch_keeps_order(store: Store, new_key: Callable[[], str]) -> None:
    keys = [new_key() for _ in range(5)]
    values = [pattern(1000 * (i + 1), seed=i) for i in range(5)]
    store.put(keys, values)
    outs = [torch.empty(6000, dtype=torch.uint8) for _ in keys]
    assert store.get(keys[::-1], outs) == [5000, 4000, 3000, 2000, 1000]
    for out, value in zip(outs, values[::-1], strict=True):
        assert torch.equal(out[: len(value)], value)


def test_buffers_are_aligned_and_distinct(store: Store) -> None:
    one, two = store.buffer(1000), store.buffer(1000)
    assert one.dtype == torch.uint8 and one.shape == (1000,)
    assert one.data_ptr() % 64 == 0 and two.data_ptr() % 64 == 0
    assert abs(one.data_ptr() - two.data_ptr()) >= 1000


def test_part_of_a_buffer_moves(store: Store, new_key: Callable[[], str]) -> None:
    whole = store.buffer(10_000)
    whole.copy_(pattern(10_000))
    key, out = new_key(), store.buffer(10_000)
    store.put([key], [whole[64:5000]])
    out.zero_()
    assert store.get([key], [out[128:9000]]) == [4936]
    assert torch.equal(out[128 : 128 + 4936], whole[64:5000])
    assert out[:128].eq(0).all()


def test_a_buffer_that_is_given_back_is_kept_no_longer(server: StoreServer, new_key: Callable[[], str]) -> None:
    store: Any = open_store(server.address)
    one, two = store.buffer(10_000), store.buffer(5000)
    one.copy_(pattern(10_000))
    key, out = new_key(), torch.empty(10_000, dtype=torch.uint8)
    store.put([key], [one])
    store.release(one)
    assert [kept is two for kept in store._buffers] == [True]
    if store.kind == "mooncake":
        assert store._registered == [(two.data_ptr(), two.data_ptr() + 5000)]
    assert store.get([key], [out]) == [10_000] and torch.equal(out, pattern(10_000))
    again = new_key()
    store.put([again], [one])  # memory like any other now: it goes through a copy
    assert store.get([again], [one.zero_()]) == [10_000] and torch.equal(one, pattern(10_000))
    store.delete([key, again])
    store.close()


def test_missing_key(store: Store, new_key: Callable[[], str]) -> None:
    here, nowhere = new_key(), new_key()
    store.put([here], [pattern(10)])
    with pytest.raises(StoreError, match="no such key") as raised:
        store.get([here, nowhere], [torch.empty(10, dtype=torch.uint8) for _ in range(2)])
    assert (raised.value.reason, raised.value.key) == ("missing", nowhere)
    assert store.exists([here, nowhere, here]) == [True, False, True]


def test_keys_do_not_collide(store: Store) -> None:
    keys = ["a/b", "a%2Fb", "a,b", "a b", "a", "../a", ".", "ä", "r", "A/B"]
    for number, key in enumerate(keys):
        store.put([key], [pattern(100, seed=number)])
    for number, key in enumerate(keys):
        out = torch.empty(100, dtype=torch.uint8)
        store.get([key], [out])
        assert torch.equal(out, pattern(100, seed=number)), key
    store.delete(keys)
    assert store.exists(keys) == [False] * len(keys)


def test_first_put_of_a_key_stays(store: Store, new_key: Callable[[], str]) -> None:
    key, out = new_key(), torch.empty(100, dtype=torch.uint8)
    store.put([key], [pattern(100, seed=1)])
    store.put([key], [pattern(50, seed=2)])
    assert store.get([key], [out]) == [100]
    assert torch.equal(out, pattern(100, seed=1))
    store.delete([key])
    store.put([key], [pattern(50, seed=2)])
    assert store.get([key], [out]) == [50]


def test_too_small_out(store: Store, new_key: Callable[[], str]) -> None:
    key = new_key()
    store.put([key], [pattern(5000)])
    for out in (torch.empty(4999, dtype=torch.uint8), store.buffer(4999)):
        with pytest.raises(StoreError) as raised:
            store.get([key], [out])
        assert raised.value.reason == "io"


def test_empty_value_is_refused(store: Store, new_key: Callable[[], str]) -> None:
    with pytest.raises(StoreError, match="empty"):
        store.put([new_key()], [torch.empty(0, dtype=torch.uint8)])


def test_failed_put_stops_the_batch(store: Store, new_key: Callable[[], str]) -> None:
    """Keys before the one that cannot be written are, keys after it are not."""
    keys = [new_key() for _ in range(3)]
    with pytest.raises(StoreError) as raised:
        store.put(keys, [pattern(10), pattern(0), pattern(10)])
    assert raised.value.key == keys[1]
    assert store.exists(keys) == [True, False, False]


def test_delete_while_the_read_lease_is_held(store: Store, new_key: Callable[[], str]) -> None:
    """A Mooncake key that was just read answers -706 to a plain remove."""
    key = new_key()
    store.put([key], [pattern(1000)])
    store.get([key], [torch.empty(1000, dtype=torch.uint8)])
    store.exists([key])
    store.delete([key, "never/there"])
    assert store.exists([key]) == [False]
    store.delete([key])


@pytest.mark.parametrize("kind", ["shm", "mooncake"])
def test_closed_client_refuses(kind: str) -> None:
    """(A closed Mooncake client crashes the process when it is used.)"""
    server = make_server(StoreConfig(kind=kind), run="closing", budget=1 << 20)
    server.start()
    store = open_store(server.address)
    store.buffer(100)
    store.close()
    store.close()
    for use in (
        lambda: store.put(["a"], [pattern(1)]),
        lambda: store.get(["a"], [pattern(1)]),
        lambda: store.exists(["a"]),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(StoreError) as raised:
            use()
        assert raised.value.reason == "unreachable"
    server.close()
    server.close()
    assert not server.alive()


def test_two_processes(store: Store, server: StoreServer, new_key: Callable[[], str]) -> None:
    key, answer = new_key(), new_key()
    store.put([key], [pattern(3_000_000)])
    code = OPEN + "out = torch.empty(3_000_000, dtype=torch.uint8); store.get([args[1]], [out]); store.put([args[2]], [out.flip(0)]); say(1); input()"
    with script(code, server.address, key, answer) as other:
        other.hear()
        out = torch.empty(3_000_000, dtype=torch.uint8)
        store.get([answer], [out])
        assert torch.equal(out, pattern(3_000_000).flip(0))


def test_killed_writer_loses_nothing(store: Store, server: StoreServer, new_key: Callable[[], str]) -> None:
    """kill -9 in the middle of a put: what was put stays, what was not whole is not there, and its sample can be put again."""
    code = OPEN + (
        "value = store.buffer(8 << 20); value.fill_(5)\n"
        "number = 0\n"
        "while True:\n"
        "    store.put([f'{args[1]}/{number}'], [value]); say(number); number += 1\n"
        "    if number > 6: store.delete([f'{args[1]}/{number - 6}'])\n"
    )
    for _ in range(3):
        name = new_key()
        with script(code, server.address, name) as writer:
            said = [writer.hear() for _ in range(10)]
            writer.kill()
            assert writer.process.stdout is not None
            said += [int(line) for line in writer.process.stdout if line.endswith("\n")]
        last = said[-1]
        out = store.buffer(8 << 20)
        for number in range(last - 4, last + 1):  # these were never deleted
            assert store.get([f"{name}/{number}"], [out.zero_()]) == [8 << 20]
            assert out.eq(5).all()
        begun = f"{name}/{last + 1}"  # whole or not there, never half
        try:
            assert store.get([begun], [out.zero_()]) == [8 << 20] and out.eq(5).all()
        except StoreError as error:
            assert error.reason == "missing"
        store.delete([f"{name}/{number}" for number in range(last + 3)])
        store.put([f"{name}/attempt2"], [out])
        store.delete([f"{name}/attempt2"])


def test_concurrent_writers_and_readers(server: StoreServer, store: Store, new_key: Callable[[], str]) -> None:
    """Two writing processes and two reading threads with a client each; every record comes through whole."""
    name = new_key()
    code = OPEN + (
        "for number in range(12):\n"
        "    value = torch.full((500_000 + number,), args[2] * 16 + number, dtype=torch.uint8)\n"
        "    store.put([f'{args[1]}/{args[2]}/{number}'], [value])\n"
        "    say(number)\n"
        "input()"
    )
    failures: list[str] = []

    def read(writer: int, heard: threading.Semaphore) -> None:
        client = open_store(server.address)
        out = client.buffer(600_000)
        for number in range(12):
            heard.acquire()
            size = client.get([f"{name}/{writer}/{number}"], [out])
            if size != [500_000 + number] or not out[: size[0]].eq(writer * 16 + number).all():
                failures.append(f"{writer}/{number}: {size}")
        client.close()

    with script(code, server.address, name, 0) as first, script(code, server.address, name, 1) as second:
        heard = [threading.Semaphore(0), threading.Semaphore(0)]
        readers = [threading.Thread(target=read, args=(i, heard[i])) for i in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(12):
            for writer, semaphore in zip((first, second), heard, strict=True):
                writer.hear()
                semaphore.release()
        for reader in readers:
            reader.join(timeout=60)
    assert not failures
    store.delete([f"{name}/{w}/{n}" for w in range(2) for n in range(12)])


def test_racing_writers_of_one_key(server: StoreServer, store: Store, new_key: Callable[[], str]) -> None:
    """Whoever wins, the value is one of the two, whole."""
    code = OPEN + "store.exists(['x']); say(0); input(); store.put([args[1]], [torch.full((4 << 20,), args[2], dtype=torch.uint8)]); say(1); input()"
    key = new_key()
    with script(code, server.address, key, 1) as first, script(code, server.address, key, 2) as second:
        for one in (first, second):
            one.hear()
        for one in (first, second):
            one.tell()
        for one in (first, second):
            try:
                one.hear()
            except AssertionError:  # Mooncake: the loser may be told that the first put has not ended
                assert one.process.returncode == 1
        out = torch.empty(4 << 20, dtype=torch.uint8)
        store.get([key], [out])
        assert out.eq(out[0]).all() and out[0] in (1, 2)


def test_record_through_the_store(store: Store, new_key: Callable[[], str]) -> None:
    """Written in place, read in place; a byte changed on the way is noticed."""
    tokens, key = 50, new_key()
    buffer, out = store.buffer(SPEC.nbytes(tokens)), store.buffer(SPEC.nbytes(tokens))
    ids, aux, last = views(buffer, SPEC, tokens, tokens)
    ids.copy_(torch.arange(tokens))
    aux.copy_(torch.randn(aux.shape))
    last.copy_(torch.randn(last.shape))
    store.put([key], [seal(buffer, SPEC, tokens, tokens, producer="test")])
    store.get([key], [out])
    record = open_record(out, SPEC)
    assert torch.equal(record.aux, aux) and torch.equal(record.last, last) and record.input_ids.tolist() == list(range(tokens))
    out[3000] ^= 1
    damaged = new_key()
    store.put([damaged], [out])
    store.get([damaged], [out.clone()])
    with pytest.raises(RecordError, match="checksum"):
        open_record(out, SPEC)


def test_server_says_which_and_why(server: StoreServer, kind: str) -> None:
    assert server.kind == kind and server.reason
    assert server.alive()
    server.start()  # a second start changes nothing
    assert server.alive()


def test_no_server(kind: str) -> None:
    """A client of a store that is gone fails at once, with the reason."""
    gone = make_server(StoreConfig(kind=kind), run="gone", budget=1 << 20)
    gone.start()
    address = gone.address
    gone.close()
    with pytest.raises(StoreError) as raised:
        open_store(address)
    assert raised.value.reason == "unreachable"


def test_server_dies_under_a_client(kind: str) -> None:
    server = make_server(StoreConfig(kind=kind), run="dying", budget=1 << 20)
    server.start()
    store = open_store(server.address)
    store.put(["a"], [pattern(100)])
    server.close()
    with pytest.raises(StoreError) as raised:
        store.get(["a"], [torch.empty(100, dtype=torch.uint8)])
    assert raised.value.reason == "unreachable"
    store.close()
