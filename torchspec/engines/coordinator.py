"""The coordinator process: ``python -m torchspec.engines.coordinator``.

It gets one JSON line of configuration (``GroupConfig.to_json``) on stdin, says where it listens in one JSON line on stdout, and lives
as long as its stdin: at end of file, for whatever reason, it kills the workers' process groups, closes the store and exits. The rules
are in ``ledger.py``; here they meet sockets, processes and the clock. No torch is imported.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchspec.engines.cleaner import Cleaner
from torchspec.engines.client import Endpoint
from torchspec.engines.connection import Peer
from torchspec.engines.ledger import Ledger, Out, ProtocolError
from torchspec.engines.messages import (
    ANSWERER,
    PROTOCOL,
    Acknowledge,
    Answer,
    Ask,
    Beat,
    Cancel,
    CloseStage,
    Hello,
    NewDraft,
    OpenStage,
    Pull,
    Ready,
    Reissue,
    Report,
    Stop,
    Submit,
    Welcome,
    Work,
)
from torchspec.engines.supervisor import Supervisor, WorkerProcess
from torchspec.transfer import StoreConfig, make_server
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import StoreServer

log = logging.getLogger("torchspec.coordinator")
_TICK = 0.1
"""Seconds between two looks at processes and deadlines."""
_HELLO = 10.0
"""Seconds for a client to say who it is."""
_FROM: dict[str, Any] = {
    "trainer": OpenStage | Submit | Acknowledge | Reissue | CloseStage | NewDraft | Ask,
    "worker": Ready | Pull | Report | Beat,
    "observer": Ask,
}


class _WorkerView:
    """What the coordinator knows of a connected worker beside its leases."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.ready = False
        self.answers = False
        self.pull: Pull | None = None
        self.beat = Beat(samples=0, tokens=0, busy_s=0.0, write_s=0.0)
        self.last_beat = time.monotonic()
        self.idle_for_credit_s = 0.0
        self.idle_for_packs_s = 0.0

    def facts(self) -> dict[str, Any]:
        b = self.beat
        counters = {"samples": b.samples, "tokens": b.tokens, "busy_s": b.busy_s, "write_s": b.write_s, "alive": self.ready}
        counters |= {"answers": self.answers, "drafts": b.drafts, "accepted": b.accepted}
        return {**counters, "idle_for_credit_s": self.idle_for_credit_s, "idle_for_packs_s": self.idle_for_packs_s}


