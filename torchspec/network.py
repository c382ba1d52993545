"""Addresses: reading them, and which one of this machine others reach."""

from __future__ import annotations

import ipaddress
import socket

from torchspec.errors import UserError


def split_host_port(text: str, *, field: str, lowest: int = 1, example: str = "10.0.0.1:50051") -> tuple[str, int]:
    """Parts of ``host:port``.

    Args:
        text: what the user wrote.
        field: where.
        lowest: port allowed; 0 where a free one may be taken.
        example: a right one, for the error.

    Raises:
        UserError: naming ``field``.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not lowest <= int(port) < 65536:
        raise UserError(field, text, "is not host:port", f"write it as HOST:PORT, such as {example}")
    return host, int(port)


def route_to(host: str, port: int) -> str:
    """This machine's address on the route to ``host`` (no packet is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def own_address(name: str, *, field: str, fix: str) -> str:
    """The IPv4 address of this machine that a name (or address) stands for.

    Args:
        name: as the user wrote it.
        field: where, for the error.
        fix: what to do, for the error.

    Raises:
        UserError: it cannot be resolved, stands for all addresses of a machine and so for none that others can be told of, or is another machine's.
    """
    try:
        found = str(socket.gethostbyname(name))
    except OSError as error:
        raise UserError(field, name, f"cannot be resolved ({error})", fix) from error
    if ipaddress.ip_address(found).is_unspecified:
        raise UserError(field, name, "stands for every address of this host, and others must be told one", fix)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((found, 0))
        except OSError as error:
            raise UserError(field, name, f"is {found}, no address of this host ({error.strerror})", fix) from error
    return found


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address (or ``localhost``)."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
