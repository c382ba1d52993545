"""Addresses of both families, with real sockets on ::1; and which proxy a request goes through."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from torchspec import network
from torchspec.data.generators import ServerAnswerer
from torchspec.data.group_start import listening
from torchspec.engines.connection import Closed, Connection
from torchspec.engines.engine import EngineConfig
from torchspec.engines.messages import Stop
from torchspec.errors import UserError
from torchspec.network import check_url, free_port, host_port, is_loopback, own_address, route_to, split_host_port
from torchspec.proxies import opener, proxy_of, spare_this_machine, through, through_to_hub
from torchspec.transfer.store import StoreConfig


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.mark.parametrize(("text", "host"), [("[::1]:5000", "::1"), ("[fe80::1%e]:5000", "fe80::1%e"), ("10.0.0.1:5000", "10.0.0.1"), ("node-1:5000", "node-1")])
def test_an_address_is_read_and_written_the_same(text: str, host: str) -> None:
    assert split_host_port(text, field="x") == (host, 5000) and host_port(host, 5000) == text


@pytest.mark.parametrize("text", ["::1:5000", "fd00::2", "::1"])
def test_an_ipv6_address_without_brackets_is_refused_with_them(text: str) -> None:
    with pytest.raises(UserError, match=r"without brackets.*write it as \["):
        split_host_port(text, field="x")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("::1:5000", r"write it as \[::1\]:5000, or \[::1:5000\]:PORT"),
        ("[::1]", r"no port.*write it as \[::1\]:PORT"),
        ("http://node:5000", "it is a URL"),
        ("node:1:2", "is not host:port"),
    ],
)
def test_what_is_written_instead_is_right(text: str, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        split_host_port(text, field="x")


@pytest.mark.parametrize("url", ["http://::1:8000/v1", "http://[::1/v1", "http://host:port/v1", "host:8000/v1", "http:///v1", "ftp://h/v1", "http://h:99999"])
def test_an_address_of_a_server_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(UserError, match=r"server=.* is no address of a server.*http://\[::1\]:8000"):
        ServerAnswerer(url, model="m", concurrency=1)
    assert check_url("https://[fd00::1]:8443/v1", field="x", example="y").hostname == "fd00::1"


def test_no_proxy_with_spaces_and_this_machines_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "a.corp b.corp,  10.0.0.0/8")
    for host in ("b.corp", "x.a.corp", "10.1.2.3", "127.1", "2130706433", "vllm.localhost", "localhost.localdomain", "ip6-localhost"):
        assert proxy_of(f"http://{host}:8000/v1") is None, host
    for host in ("c.corp", "11.0.0.1", "128.1", "localhost.corp", "1.2.3.4.5"):
        assert proxy_of(f"http://{host}:8000/v1") is not None, host


@pytest.mark.parametrize("text", ["[::1]", "[]:5", "[::1]:x", "[::1]:70000", "host", ":5"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not host:port|without brackets"):
        split_host_port(text, field="x")


def test_loopback_of_both_families() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.8.7", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"))
    assert not any(is_loopback(host) for host in ("10.0.0.1", "::", "fd00::1", "localhost.example.org", "0.0.0.0"))


@ipv6
def test_this_machines_own_address_over_ipv6() -> None:
    assert route_to("::1", 9) == route_to("[::1]", 9) == "::1" and own_address("::1", field="x", fix="y") == "::1"
    for name in ("::", "[::]"):
        with pytest.raises(UserError, match="stands for every address"):
            own_address(name, field="x", fix="y")
    with pytest.raises(UserError, match="no address of this host"):
        own_address("2001:db8::1", field="x", fix="y")
    assert listening(EngineConfig(listen="[::1]:29600"), StoreConfig(), main_address=None) == ("::1", 29600)
    assert listening(EngineConfig(listen="[::1]:0"), StoreConfig(), main_address="::1") == ("::1", 0)


def test_a_name_of_ipv6_alone_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert network.addresses_of("both") == ["127.0.0.1", "::1"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
    assert network.addresses_of("one") == ["::1"]


@ipv6
def test_a_connection_and_its_errors_over_ipv6() -> None:
    with pytest.raises(Closed, match=r"\[::1\]:\d+"):
        Connection(("::1", free_port("::1")), Stop)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        made = Connection(server.getsockname()[:2], Stop)
        server.accept()[0].close()
        with pytest.raises(Closed):
            made.receive(5.0)


@ipv6
@pytest.mark.slow
def test_a_group_with_a_worker_over_ipv6(tmp_path: Path) -> None:
    """Coordinator on ::1, a worker that connects to it, a trainer's client and a record."""
    from dataclasses import replace

    from tests.engines.parts import Rank, group_config, random_packs, save_tiny
    from torchspec.engines.group import EngineGroup

    config = group_config(tmp_path, save_tiny(tmp_path / "target"))
    group = EngineGroup(replace(config, listen_host="::1"))
    try:
        rank = Rank(group.start(), config.spec, random_packs(2))
        rank.take_all()
        assert not rank.failed
        assert "listening on [::1]:" in (config.log_dir / "coordinator.log").read_text()
    finally:
        group.close()


