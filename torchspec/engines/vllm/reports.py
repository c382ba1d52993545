"""The engine's end of the connections on which connectors report."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable

from torchspec.engines.connection import Peer
from torchspec.engines.vllm.orders import Introduce, Wrote

log = logging.getLogger(__name__)


class ReportServer:
    """Takes reports of connectors that know the secret, in the running event loop.

    Args:
        token: the secret.
        on_report: called in the loop for each report.
    """

    def __init__(self, *, token: str, on_report: Callable[[Wrote], None]) -> None:
        self._token = token
        self._on_report = on_report
        self._server: asyncio.Server | None = None
        self._peers: set[Peer] = set()

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
        peer = Peer(Introduce, on_message=self._received, on_lost=self._peers.discard)
        self._peers.add(peer)
        return peer

    def _received(self, peer: Peer, message: Introduce | Wrote) -> None:
        if isinstance(message, Wrote):
            self._on_report(message)
        elif hmac.compare_digest(message.token.encode(), self._token.encode()):
            peer.accept(Wrote)
        else:
            log.warning("refused reports of %s: wrong token", peer.name)
            peer.close()
