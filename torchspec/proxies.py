"""Which proxy a request goes through: none to this machine, else what the environment says; and its name for an error, since it is the proxy that was asked.

Variables are ``http_proxy``, ``https_proxy``, ``all_proxy`` and ``no_proxy``, small or capital letters, small ones first. In ``no_proxy`` stand hosts, domains,
addresses and networks (``10.0.0.0/8``), with or without a port, or ``*``; between them commas or spaces.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from torchspec.network import bare, is_loopback

_HERE = ("localhost", "127.0.0.1", "::1")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Proxy:
    """What a request is handed to."""

    variable: str
    address: str

    def __str__(self) -> str:
        """For an error, without the password that an address may hold."""
        before, at, host = self.address.rpartition("@")
        scheme = before.partition("://")[0] + "://" if "://" in before else ""
        return f"{self.variable}={scheme}...@{host}" if at else f"{self.variable}={self.address}"


def proxy_of(url: str) -> Proxy | None:
    """The proxy of requests to an address; None where they go there directly."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if not host or is_here(host) or _excepted(host, parts.port or _PORTS.get(parts.scheme, 0)):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if variable == "HTTP_PROXY" and "REQUEST_METHOD" in os.environ:
                continue  # under CGI a client's header would set it
            if variable in os.environ:
                address = os.environ[variable].strip()
                if not address:
                    break  # set to nothing: none of this scheme
                return Proxy(variable, address if "://" in address else f"http://{address}")
        else:
            continue
        break
    return None


def is_here(host: str) -> bool:
    """Whether a host of an address is this machine: loopback, or the address that stands for all of its own."""
    try:
        if ipaddress.ip_address(bare(host)).is_unspecified:
            return True
    except ValueError:
        pass
    return is_loopback(host)


def _excepted(host: str, port: int) -> bool:
    for entry in _exceptions():
        name, colon, number = entry.rpartition(":")
        if colon and number.isdecimal() and (":" not in name or name.endswith("]")):
            if int(number) != port:
                continue
            entry = name
        entry = bare(entry)
        if entry == "*" or host == entry or host.endswith(f".{entry.removeprefix('*').lstrip('.')}") or host == entry.lstrip("."):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False


def _exceptions() -> Iterator[str]:
    said = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    yield from said.lower().replace(",", " ").split()


def through(url: str) -> str:
    """`` through the proxy http_proxy=...`` where a request to an address went through one, else nothing: for errors."""
    proxy = proxy_of(url)
    return "" if proxy is None else f" through the proxy {proxy}"


def through_to_hub() -> str:
    """:func:`through` for the model hub; nothing where it is not asked."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ""
    return through(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def around(url: str) -> str:
    """What a fix says of the proxy, where there is one."""
    return "" if proxy_of(url) is None else f"; where no proxy is needed add {urlsplit(url).hostname} to no_proxy"


def opener(url: str) -> urllib.request.OpenerDirector:
    """Sends requests of the standard library to an address as :func:`proxy_of` says."""
    proxy = proxy_of(url)
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if proxy is None else {urlsplit(url).scheme: proxy.address}))


def spare_this_machine() -> None:
    """Except this machine from the proxies of the environment, for libraries and child processes that read it by themselves."""
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in os.environ):
        return
    said = list(_exceptions())
    if "*" in said:
        return
    whole = ",".join([*said, *(host for host in _HERE if host not in said)])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = whole
