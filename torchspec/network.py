"""Addresses: reading them, and which one of this machine others reach."""

from __future__ import annotations

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
