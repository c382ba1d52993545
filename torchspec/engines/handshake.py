"""How a connection begins: the coordinator challenges, the client proves that it knows the run token, the coordinator says what the run is.

The token never crosses a wire, and a greeting that somebody recorded is worth nothing on another connection: the proof covers the challenge, which is random.
What follows the greeting is neither encrypted nor signed: the coordinator's port belongs on a network whose users are trusted (docs/delivery.md).
"""

from __future__ import annotations

import hmac
import secrets
import time
from typing import TypeVar

import msgspec

from torchspec.engines.connection import Connection
from torchspec.engines.messages import PROTOCOL, Challenge, Hello, Stop, Welcome

SECRET_VARIABLE = "TORCHSPEC_WORKER"
"""Environment variable with the secret of a worker that a coordinator started: the names of such workers are theirs alone."""
PATIENCE = 180.0
"""Seconds for the coordinator to start its store and say :class:`Welcome`."""
_First = TypeVar("_First", Challenge, Welcome)


class Refused(Exception):
    """The coordinator said no, and why; or it has ended."""


class Over(Refused):
    """The run has ended, in order."""


def challenge() -> Challenge:
    """A new one for each connection."""
    return Challenge(nonce=secrets.token_bytes(32))


def prove(token: str, nonce: bytes, role: str, name: str, *, secret: str = "") -> bytes:
    """HMAC-SHA256, under the run token and the secret of a worker that has one, of the challenge and of who answers it (32 bytes)."""
    return hmac.digest((token + secret).encode(), msgspec.msgpack.encode([nonce, role, name]), "sha256")


def problem_of(hello: Hello, nonce: bytes, token: str, *, secret: str = "") -> str | None:
    """Why a greeting is refused; None when it is good. Which roles there are is the coordinator's affair.

    Args:
        hello: the handshake.
        nonce: of the challenge.
        token: of the run.
        secret: of the worker that was started under this name; "" where none was.
    """
    if hello.protocol != PROTOCOL:
        return f"speaks protocol {hello.protocol}, this run {PROTOCOL}: install the same version of torchspec everywhere"
    if hmac.compare_digest(hello.proof, prove(token, nonce, hello.role, hello.name, secret=secret)):
        return None
    if secret and hmac.compare_digest(hello.proof, prove(token, nonce, hello.role, hello.name)):
        return f"{hello.name} is a worker that this run started itself: take another --name"
    return "wrong run token"


def greet(connection: Connection, *, token: str, role: str, name: str, secret: str = "") -> Welcome:
    """The client's side, waiting up to ``PATIENCE`` seconds for each answer.

    Args:
        connection: a new one.
        token: of the run.
        role, name: of the client.
        secret: of a worker that a coordinator started (:data:`SECRET_VARIABLE`).

    Raises:
        Refused: with the coordinator's words.
        Closed, BadFrame: the connection is of no use.
    """
    nonce = _next(connection, Challenge).nonce
    connection.send(Hello(proof=prove(token, nonce, role, name, secret=secret), role=role, name=name))
    return _next(connection, Welcome)


def _next(connection: Connection, kind: type[_First]) -> _First:
    """The next frame that is no pulse; it must be of this kind."""
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        message = connection.receive(left)
        if isinstance(message, kind):
            return message
        if isinstance(message, Stop):
            raise Refused(message.error) if message.error else Over("the engine group has ended")
    raise Refused(f"the coordinator did not answer within {PATIENCE:.0f} s")
