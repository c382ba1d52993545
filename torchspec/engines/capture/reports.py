"""The engine's end of the connections on which connectors report."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable

from torchspec.engines.capture.requests import REPORTER, Introduce
from torchspec.engines.connection import Peer
from torchspec.engines.handshake import challenge, prove
from torchspec.engines.messages import Wrote

log = logging.getLogger(__name__)


class ReportServer:
    """Takes reports of connectors that prove the secret, each to a challenge of its own (``handshake.py``), in the running event loop.

    Args:
        token: the secret.
        on_report: called in the loop for each report.
    """

    def __init__(self, *, token: str, on_report: Callable[[Wrote], None]) -> None:
        self._token = token
        self._on_report = on_report
        self._server: asyncio.Server | None = None
        self._peers: dict[Peer, bytes] = {}  # each with its challenge

    async def start(self, host: str) -> int:
        """Listen on a free port of an address; returns the port."""
        self._server = await asyncio.get_running_loop().create_server(self._peer, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.close()

    def _peer(self) -> Peer:
        return Peer(Introduce, on_message=self._received, on_lost=self._lost, on_made=self._challenge)

    def _lost(self, peer: Peer) -> None:
        self._peers.pop(peer, None)

    def _challenge(self, peer: Peer) -> None:
        asked = challenge()
        self._peers[peer] = asked.nonce
        peer.send(asked)

    def _received(self, peer: Peer, message: Introduce | Wrote) -> None:
        if isinstance(message, Wrote):
            self._on_report(message)
        elif hmac.compare_digest(message.proof, prove(self._token, self._peers[peer], REPORTER, REPORTER)):
            peer.accept(Wrote)
        else:
            log.warning("refused reports of %s: wrong token", peer.name)
            peer.close()
