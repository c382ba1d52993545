"""Addresses, IPv4 and IPv6: reading them, and which one of this machine others reach. An IPv6 address with a port stands in brackets, ``[::1]:5000``."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from torchspec.errors import UserError

_LOCAL = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
"""Names of this machine alone, as hosts files have them; so is every name below ``localhost`` (RFC 6761)."""


def split_host_port(text: str, *, field: str, lowest: int = 1, example: str = "10.0.0.1:50051") -> tuple[str, int]:
    """Parts of ``host:port``; the host comes back without brackets.

    Args:
        text: what the user wrote.
        field: where.
        lowest: port allowed; 0 where a free one may be taken.
        example: a right one, for the error.

    Raises:
        UserError: naming ``field``.
    """
    given, colon, port = text.rpartition(":")
    host = bare(given)
    if "://" in text:
        raise UserError(field, text, "is not host:port (it is a URL)", f"write it as HOST:PORT, such as {example}")
    if (whole := _address(bare(text))) is not None:
        also = f"[{_address(given)}]:{port}, or " if _address(given) is not None else ""
        problem = "is not host:port (it has no port)" if bare(text) != text else "is an IPv6 address without brackets"
        raise UserError(field, text, problem, f"write it as {also}[{whole}]:PORT")
    if ":" in given and host == given and _address(given) is not None:
        raise UserError(field, text, "is an IPv6 address without brackets", f"write it as [{_address(given)}]:{port or 'PORT'}")
    if (":" in given and host == given) or not colon or not host or not port.isdecimal() or not lowest <= int(port) < 65536:
        raise UserError(field, text, "is not host:port", f"write it as HOST:PORT, such as {example} or [::1]:{example.rpartition(':')[2]}")
    return host, int(port)


def check_url(text: str, *, field: str, example: str) -> SplitResult:
    """Parts of an address of a server, ``http://host:port/...`` or ``https://``.

    Raises:
        UserError: naming ``field``: no such scheme, no host, a port that is none, an IPv6 address without brackets.
    """
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a bracket without its other, or of a port
        whole = False
    if not whole:
        raise UserError(field, text, "is no address of a server", f"write it as {example} (an IPv6 address in brackets, http://[::1]:8000)")
    return parts


def _address(text: str) -> str | None:
    """A text that is an IPv6 address by itself."""
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        return None


def bare(host: str) -> str:
    """A host without the brackets of an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def host_port(host: str, port: int) -> str:
    """``host:port`` as :func:`split_host_port` reads it."""
    return f"[{bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def addresses_of(name: str, *, port: int = 0) -> list[str]:
    """Addresses of a name or address, those of IPv4 first.

    Raises:
        OSError: it has none.
    """
    found = socket.getaddrinfo(bare(name), port, type=socket.SOCK_STREAM)
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(entry[4][0]) for entry in ordered))


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def route_to(host: str, port: int) -> str:
    """This machine's address on the route to ``host`` (no packet is sent).

    Raises:
        OSError: there is none.
    """
    problem: OSError | None = None
    for address in addresses_of(host, port=port):
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, port))
                return str(probe.getsockname()[0])
            except OSError as error:
                problem = problem or error
    raise problem or OSError(f"{host} has no address")


def own_address(name: str, *, field: str, fix: str) -> str:
    """The address of this machine that a name (or address) stands for, of IPv4 where it has one.

    Args:
        name: as the user wrote it.
        field: where, for the error.
        fix: what to do, for the error.

    Raises:
        UserError: it cannot be resolved, stands for all addresses of a machine and so for none that others can be told of, or is another machine's.
    """
    try:
        found = addresses_of(name)[0]
    except OSError as error:
        raise UserError(field, name, f"cannot be resolved ({error})", fix) from error
    if ipaddress.ip_address(found).is_unspecified:
        raise UserError(field, name, "stands for every address of this host, and others must be told one", fix)
    try:
        with socket.socket(_family(found), socket.SOCK_STREAM) as probe:
            probe.bind((found, 0))
    except OSError as error:
        raise UserError(field, name, f"is {found}, no address of this host ({error.strerror})", fix) from error
    return found


def free_port(host: str) -> int:
    """A TCP port nobody listens on now; somebody may take it before it is used."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _written_out(host: str) -> str:
    """An IPv4 address in four parts, also of a shorter form that resolvers take (``127.1``); anything else as it is."""
    if not host.replace(".", "").isdecimal():
        return host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address (or ``localhost``)."""
    try:
        found = ipaddress.ip_address(_written_out(bare(address)))
    except ValueError:
        name = address.lower().rstrip(".")
        return name in _LOCAL or name.endswith(".localhost")
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)
