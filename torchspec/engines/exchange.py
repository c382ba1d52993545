"""Where the ledger meets the connections: who may come in, what each message does to the ledger, and what its decisions send out.

Everything here runs in the coordinator's event loop and never waits. ``coordinator.py`` owns process, store and clock, and calls :meth:`Exchange.tick`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from torchspec.engines import books, greeting
from torchspec.engines.cleaner import Cleaner, LateKeys
from torchspec.engines.connection import Peer
from torchspec.engines.ledger import Ledger, ProtocolError
from torchspec.engines.messages import (
    ANSWERER,
    Acknowledge,
    Answer,
    Ask,
    Beat,
    Cancel,
    CloseStage,
    Hello,
    NewDraft,
    Opened,
    OpenStage,
    Pull,
    Pulse,
    Ready,
    Reissue,
    Report,
    Stop,
    Submit,
    Welcome,
    Work,
)
from torchspec.engines.views import Client, WorkerView, mismatch
from torchspec.transfer.store import Address

log = logging.getLogger("torchspec.coordinator")
_HELLO = 10.0
"""Seconds for a client to say who it is."""
_PULSE = 5.0
"""Seconds between two signs of life for clients."""
_FROM: dict[str, Any] = {
    "trainer": OpenStage | Submit | Acknowledge | Reissue | CloseStage | NewDraft | Ask,
    "worker": Ready | Pull | Report | Beat,
    "observer": Ask,
}


class Workers(Protocol):
    """The worker processes of this host (``Supervisor``)."""

    restarts: int

    def owns(self, name: str) -> bool: ...
    def word(self, name: str) -> str: ...
    def ready(self, name: str) -> None: ...
    def disconnected(self, name: str, *, now: float) -> None: ...
    def kill(self, name: str, why: str) -> None: ...


class Exchange:
    """See the module.

    Args:
        config: of the group (``GroupConfig.to_json``), decoded.
        ledger: the rules.
        spec: what the trainer expects of every record.
        now: the coordinator's clock, seconds.
        workers: processes of this host; others are connected and no more.
        stop: ends the group, with the reason.
    """

    def __init__(
        self, config: dict[str, Any], ledger: Ledger, *, spec: dict[str, Any], now: Callable[[], float], workers: Workers, stop: Callable[[str], None]
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.views: dict[str, WorkerView] = {}
        self._spec = spec
        self._engines: dict[str, Any] = config["engines"]
        self._now = now
        self._supervisor = workers
        self._stop = stop
        self._audits = os.environ.get("TORCHSPEC_AUDIT") == "1"
        self._draft: NewDraft | None = None
        self._store: Address | None = None
        self._cleaner: Cleaner | None = None
        self._clients: dict[Peer, Client] = {}
        self._ranks: dict[tuple[int, str], Peer] = {}
        """Connection of each (rank, stage)."""
        self._late = LateKeys(self._engines["lease_timeout"])
        self._next_pulse = 0.0
        self._seen_call, self._stuck_s = 0, 0.0
        """The cleaner's call of the last tick, and how long it has been going on."""

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

    def close(self, error: str) -> None:
        """Tell every client, and end the connections."""
        for peer in list(self._clients):
            peer.send(Stop(error=error))
            peer.close()

    def _made(self, peer: Peer) -> None:
        self._clients[peer] = client = Client(greeting.challenge(), expires=self._now() + _HELLO)
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
                    self._from_worker(peer, client, message)
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
        word = self._supervisor.word(message.name) if message.role == "worker" else ""
        problem = greeting.problem_of(message, client.challenge.nonce, self.config["token"], word=word)
        if problem is None and message.role not in _FROM:
            problem = f"unknown role {message.role!r}"
        if problem is None and message.role == "worker" and message.name in self.views:
            problem = f"a worker named {message.name} is connected already"
        if problem is not None:
            log.warning("refused %s (%.40r): %s", peer.name, message.name, problem)
            self._drop(peer, f"the coordinator refused the connection: {problem}")
            return
        client.role, peer.name = message.role, message.name
        peer.accept(_FROM[client.role])
        if client.role == "worker":
            self.views[peer.name] = WorkerView(peer, last_beat=self._now())
        if self._store is not None:
            self._welcome(peer, client)

    def _welcome(self, peer: Peer, client: Client) -> None:
        assert self._store is not None
        job = {name: self.config[name] for name in ("target", "engine", "engines", "max_length", "on_policy", "images")} if client.role == "worker" else {}
        if peer.name.startswith(ANSWERER) and self._supervisor.owns(peer.name):  # those that only answer are started here alone
            job |= {"engine": ANSWERER, "engines": {**self._engines, "engine_args": self.config["on_policy"]["answer_args"]}}
        peer.send(Welcome(run=self.config["run"], incarnation=self.config["incarnation"], store=self._store, spec=self._spec, job=job))

    def _lost(self, peer: Peer) -> None:
        client = self._clients.pop(peer, None)
        if client is None:
            return
        view = self.views.get(peer.name) if client.role == "worker" else None
        if view is not None and view.peer is peer:
            del self.views[peer.name]
            if self._supervisor.owns(peer.name):
                self._supervisor.disconnected(peer.name, now=self._now())  # its leases go back when it has ended and can write no more
            else:
                self._leave(peer.name, "was lost")
        for (rank, stage), connected in list(self._ranks.items()):
            if connected is peer:
                del self._ranks[rank, stage]
                self.ledger.leave_stage(rank, stage)
        self.settle()

    def worker_ended(self, name: str) -> None:
        """A worker process of this host is reaped: it can write nothing more."""
        view = self.views.pop(name, None)
        if view is not None:
            view.peer.close()
        self._leave(name, "died")
        self.settle()

    def _leave(self, name: str, how: str) -> None:
        """What a worker held goes to others."""
        self._late.add(self.ledger.leave(name, f"{name} {how}"), now=self._now())

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
                self._draft = m
                for view in self.views.values():
                    if view.answers:
                        view.peer.send(m)
            case CloseStage():
                ledger.close_stage(client.rank, m.stage, m.epoch)
            case Ask():
                facts = {name: view.facts() for name, view in self.views.items()}
                peer.send(Answer(state={**books.state(ledger), "restarts": self._supervisor.restarts, "workers": facts}))

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

    def _from_worker(self, peer: Peer, client: Client, m: Any) -> None:
        view = self.views[peer.name]
        match m:
            case Report() if view.ready:
                for done in m.finished:
                    self.ledger.finish(peer.name, done.lease, done.nbytes, done.rows)
                for prompt in m.answered:
                    self.ledger.answered(peer.name, prompt.lease, prompt.ids)
                for lost in m.failed:
                    log.warning("%s failed lease %d: %s", peer.name, lost.lease, lost.reason)
                    self.ledger.fail(peer.name, lost.lease, lost.reason, retry=lost.retry)
            case Pull() if view.ready:
                view.pull = m
            case Beat():
                view.beat, view.last_beat = m, self._now()
            case Ready() if not view.ready:
                self._ready(peer, view, m)
            case _:
                raise ProtocolError(f"{type(m).__name__} from {peer.name} {'after' if view.ready else 'before'} it was ready")

    def _ready(self, peer: Peer, view: WorkerView, m: Ready) -> None:
        problem = mismatch(m, self._spec, max_length=self.config["max_length"])
        if problem is not None:
            self._stop(f"{peer.name} {problem}")
            return
        log.info("%s ready: %s", peer.name, json.dumps(m.info))
        view.ready, view.answers, view.last_beat = True, m.answers, self._now()
        self.ledger.join(peer.name, m.max_tokens, answers=m.answers)
        if m.answers and self._draft is not None:
            peer.send(self._draft)
        self._supervisor.ready(peer.name)

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
            books.audit(ledger)
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
        held_back = self.ledger.waits_for_credit
        for view in self.views.values():
            if view.pull is not None:
                view.idle_for_credit_s += elapsed * held_back
                view.idle_for_packs_s += elapsed * (not held_back)
        for name, count in self.ledger.overdue(now).items():
            self._end_worker(name, f"{count} leases past data.engines.lease_timeout={self._engines['lease_timeout']:g} s")
        for name, view in list(self.views.items()):
            if view.ready and not self._supervisor.owns(name) and now - view.last_beat > self._engines["silence_timeout"]:
                self._end_worker(name, f"silent for more than {self._engines['silence_timeout']:g} s (data.engines.silence_timeout)")
        if self._cleaner is not None:
            if keys := self._late.due(now):
                self._cleaner.delete(keys)
            going_on = self._cleaner.call
            self._stuck_s = self._stuck_s + elapsed if going_on and going_on == self._seen_call else 0.0
            self._seen_call = going_on
            if self._stuck_s > self._engines["silence_timeout"]:
                self._stop(f"the store has not answered a deletion for {self._stuck_s:.0f} s (data.engines.silence_timeout)")

    def _end_worker(self, name: str, why: str) -> None:
        if self._supervisor.owns(name):
            self._supervisor.kill(name, f"{why}: killed")
        elif name in self.views:
            log.error("%s: %s: connection ended", name, why)
            self.views[name].peer.abort()