@ipv6
def test_reports_of_a_connector_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.engines.capture.reports import ReportServer
    from torchspec.engines.capture.sink import introduced
    from torchspec.engines.messages import Wrote

    got: list[Wrote] = []

    async def run() -> None:
        server = ReportServer(token="t", on_report=got.append)
        port = await server.start("::1")
        reports = await asyncio.to_thread(introduced, ("::1", port), "t")
        await asyncio.to_thread(reports.send, Wrote(key="k"))
        while not got:
            await asyncio.sleep(0.01)
        reports.close()
        await server.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert got[0].key == "k"


@ipv6
def test_mooncake_over_ipv6() -> None:
    """In a process of its own: Mooncake is told of IPv6 before its import."""
    pytest.importorskip("mooncake.store")
    code = """
import torch
from torchspec.transfer import StoreConfig, make_server, open_store
server = make_server(StoreConfig(kind="mooncake", host="[::1]"), run="six", budget=16 << 20)
server.start()
try:
    assert server.address["master"].startswith("[::1]:")
    store = open_store(server.address)
    value = torch.arange(100_000, dtype=torch.int64).view(torch.uint8)
    store.put(["six/k"], [value])
    out = torch.empty_like(value)
    assert store.get(["six/k"], [out]) == [value.numel()] and torch.equal(out, value)
    store.close()
finally:
    server.close()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class Handler(BaseHTTPRequestHandler):
    """A server that has a model; as a proxy it is asked for whole addresses."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        data = json.dumps({"data": [{"id": "m"}], "version": "1"}).encode()
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None: ...


class Six(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def serve(host: str) -> Any:
    running: Any = (Six if ":" in host else ThreadingHTTPServer)((host, 0), Handler)
    running.asked, running.code = [], 200
    threading.Thread(target=running.serve_forever, daemon=True).start()
    return running


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A proxy that answers by itself, and an environment without any."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    running = serve("127.0.0.1")
    running.url = f"http://127.0.0.1:{running.server_port}"
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=ipv6)])
def test_this_machine_is_asked_without_the_proxy(host: str, variable: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from torchspec.engines.capture.server import http_options

    server = serve("127.0.0.1" if host == "localhost" else host)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody
    url = f"http://{host_port(host, server.server_port)}"
    try:
        ServerAnswerer(f"{url}/v1", model="m", concurrency=1)
        with httpx.Client(base_url=url, **http_options(url)) as client:
            assert client.get("/version").json()["version"] == "1"
        assert server.asked == ["/v1/models", "/version"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_another_host_is_asked_through_the_proxy_which_an_error_names(variable: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from torchspec.engines.capture.server import http_options

    monkeypatch.setenv(variable, proxy.url)
    ServerAnswerer("http://node-7.invalid:8000/v1", model="m", concurrency=1)
    with httpx.Client(base_url="http://node-7.invalid:8000", **http_options("http://node-7.invalid:8000")) as client:
        client.get("/version")
    assert proxy.asked == ["http://node-7.invalid:8000/v1/models", "http://node-7.invalid:8000/version"]
    proxy.code = 502
    with pytest.raises(UserError, match=f"does not answer through the proxy {variable}={proxy.url} .*502.*add node-7.invalid to no_proxy"):
        ServerAnswerer("http://node-7.invalid:8000/v1", model="m", concurrency=1)
    monkeypatch.setenv("no_proxy", "node-7.invalid")
    with pytest.raises(UserError) as said:
        ServerAnswerer("http://node-7.invalid:8000/v1", model="m", concurrency=1)
    assert "proxy" not in str(said.value)


@pytest.mark.parametrize(
    ("exceptions", "direct"),
    [
        ("*", True), ("example.org", True), (".example.org", True), ("*.example.org", True), ("EXAMPLE.ORG", True), ("a.example.org:80", True),
        ("other, a.example.org", True), ("a.example.org:81", False), ("ample.org", False), ("b.example.org", False), ("", False), ("10.0.0.0/8", False),
    ],
)  # fmt: skip
def test_exceptions_by_name(exceptions: str, direct: bool, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert (proxy_of("http://a.example.org/x") is None) == direct


def test_exceptions_by_address(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,[fd00::1],fd01::/16")
    for host in ("10.1.2.3", "[fd00::1]", "[fd01::5]", "127.0.0.5", "[::1]", "0.0.0.0"):
        assert proxy_of(f"http://{host}:8000") is None, host
    for host in ("11.1.2.3", "[fd00::2]"):
        assert proxy_of(f"http://{host}:8000") is not None, host


def test_small_letters_first_https_apart_and_no_password_in_an_error(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://upper:1")
    monkeypatch.setenv("http_proxy", "lower:1")
    assert through("http://x.invalid") == " through the proxy http_proxy=http://lower:1"
    assert through("https://x.invalid") == ""
    monkeypatch.setenv("https_proxy", "http://me:secret@gate:3128")
    assert through("https://x.invalid") == " through the proxy https_proxy=http://...@gate:3128"
    monkeypatch.setenv("http_proxy", "")
    assert through("http://x.invalid") == ""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert through_to_hub() == " through the proxy https_proxy=http://...@gate:3128"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert through_to_hub() == "" and opener("http://x.invalid")


def test_libraries_are_told_of_this_machine(proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    spare_this_machine()
    assert "no_proxy" not in os.environ  # nothing to except it from
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "example.org")
    spare_this_machine()
    spare_this_machine()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
    urllib.request.urlopen(f"{proxy.url}/direct", timeout=10).close()
    assert proxy.asked == ["/direct"]
