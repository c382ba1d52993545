"""Where the ledger meets the connections: who may come in, what each message does to the ledger, and what its decisions send out.

Everything here runs in the coordinator's event loop and never waits. ``coordinator.py`` owns process, store and clock, and calls :meth:`Exchange.tick`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from torchspec.engines import audit, handshake
from torchspec.engines.cleaner import Cleaner
from torchspec.engines.connection import Peer
from torchspec.engines.desk import Desk
from torchspec.engines.ledger import ProtocolError
from torchspec.engines.messages import (
    Acknowledge,
    Beat,
    Cancel,
    CloseStage,
    GroupStatus,
    Hello,
    Leave,
    NewDraft,
    Opened,
    OpenStage,
    Pull,
    Pulse,
    Ready,
    Reissue,
    Report,
    StatusRequest,
    Stop,
    Submit,
    Unfit,
    Welcome,
    Work,
)
from torchspec.engines.peers import Client, WorkerView
from torchspec.transfer.store import Address

log = logging.getLogger("torchspec.coordinator")
_HELLO = 10.0
"""Seconds for a client to say who it is."""
_PULSE = 5.0
"""Seconds between two signs of life for clients."""
_TOLD, _MOST_TOLD = 60.0, 100
"""Seconds in which the same is said once of workers that are not let in, and how much of it."""
_FROM: dict[str, Any] = {
    "trainer": OpenStage | Submit | Acknowledge | Reissue | CloseStage | NewDraft | StatusRequest,
    "worker": Ready | Unfit | Leave | Pull | Report | Beat,
    "observer": StatusRequest,
}


class Exchange:
    """See the module.

    Args:
        desk: where workers come and go; it has the group's configuration and the ledger.
        stop: ends the group, with the reason.
    """

    def __init__(self, desk: Desk, *, stop: Callable[[str], object]) -> None:
        self.desk = desk
        self.config = desk.config
        self.ledger = desk.ledger
        self._now = desk.now
        self._say = desk.say
        self._stop = stop
        self._audits = os.environ.get("TORCHSPEC_AUDIT") == "1"
        self._store: Address | None = None
        self._cleaner: Cleaner | None = None
        self._clients: dict[Peer, Client] = {}
        self._ranks: dict[tuple[int, str], Peer] = {}
        """Connection of each (rank, stage)."""
        self._told: dict[tuple[str, str], float] = {}
        """When the user was told last of a worker that was not let in, by host and reason."""
        self._next_pulse = 0.0
        self._seen_call, self._stuck_s = 0, 0.0
        """The cleaner's call of the last tick, and how long it has been going on."""

    @property
    def views(self) -> dict[str, WorkerView]:
        """Of every connected worker."""
        return self.desk.views

    # -- coming and going

    def connect(self) -> Peer:
        """The protocol of a new connection."""
        return Peer(Hello, on_made=self._made, on_message=self._received, on_lost=self._lost)

    def store_is_up(self, store: Address, cleaner: Cleaner) -> None:
        """Clients that waited for the store are welcome now."""
        self._store, self._cleaner = store, cleaner
        for peer, client in self._clients.items():
            if client.role:
                self._welcome(peer, client)

    def close(self, error: str, user: list[str] | None = None) -> None:
        """Tell every client, and end the connections.

        Args:
            error: why, one line; "" in order.
            user: the words of a ``UserError``, where it is one.
        """
        clients, self._clients = self._clients, {}  # who leaves from now on is no news
        for peer, client in clients.items():
            peer.send(Stop(error=error, user=(user or []) if client.role else []))
            peer.close()

    def _made(self, peer: Peer) -> None:
        self._clients[peer] = client = Client(handshake.challenge(), expires=self._now() + _HELLO)
        peer.send(client.challenge)

    def _received(self, peer: Peer, message: Any) -> None:
        client = self._clients.get(peer)
        if client is None:
            return
        try:
            match client.role:
                case "":
                    self._hello(peer, client, message)
                case "worker":
                    self.desk.received(peer, message)
                case _:
                    self._from_trainer(peer, client, message)
            self.settle()
        except ProtocolError as error:
            log.error("%s broke the protocol: %s", peer.name, error)
            self._drop(peer, f"coordinator: {error}")
            self.settle()

    def _drop(self, peer: Peer, why: str) -> None:
        peer.send(Stop(error=why))
        peer.close()

    def _hello(self, peer: Peer, client: Client, message: Hello) -> None:
        secret = self.desk.workers.secret(message.name) if message.role == "worker" else ""
        problem = handshake.problem_of(message, client.challenge.nonce, self.config.token, secret=secret)
        if problem is None and message.role not in _FROM:
            problem = f"unknown role {message.role!r}"
        if problem is None and message.role == "worker":
            problem = self.desk.problem(message.name)
        if problem is not None:
            log.warning("refused %s (%.40r): %s", peer.name, message.name, problem)
            if message.role == "worker":
                self._tell(f"worker {message.name[:40]!r} ({peer.host}) is refused, the run goes on without it: {problem}", peer.host, problem)
            self._drop(peer, f"the coordinator refused the connection: {problem}")
            return
        client.role, peer.name = message.role, message.name
        peer.accept(_FROM[client.role])
        if client.role == "worker":
            peer.name = self.desk.admit(peer, message.name)
        if self._store is not None:
            self._welcome(peer, client)

    def _tell(self, line: str, host: str, problem: str) -> None:
        """Say it, unless the same was said of that host within a minute: strangers may knock as often as they like."""
        now = self._now()
        self._told = {key: when for key, when in self._told.items() if now - when < _TOLD}
        if (host, problem) not in self._told and len(self._told) < _MOST_TOLD:
            self._told[host, problem] = now
            self._say(line)

    def _welcome(self, peer: Peer, client: Client) -> None:
        assert self._store is not None
        job = self.desk.job(peer.name).to_dict() if client.role == "worker" else {}
        peer.send(Welcome(run=self.config.run, incarnation=self.config.incarnation, store=self._store, spec=self.config.spec.to_dict(), job=job))

    def _lost(self, peer: Peer) -> None:
        client = self._clients.pop(peer, None)
        if client is None:
            return
        if client.role == "worker":
            self.desk.lost(peer)
        for (rank, stage), connected in list(self._ranks.items()):
            if connected is peer:
                del self._ranks[rank, stage]
                self.ledger.leave_stage(rank, stage)
        self.settle()

    def worker_ended(self, name: str, how: str) -> None:
        """A worker process of this host is reaped: it can write nothing more."""
        self.desk.ended(name, how)
        self.settle()

    # -- messages

    def _from_trainer(self, peer: Peer, client: Client, m: Any) -> None:
        ledger = self.ledger
        match m:
            case Submit():
                ledger.submit(client.rank, m.stage, m.epoch, m.packs)
            case Acknowledge():
                ledger.acknowledge(client.rank, m.stage, m.epoch, m.packs)
            case Reissue():
                for bad in m.damaged:
                    log.warning("rank %d could not use %s: %s", client.rank, bad.key, bad.reason)
                ledger.reissue(client.rank, m.stage, m.epoch, m.pack, m.damaged)
            case OpenStage():
                self._open_stage(peer, client, m)
            case NewDraft():
                self.desk.new_draft(m)
            case CloseStage():
                ledger.close_stage(client.rank, m.stage, m.epoch)
            case StatusRequest():
                facts = {name: view.facts() for name, view in self.views.items()}
                peer.send(GroupStatus(state={**audit.state(ledger), "restarts": self.desk.workers.restarts, "workers": facts}))

    def _open_stage(self, peer: Peer, client: Client, m: OpenStage) -> None:
        if client.rank not in (-1, m.rank):
            raise ProtocolError(f"{peer.name} was rank {client.rank} and is rank {m.rank} now")
        before = self._ranks.get((m.rank, m.stage))
        if before is not None and before is not peer:
            log.error("%s takes %s of rank %d from %s", peer.name, m.stage, m.rank, before.name)
            self._drop(before, f"coordinator: another process opened {m.stage} as rank {m.rank}: every rank must have its own number")
            self.ledger.leave_stage(m.rank, m.stage)
        self.ledger.open_stage(m.rank, m.stage, m.epoch, first_pack=m.first_pack, num_packs=m.num_packs, world=m.world, step_packs=m.step_packs)
        client.rank = m.rank
        self._ranks[m.rank, m.stage] = peer
        peer.send(Opened(stage=m.stage, epoch=m.epoch))

    # -- consequences

    def settle(self) -> None:
        """Carry out what the ledger decided, and give work to who asked for it."""
        ledger = self.ledger
        if ledger.has_work:
            now = self._now()
            for name, view in self.views.items():
                if view.pull is not None:
                    leases = ledger.pull(name, view.pull.samples, view.pull.tokens, now)
                    if leases:
                        view.pull = None
                        view.peer.send(Work(leases=leases))
        if self._audits:
            audit.audit(ledger)
        out = ledger.out.take()
        if out.stop is not None:
            self._stop(out.stop)
            return
        for rank, message in out.ready:
            peer = self._ranks.get((rank, message.stage))
            if peer is not None:
                peer.send(message)
        for name, lease in out.cancel:
            if name in self.views:
                self.views[name].peer.send(Cancel(leases=[lease]))
        if out.delete and self._cleaner is not None:
            self._cleaner.delete(out.delete)

    def deleted(self, keys: list[str]) -> None:
        """The cleaner has deleted these."""
        self.ledger.deleted(keys)
        self.settle()

    def tick(self, now: float, elapsed: float) -> None:
        """Look at everything that time changes.

        Args:
            now: of the coordinator's clock.
            elapsed: seconds of it since the last call.
        """
        for peer, client in list(self._clients.items()):
            if not client.role and now >= client.expires:
                log.warning("refused %s: it did not say who it is", peer.name)
                peer.abort()
        if now >= self._next_pulse:
            self._next_pulse = now + _PULSE
            for peer, client in self._clients.items():
                if client.role:
                    peer.send(Pulse())
        self.desk.tick(now, elapsed)
        if self._cleaner is not None:
            if keys := self.desk.late.due(now):
                self._cleaner.delete(keys)
            going_on = self._cleaner.call
            self._stuck_s = self._stuck_s + elapsed if going_on and going_on == self._seen_call else 0.0
            self._seen_call = going_on
            if self._stuck_s > self.config.engines.silence_timeout:
                self._stop(f"the store has not answered a deletion for {self._stuck_s:.0f} s (data.engines.silence_timeout)")
