"""Frames on a TCP connection: length, number, MessagePack. One blocking side (clients) and one asyncio side (the coordinator).

Nothing that arrives is trusted: an oversized length, a number out of order or bytes that do not decode to an expected message end the connection.
Nothing that fails to arrive is waited for without end: a client takes a coordinator that says nothing at all for :data:`SILENCE` seconds for lost, whether its
host, its network or its process is what stopped.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from torchspec.engines.messages import MAX_FRAME, Message
from torchspec.network import host_port

_HEAD = struct.Struct("<II")
SILENCE = 60.0
"""Seconds without a word of the other side (or, for what was sent, without an acknowledgement of its host) before it counts as lost."""
_PROBE = 10
"""Seconds of quiet before TCP asks the other host whether it is there."""
_ENCODER = msgspec.msgpack.Encoder()
log = logging.getLogger(__name__)


class BadFrame(Exception):
    """Bytes that no honest peer sends."""


class Framer:
    """Both directions of a connection's bytes.

    Args:
        expected: union of message types that the peer may send.
        limit: longest frame it may send.
    """

    def __init__(self, expected: Any, *, limit: int = MAX_FRAME) -> None:
        self._decoder = msgspec.msgpack.Decoder(expected)
        self._buffer = bytearray()
        self._limit = limit
        self._sent = 0
        self._received = 0

    def encode(self, message: Message) -> bytes:
        """The next frame to send.

        Raises:
            BadFrame: when it is longer than a peer accepts.
        """
        body = _ENCODER.encode(message)
        if len(body) > MAX_FRAME:
            raise BadFrame(f"message of {len(body)} bytes is longer than {MAX_FRAME}")
        head = _HEAD.pack(len(body), self._sent)
        self._sent += 1
        return head + body

    def decode(self, data: bytes) -> Iterator[Any]:
        """Messages completed by ``data``.

        Raises:
            BadFrame: see the module.
        """
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= _HEAD.size:
                length, number = _HEAD.unpack_from(self._buffer, at)
                if length > self._limit:
                    raise BadFrame(f"frame of {length} bytes is longer than {self._limit}")
                if number != self._received:
                    raise BadFrame(f"frame {number} came where {self._received} was due")
                if len(self._buffer) - at - _HEAD.size < length:
                    break
                at += _HEAD.size
                try:
                    with memoryview(self._buffer) as view, view[at : at + length] as body:
                        message = self._decoder.decode(body)
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is no UTF-8
                    raise BadFrame(f"frame does not decode: {error}") from error
                at += length
                self._received += 1
                yield message
        finally:
            del self._buffer[:at]

    def expect(self, expected: Any, *, limit: int = MAX_FRAME) -> None:
        """From now on the peer may send these (after Hello, by role)."""
        self._decoder = msgspec.msgpack.Decoder(expected)
        self._limit = limit


class Closed(Exception):
    """The peer is gone."""


def notice_a_dead_host(connected: socket.socket) -> None:
    """Set a TCP socket up so that a peer whose host or network is gone ends it within about a minute, whether it is written to or not."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENCE), 0))
    if sys.platform == "linux":
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE))


class Connection:
    """Blocking side. One thread receives; any thread may send.

    Args:
        address: (host, port).
        expected: union of message types that may arrive.
        timeout: seconds to connect.
        silence: seconds without a word of the peer after which :meth:`receive` counts it as lost; None for a peer that need not speak.

    Raises:
        Closed: nobody listens.
    """

    def __init__(self, address: tuple[str, int], expected: Any, *, timeout: float = 10.0, silence: float | None = None) -> None:
        try:
            self._socket = socket.create_connection(address, timeout=timeout)
        except OSError as error:
            raise Closed(f"no connection to the coordinator at {host_port(*address)} ({error})") from error
        self._socket.settimeout(None)
        notice_a_dead_host(self._socket)
        self._framer = Framer(expected)
        self._readable = select.poll()  # select(2) ends at descriptor 1023
        self._readable.register(self._socket, select.POLLIN)
        self._silence = silence
        self._heard = time.monotonic()
        self._pending: deque[Any] = deque()
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send whole.

        Raises:
            Closed: the peer is gone.
        """
        with self._lock:
            try:
                self._socket.sendall(self._framer.encode(message))
            except OSError as error:
                raise Closed(f"connection to the coordinator lost ({error})") from error

    def receive(self, timeout: float) -> Any | None:
        """The next message; None after ``timeout`` seconds without one.

        Raises:
            Closed: the peer is gone.
            BadFrame: the peer speaks another protocol.
        """
        deadline = time.monotonic() + timeout
        while not self._pending:
            left = deadline - time.monotonic()
            try:
                if not self._readable.poll(1000 * max(left, 0.0)):
                    quiet = time.monotonic() - self._heard
                    if self._silence is not None and quiet > self._silence:
                        raise Closed(f"the coordinator has said nothing for {quiet:.0f} s")
                    return None
                data = self._socket.recv(1 << 20)
                self._heard = time.monotonic()
            except (OSError, ValueError) as error:
                raise Closed(f"connection to the coordinator lost ({error})") from error
            if not data:
                raise Closed("the coordinator closed the connection")
            self._pending.extend(self._framer.decode(data))
        return self._pending.popleft()

    def close(self) -> None:
        """Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


class Peer(asyncio.Protocol):
    """Asyncio side: one client of the coordinator.

    Args:
        expected: what it may send first.
        on_message, on_lost: called in the loop.
        on_made: called in the loop when the connection is there, before anything arrives.
        first_limit: longest frame before it is known.
    """

    def __init__(
        self,
        expected: Any,
        *,
        on_message: Callable[[Peer, Any], None],
        on_lost: Callable[[Peer], None],
        on_made: Callable[[Peer], None] | None = None,
        first_limit: int = 65536,
    ) -> None:
        self._framer = Framer(expected, limit=first_limit)
        self._on_made = on_made
        self._on_message = on_message
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self.name = self.host = "?"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peername = transport.get_extra_info("peername")
        self.name, self.host = str(peername), str(peername[0])
        notice_a_dead_host(transport.get_extra_info("socket"))
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._framer.decode(data):
                if self._transport is None or self._transport.is_closing():
                    return  # nothing counts any more after what broke the rules
                self._on_message(self, message)
        except BadFrame as error:
            log.warning("refused %s: %s", self.name, error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def accept(self, expected: Any) -> None:
        """The client is known: these may follow."""
        self._framer.expect(expected)

    def send(self, message: Message) -> None:
        """Queue a frame; nothing happens when the client is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._framer.encode(message))

    def close(self) -> None:
        """Send what is queued and end. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End now: the other side does not read."""
        if self._transport is not None:
            self._transport.abort()
