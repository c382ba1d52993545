"""Where workers come and go: under which name one is known, whether what it would write is what the run needs, and what happens when it cannot serve.

A worker of ours is the supervisor's: it is ended, and started again or not. One that somebody else started is no more than a connection: it is told why it is
of no use, the user is told as well, and the run goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from torchspec.engines.attendance import Attendance
from torchspec.engines.cleaner import LateKeys
from torchspec.engines.connection import Peer
from torchspec.engines.group_config import CoordinatorConfig, WorkerConfig
from torchspec.engines.ledger import Ledger, ProtocolError
from torchspec.engines.messages import Beat, Leave, NewDraft, Pull, Ready, Report, Stop, Unfit
from torchspec.engines.peers import WorkerView, mismatch
from torchspec.engines.table import ANSWERER
from torchspec.errors import UserError

log = logging.getLogger("torchspec.coordinator")


class Workers(Protocol):
    """The worker processes of this host (``Supervisor``)."""

    restarts: int

    def owns(self, name: str) -> bool: ...
    def answers(self, name: str) -> bool: ...
    def secret(self, name: str) -> str: ...
    def ready(self, name: str) -> None: ...
    def unfit(self, name: str, words: list[str]) -> None: ...
    def refuse(self, name: str, why: str) -> None: ...
    def disconnected(self, name: str, *, now: float) -> None: ...
    def kill(self, name: str, why: str) -> None: ...


class Desk:
    """See the module.

    Args:
        config: of the group.
        ledger: the rules.
        now: the coordinator's clock, seconds.
        workers: processes of this host; others are connected and no more.
        attendance: told who comes and goes.
        say: takes a line for the user.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        ledger: Ledger,
        *,
        now: Callable[[], float],
        workers: Workers,
        attendance: Attendance,
        say: Callable[[str], object],
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.now = now
        self.workers = workers
        self.say = say
        self.views: dict[str, WorkerView] = {}
        """Of every connected worker, by the name under which it is known here."""
        self.late = LateKeys(config.engines.lease_timeout)
        """Keys that workers which left may still be writing."""
        self.draft: NewDraft | None = None
        self._spec = config.spec.to_dict()
        self._attendance = attendance

    def problem(self, name: str) -> str | None:
        """Why nobody can come in under this name; None when one can."""
        if not name.isprintable() or not 0 < len(name) <= 128:
            return "its name is no printable word"
        if self.workers.owns(name) and name in self.views:
            return f"a worker named {name} is connected already"
        return None

    def admit(self, peer: Peer, name: str) -> str:
        """The name under which it is known: its own, or one made of it, where the connection of an earlier one is not given up yet."""
        free, number = name, 1
        while free in self.views or (number > 1 and self.workers.owns(free)):
            number += 1
            free = f"{name}.{number}"
        self.views[free] = WorkerView(peer, last_beat=self.now(), since=self.now())
        return free

    def job(self, name: str) -> WorkerConfig:
        """What it builds its engine from."""
        config = self.config
        if not self.workers.answers(name):
            return config.worker(engine=config.engine, engines=config.engines)
        assert config.on_policy is not None
        return config.worker(engine=ANSWERER, engines=replace(config.engines, engine_args=config.on_policy.answer_args))

    def new_draft(self, draft: NewDraft) -> None:
        """For those that answer, now and later."""
        self.draft = draft
        for view in self.views.values():
            if view.answers:
                view.peer.send(draft)

    def received(self, peer: Peer, m: Any) -> None:
        """A message of a worker.

        Raises:
            ProtocolError: it comes at a time when no honest worker sends it.
        """
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
                view.beat, view.last_beat = m, self.now()
            case Ready() if not view.ready:
                self._ready(peer, view, m)
            case Leave():
                view.told = view.in_order = True
                view.ending = "it was told to end"
            case Unfit():
                self._unfit(peer, view, m)
            case _:
                raise ProtocolError(f"{type(m).__name__} from {peer.name} {'after' if view.ready else 'before'} it was ready")

    def lost(self, peer: Peer) -> None:
        """Its connection has ended."""
        view = self.views.get(peer.name)
        if view is None or view.peer is not peer:
            return
        del self.views[peer.name]
        if self.workers.owns(peer.name):
            self.workers.disconnected(peer.name, now=self.now())  # its leases go back when it has ended and can write no more
            return
        if not view.ready and not view.told:
            log.error("%s was lost before it was ready", peer.name)
            self.say(f"worker {peer.name} ({peer.host}) ended before it was ready; what it printed says why")
        self._leave(peer.name, "was lost", view.ending or "its connection ended", in_order=view.in_order)

    def ended(self, name: str, how: str) -> None:
        """The process of one of ours is reaped: it can write nothing more."""
        view = self.views.pop(name, None)
        if view is not None:
            view.peer.close()
        self._leave(name, "died", how)

    def tick(self, now: float, elapsed: float) -> None:
        """Look at everything that time changes."""
        held_back = self.ledger.waits_for_credit
        for name, view in list(self.views.items()):
            if view.pull is not None:
                view.idle_for_credit_s += elapsed * held_back
                view.idle_for_packs_s += elapsed * (not held_back)
            if self.workers.owns(name):
                continue  # the supervisor looks at those
            if view.ready and now - view.last_beat > self.config.engines.silence_timeout:
                self._end(name, f"silent for more than {self.config.engines.silence_timeout:g} s (data.engines.silence_timeout)")
            elif not view.ready and not view.told and now - view.since > self.config.engines.start_timeout:
                self._refuse(view.peer, view, f"was not ready after data.engines.start_timeout={self.config.engines.start_timeout:g} s")
        for name, count in self.ledger.overdue(now).items():
            self._end(name, f"{count} leases past data.engines.lease_timeout={self.config.engines.lease_timeout:g} s")
        self._attendance.tick(elapsed)

    def _ready(self, peer: Peer, view: WorkerView, m: Ready) -> None:
        problem = mismatch(m, self._spec, max_length=self.config.max_length)
        if problem is not None:
            self._refuse(peer, view, problem)
            return
        log.info("%s ready: %s", peer.name, json.dumps(m.info))
        view.ready, view.answers, view.last_beat = True, m.answers, self.now()
        self.ledger.join(peer.name, m.max_tokens, answers=m.answers)
        if m.answers and self.draft is not None:
            peer.send(self.draft)
        self.workers.ready(peer.name)
        host = str(m.info.get("host", peer.host))
        self._attendance.joined(peer.name, host if host.isprintable() else peer.host)

    def _refuse(self, peer: Peer, view: WorkerView, why: str) -> None:
        """What it would do is of no use to this run."""
        log.error("refused worker %s (%s): it %s", peer.name, peer.host, why)
        view.told = True
        if self.workers.owns(peer.name):
            self.workers.refuse(peer.name, f"{peer.name} {why}")
        else:
            self.say(f"worker {peer.name} ({peer.host}) is refused, the run goes on without it: it {why}")
            peer.send(Stop(error=why, refused=True))
            peer.close()

    def _unfit(self, peer: Peer, view: WorkerView, m: Unfit) -> None:
        if len(m.words) != 4:
            raise ProtocolError(f"Unfit from {peer.name} with {len(m.words)} words")
        view.told = True
        problem = " ".join(str(UserError.of(m.words)).split())
        log.error("%s cannot serve: %s", peer.name, problem)
        if self.workers.owns(peer.name):
            self.workers.unfit(peer.name, m.words)
        else:
            view.ending = "it cannot go on"
            self.say(f"worker {peer.name} ({peer.host}) cannot serve, the run goes on without it: {problem}")

    def _leave(self, name: str, how: str, why: str, *, in_order: bool = False) -> None:
        """What a worker held goes to others."""
        self.late.add(self.ledger.leave(name, f"{name} {how}", in_order=in_order), now=self.now())
        self._attendance.left(name, why)

    def _end(self, name: str, why: str) -> None:
        if self.workers.owns(name):
            self.workers.kill(name, f"{why}: killed")
        elif name in self.views:
            log.error("%s: %s: connection ended", name, why)
            self.views[name].ending = why
            self.views[name].peer.abort()