class Coordinator:
    """See the module.

    Args:
        config: the JSON line, decoded.
        say: takes words for the owner.
    """

    def __init__(self, config: dict[str, Any], *, say: Callable[[dict[str, Any]], None]) -> None:
        self.config = config
        self.engines: dict[str, Any] = config["engines"]
        self.error: str | None = None
        self._draft: NewDraft | None = None
        self.finished = asyncio.Event()
        spec = RecordSpec.from_dict(config["spec"])
        self.spec = spec.to_dict()
        self.ledger = Ledger(
            prefix=f"{config['run']}/{config['incarnation']}",
            budget=config["budget"],
            reserve=config["reserve"],
            nbytes=spec.nbytes,
            max_attempts=self.engines["max_attempts"],
            max_failed_fraction=self.engines["max_failed_fraction"],
            lease_timeout=self.engines["lease_timeout"],
            separate_answers=bool(config["answer_devices"]),
        )
        log_dir = Path(config["log_dir"])
        devices = {f"worker-{i}": device for i, device in enumerate(config["devices"])}
        devices |= {f"{ANSWERER}-{i}": device for i, device in enumerate(config["answer_devices"])}
        processes = [WorkerProcess(name, device, log_dir / f"{name}.log") for name, device in devices.items()]
        self.supervisor = Supervisor(processes, limits=self.engines, on_end=self._worker_ended, on_fatal=self.stop)
        self._say = say
        self._store: StoreServer | None = None
        self._cleaner: Cleaner | None = None
        self._peers: set[Peer] = set()
        self._early: list[Peer] = []
        """Clients that came before the store was up."""
        self._workers: dict[str, _WorkerView] = {}
        self._ranks: dict[tuple[int, str], Peer] = {}
        """Connection of each (rank, stage)."""
        self._late: list[tuple[float, list[str]]] = []
        """Keys that a lost worker of another host may still write, and when they are deleted once more."""
        self._last_tick = time.monotonic()

    async def run(self) -> int:
        """Serve until the owner is gone; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.finished.set)
        loop.add_reader(sys.stdin.fileno(), self._stdin)
        try:
            server = await loop.create_server(self._peer, self.config["listen_host"], self.config["listen_port"])
        except OSError as error:
            self.stop(f"cannot listen on {self.config['listen_host']}:{self.config['listen_port']} ({error.strerror})")
            return 1
        port = server.sockets[0].getsockname()[1]
        log.info("listening on %s:%d", self.config["listen_host"], port)
        self._say({"port": port, "pid": os.getpid()})
        ticking = asyncio.create_task(self._ticks())
        try:
            host = "127.0.0.1" if self.config["listen_host"] in ("0.0.0.0", "::") else self.config["listen_host"]
            self.supervisor.start(Endpoint(host, port, self.config["token"]), now=time.monotonic())
            await self._start_store(loop)
            await self.finished.wait()
        finally:
            ticking.cancel()
            server.close()
            for peer in list(self._peers):
                peer.send(Stop(error=self.error or ""))
                peer.close()
            await asyncio.sleep(0)  # let the last words out
            self.supervisor.close()
            if self._cleaner is not None:
                await asyncio.to_thread(self._cleaner.close, 5.0)
            if self._store is not None:
                await asyncio.to_thread(self._store.close)
        log.info("ended%s", f": {self.error}" if self.error else "")
        return 1 if self.error else 0

    async def _start_store(self, loop: asyncio.AbstractEventLoop) -> None:
        started = time.monotonic()
        c = self.config
        try:
            store = make_server(StoreConfig(**c["store"]), run=c["run"], budget=c["budget"], expected_host=c["expected_host"], log_dir=c["log_dir"])
            self._store = store
            await asyncio.to_thread(store.start)
        except Exception as error:
            self.stop(f"the store did not start: {error}")
            return
        log.info("store %s (%s) up after %.2f s", store.kind, store.reason, time.monotonic() - started)
        self._cleaner = Cleaner(
            store.address,
            on_deleted=lambda keys: _in_loop(loop, self._deleted, keys),
            on_error=lambda problem: _in_loop(loop, self.stop, problem),
        )
        early, self._early = self._early, []
        for peer in early:
            self._welcome(peer)

    def stop(self, error: str) -> None:
        """End the group; clients are told why. The first reason counts."""
        if self.error is None:
            self.error = error
            log.error("stopping: %s", error)
            self._say({"error": error})
        self.finished.set()

    def _stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            log.info("the owner closed the pipe")
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.finished.set()

    # -- clients

    def _peer(self) -> Peer:
        peer = Peer(Hello, on_message=self._received, on_lost=self._lost)
        self._peers.add(peer)
        asyncio.get_running_loop().call_later(_HELLO, self._expect_hello, peer)
        return peer

    def _expect_hello(self, peer: Peer) -> None:
        if not peer.role and peer in self._peers:
            log.warning("refused %s: it did not say who it is", peer.name)
            peer.close()

    def _received(self, peer: Peer, message: Any) -> None:
        if not peer.role:
            self._hello(peer, message)
            return
        try:
            (self._from_worker if peer.role == "worker" else self._from_trainer)(peer, message)
        except ProtocolError as error:
            log.error("%s broke the protocol: %s", peer.name, error)
            peer.send(Stop(error=f"coordinator: {error}"))
            peer.close()
        self._settle()

    def _hello(self, peer: Peer, message: Hello) -> None:
        problem = None
        if not hmac.compare_digest(message.token.encode(), self.config["token"].encode()):
            problem = "wrong run token"
        elif message.protocol != PROTOCOL:
            problem = f"speaks protocol {message.protocol}, this run {PROTOCOL}: install the same version of torchspec everywhere"
        elif message.role not in _FROM:
            problem = f"unknown role {message.role!r}"
        elif message.role == "worker" and message.name in self._workers:
            problem = f"a worker named {message.name} is connected already"
        if problem is not None:
            log.warning("refused %s (%.40r): %s", peer.name, message.name, problem)
            peer.send(Stop(error=f"the coordinator refused the connection: {problem}"))
            peer.close()
            return
        peer.role, peer.name = message.role, message.name
        peer.accept(_FROM[peer.role])
        if peer.role == "worker":
            self._workers[peer.name] = _WorkerView(peer)
        if self._cleaner is None:
            self._early.append(peer)
        else:
            self._welcome(peer)

    def _welcome(self, peer: Peer) -> None:
        assert self._store is not None
        job = {name: self.config[name] for name in ("target", "engine", "engines", "max_length", "on_policy")} if peer.role == "worker" else {}
        if self._answers(peer.name):
            job |= {"engine": ANSWERER, "engines": {**self.engines, "engine_args": self.config["on_policy"]["answer_args"]}}
        peer.send(Welcome(run=self.config["run"], incarnation=self.config["incarnation"], store=self._store.address, spec=self.spec, job=job))

    def _answers(self, name: str) -> bool:
        """Whether a worker is one of those that only answer, which are started here alone."""
        return name.startswith(ANSWERER) and self.supervisor.owns(name)

    def _from_trainer(self, peer: Peer, m: Any) -> None:
        ledger = self.ledger
        match m:
            case Submit():
                ledger.submit(peer.rank, m.stage, m.epoch, m.packs)
            case Acknowledge():
                ledger.acknowledge(peer.rank, m.stage, m.epoch, m.packs)
            case Reissue():
                log.warning("rank %d could not use %s: %s", peer.rank, m.key, m.reason)
                ledger.reissue(peer.rank, m.stage, m.epoch, m.pack, m.index, m.key, m.reason)
            case OpenStage():
                peer.rank = m.rank
                self._ranks[m.rank, m.stage] = peer
                ledger.open_stage(m.rank, m.stage, m.epoch, first_pack=m.first_pack, num_packs=m.num_packs, world=m.world, step_packs=m.step_packs)
            case NewDraft():
                self._draft = m
                for view in self._workers.values():
                    if view.answers:
                        view.peer.send(m)
            case CloseStage():
                ledger.close_stage(peer.rank, m.stage, m.epoch)
            case Ask():
                state = {**ledger.state(), "restarts": self.supervisor.restarts}
                peer.send(Answer(state={**state, "workers": {name: view.facts() for name, view in self._workers.items()}}))

    def _from_worker(self, peer: Peer, m: Any) -> None:
        view = self._workers[peer.name]
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
                view.beat, view.last_beat = m, time.monotonic()
            case Ready() if not view.ready:
                self._ready(peer, view, m)
            case _:
                raise ProtocolError(f"{type(m).__name__} from {peer.name} {'after' if view.ready else 'before'} it was ready")

    def _ready(self, peer: Peer, view: _WorkerView, m: Ready) -> None:
        different = (
            []
            if m.answers
            else [f"{name} is {m.spec.get(name)!r}, the trainer expects {value!r}" for name, value in self.spec.items() if m.spec.get(name) != value]
        )
        if different:
            self.stop(f"{peer.name} would write other records than this run needs: {'; '.join(different)}")
            return
        if m.max_tokens < self.config["max_length"]:
            limit = f"{peer.name} takes at most {m.max_tokens} tokens, data.max_length is {self.config['max_length']}"
            self.stop(f"{limit}: lower it, or raise the engine's limit")
            return
        log.info("%s ready: %s", peer.name, json.dumps(m.info))
        view.ready, view.last_beat = True, time.monotonic()
        self.ledger.join(peer.name, m.max_tokens, answers=m.answers)
        view.answers = m.answers
        if m.answers and self._draft is not None:
            peer.send(self._draft)
        self.supervisor.ready(peer.name)

    def _lost(self, peer: Peer) -> None:
        self._peers.discard(peer)
        if peer in self._early:
            self._early.remove(peer)
        view = self._workers.get(peer.name) if peer.role == "worker" else None
        if view is not None and view.peer is peer:
            del self._workers[peer.name]
            if self.supervisor.owns(peer.name):
                self.supervisor.disconnected(peer.name, now=time.monotonic())  # its leases go back when it has ended and can write no more
            else:
                keys = self.ledger.leave(peer.name, f"{peer.name} was lost")
                self._late.append((time.monotonic() + self.engines["lease_timeout"], keys))
        for (rank, stage), connected in list(self._ranks.items()):
            if connected is peer:
                del self._ranks[rank, stage]
                self.ledger.leave_stage(rank, stage)
        self._settle()

    def _worker_ended(self, name: str) -> None:
        """A worker process of this host is reaped."""
        view = self._workers.pop(name, None)
        if view is not None:
            view.peer.close()
        self.ledger.leave(name, f"{name} died")
        self._settle()

    # -- consequences

    def _settle(self) -> None:
        """Carry out what the ledger decided, and give work to who asked for it."""
        ledger = self.ledger
        if ledger.has_work:
            now = time.monotonic()
            for name, view in self._workers.items():
                if view.pull is not None:
                    leases = ledger.pull(name, view.pull.samples, view.pull.tokens, now)
                    if leases:
                        view.pull = None
                        view.peer.send(Work(leases=leases))
        out, ledger.out = ledger.out, Out()
        if out.stop is not None:
            self.stop(out.stop)
            return
        for rank, message in out.ready:
            peer = self._ranks.get((rank, message.stage))
            if peer is not None:
                peer.send(message)
        for name, lease in out.cancel:
            if name in self._workers:
                self._workers[name].peer.send(Cancel(leases=[lease]))
        if out.delete and self._cleaner is not None:
            self._cleaner.delete(out.delete)

    def _deleted(self, keys: list[str]) -> None:
        self.ledger.deleted(keys)
        self._settle()

    # -- the clock

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            try:
                self._tick(time.monotonic())
            except Exception as error:
                log.exception("tick failed")
                self.stop(f"the coordinator failed: {error!r}")

    def _tick(self, now: float) -> None:
        elapsed, self._last_tick = now - self._last_tick, now
        if os.getppid() != self.config["owner"]:
            log.info("the owner is gone")  # its pipe may be held open by a child of its
            self.finished.set()
        if self.finished.is_set():
            return
        self.supervisor.watch(now, {name: view.last_beat for name, view in self._workers.items()})
        if self._cleaner is None or self._store is None:
            return
        if not self._store.alive():
            self.stop(f"the {self._store.kind} store died; see {self.config['log_dir']}")
            return
        held_back = self.ledger.waits_for_credit
        for view in self._workers.values():
            if view.pull is not None:
                view.idle_for_credit_s += elapsed * held_back
                view.idle_for_packs_s += elapsed * (not held_back)
        for name, count in self.ledger.overdue(now).items():
            self._end_worker(name, f"{count} leases past data.engines.lease_timeout={self.engines['lease_timeout']:g} s")
        for name, view in list(self._workers.items()):
            if view.ready and not self.supervisor.owns(name) and now - view.last_beat > self.engines["silence_timeout"]:
                self._end_worker(name, f"silent for more than {self.engines['silence_timeout']:g} s (data.engines.silence_timeout)")
        while self._late and self._late[0][0] <= now:
            self._cleaner.delete(self._late.pop(0)[1])

    def _end_worker(self, name: str, why: str) -> None:
        if self.supervisor.owns(name):
            self.supervisor.kill(name, f"{why}: killed")
        elif name in self._workers:
            log.error("%s: %s: connection ended", name, why)
            self._workers[name].peer.abort()


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> None:
    """Call in the loop's thread, or not at all when the loop has ended."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        pass


def _say(words: dict[str, Any]) -> None:
    try:
        print(json.dumps(words), flush=True)
    except (BrokenPipeError, ValueError):
        pass


async def _serve(config: dict[str, Any]) -> int:
    return await Coordinator(config, say=_say).run()


def _first_line() -> bytes:
    """The first line of stdin, unbuffered: what follows is the lifeline."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return line


def main() -> None:
    """Entry of the process."""
    config = json.loads(_first_line())
    log_dir = Path(config["log_dir"])
    log_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=log_dir / "coordinator.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        code = asyncio.run(_serve(config))
    except Exception as error:
        log.exception("coordinator failed")
        _say({"error": f"the coordinator failed: {error!r}; see {log_dir / 'coordinator.log'}"})
        code = 1
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
