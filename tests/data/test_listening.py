"""Where the coordinator listens, and which addresses others are told."""

from __future__ import annotations

import pytest

from torchspec import network
from torchspec.data.group_start import listening
from torchspec.engines.engine import EngineConfig
from torchspec.errors import UserError
from torchspec.network import route_to
from torchspec.transfer.store import StoreConfig


def on(listen: str | None, main_address: str | None = None, kind: str = "auto") -> tuple[str, int]:
    return listening(EngineConfig(listen=listen), StoreConfig(kind=kind), main_address=main_address)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ours() -> str:
    """An address of this machine that is not loopback."""
    try:
        found = route_to("192.0.2.1", 9)
    except OSError:
        pytest.skip("this machine has no network")
    return found


def test_one_host_listens_on_loopback() -> None:
    assert on(None) == ("127.0.0.1", 0)
    assert on(None, "127.0.0.1") == on(None, "localhost") == ("127.0.0.1", 0)  # "nodes" of one machine
    assert on("127.0.0.2:29600") == ("127.0.0.2", 29600)
    assert on("localhost:0") == ("127.0.0.1", 0)


def test_with_other_hosts_it_listens_on_the_main_address(ours: str) -> None:
    assert on(None, ours) == (ours, 0)
    assert on(f"{ours}:29600", ours) == (ours, 29600)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "0.0.0.0:29600"])
def test_all_addresses_at_once_are_none_to_tell_others(listen: str) -> None:
    with pytest.raises(UserError, match="stands for every address"):
        on(listen)


def test_addresses_that_others_do_not_reach_are_refused(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="do not reach"):
        on("127.0.0.1:0", ours)
    with pytest.raises(UserError, match="no address of this host"):
        on("192.0.2.1:0")  # of nobody (RFC 5737)
    with pytest.raises(UserError, match=r"MASTER_ADDR.*no address of this host"):
        on(None, "192.0.2.1")
    with pytest.raises(UserError, match="cannot be resolved"):
        on("no-such-host.invalid:0")
    monkeypatch.setattr(network, "addresses_of", lambda name: ["127.0.1.1"])  # as Debian's /etc/hosts has it for the own name
    with pytest.raises(UserError, match=r"127\.0\.1\.1 \(node-a\), which the ranks of other hosts do not reach"):
        on(None, "node-a")


def test_memory_of_one_host_is_refused_with_others(ours: str) -> None:
    with pytest.raises(UserError, match=r"data.store.kind"):
        on(None, ours, kind="shm")
    assert on(None, kind="shm") == ("127.0.0.1", 0)
