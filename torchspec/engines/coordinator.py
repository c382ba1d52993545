"""The coordinator process: ``python -m torchspec.engines.coordinator``.

It gets one JSON line of configuration (``GroupConfig.to_json``) on stdin, says where it listens in one JSON line on stdout, and lives as long as its stdin: at end of
file, for whatever reason, it kills the workers' process groups, closes the store and exits. The rules are in ``ledger.py``; here they meet sockets, processes and the clock. One
thread deletes keys, because a store call may block. No torch is imported.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torchspec.engines.connection import Peer
from torchspec.engines.ledger import Ledger, Out, ProtocolError
from torchspec.engines.messages import (
    PROTOCOL,
    Acknowledge,
    Answer,
    Ask,
    Beat,
    Cancel,
    CloseStage,
    Hello,
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
from torchspec.engines.supervisor import WorkerProcess, end_all
from torchspec.transfer import StoreConfig, make_server, open_store
from torchspec.transfer.spec import RecordSpec

log = logging.getLogger("torchspec.coordinator")
_TICK = 0.1
_FROM: dict[str, Any] = {
    "trainer": OpenStage | Submit | Acknowledge | Reissue | CloseStage | Ask,
    "worker": Ready | Pull | Report | Beat,
    "observer": Ask,
}


class _WorkerView:
    """What the coordinator knows of a connected worker beside its leases."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.ready = False
        self.pull: Pull | None = None
        self.beat = Beat(samples=0, tokens=0, busy_s=0.0, write_s=0.0)
        self.last_beat = time.monotonic()
        self.idle_for_credit_s = 0.0
        self.idle_for_packs_s = 0.0


class Coordinator:
    """See the module.

    Args:
        config: the JSON line, decoded.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.engines: dict[str, Any] = config["engines"]
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
        )
        log_dir = Path(config["log_dir"])
        self.processes = [WorkerProcess(f"worker-{i}", device, log_dir / f"worker-{i}.log") for i, device in enumerate(config["devices"])]
        self.workers: dict[str, _WorkerView] = {}
        self.ranks: dict[tuple[int, str], Peer] = {}
        """Connection of each (rank, stage)."""
        self.waiting: list[Peer] = []
        """Clients that came before the store was up."""
        self.peers: set[Peer] = set()
        self.store: Any | None = None
        self.port = 0
        self.restarts = 0
        self.error: str | None = None
        self.finished = asyncio.Event()
        self._deletions: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._deleter: threading.Thread | None = None
        self._last_tick = time.monotonic()

    async def run(self) -> int:
        """Serve until stdin ends; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.finished.set)
        server = await loop.create_server(self._peer, self.config["listen_host"], self.config["listen_port"])
        self.port = server.sockets[0].getsockname()[1]
        _say({"port": self.port, "pid": os.getpid()})
        loop.add_reader(sys.stdin.fileno(), self._stdin)
        ticking: asyncio.Task[None] | None = None
        try:
            if await self._start_store(loop):
                for process in self.processes:
                    process.start(host=self._own_host, port=self.port, token=self.config["token"], now=time.monotonic())
                ticking = asyncio.create_task(self._ticks())
            await self.finished.wait()
        finally:
            if ticking is not None:
                ticking.cancel()
            server.close()
            for peer in list(self.peers):
                peer.send(Stop(error=self.error or ""))
                peer.close()
            await asyncio.sleep(0)  # let the last words out
            end_all(self.processes)
            self._deletions.put(None)
            if self._deleter is not None:
                await asyncio.to_thread(self._deleter.join, 5.0)
            if self.store is not None:
                await asyncio.to_thread(self.store.close)
        log.info("ended%s", f": {self.error}" if self.error else "")
        return 1 if self.error else 0

    @property
    def _own_host(self) -> str:
        host: str = self.config["listen_host"]
        return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host

    async def _start_store(self, loop: asyncio.AbstractEventLoop) -> bool:
        started = time.monotonic()
        try:
            store = make_server(
                StoreConfig(**self.config["store"]), run=self.config["run"], budget=self.config["budget"], expected_host=self.config["expected_host"], log_dir=self.config["log_dir"]
            )
            self.store = store
            await asyncio.to_thread(store.start)
        except Exception as error:
            self.stop(f"the store did not start: {error}")
            return False
        log.info("store %s (%s) up after %.2f s", store.kind, store.reason, time.monotonic() - started)
        self._deleter = threading.Thread(target=self._delete, args=(loop, store.address), name="deleter", daemon=True)
        self._deleter.start()
        waiting, self.waiting = self.waiting, []
        for peer in waiting:
            self._welcome(peer)
        return not self.finished.is_set()

    def stop(self, error: str) -> None:
        """End the group; clients are told why."""
        if self.error is None:
            self.error = error
            log.error("stopping: %s", error)
            _say({"error": error})
        self.finished.set()

    def _stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            log.info("the owner closed the pipe")
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.finished.set()

    # -- clients

    def _peer(self) -> Peer:
        peer = Peer(Hello, on_message=self._hello, on_lost=self._lost)
        self.peers.add(peer)
        return peer

    def _hello(self, peer: Peer, message: Any) -> None:
        if peer.role:
            self._message(peer, message)
            return
        problem = None
        if not hmac.compare_digest(message.token.encode(), self.config["token"].encode()):
            problem = "wrong run token"
        elif message.protocol != PROTOCOL:
            problem = f"speaks protocol {message.protocol}, this run {PROTOCOL}: install the same version of torchspec everywhere"
        elif message.role not in _FROM:
            problem = f"unknown role {message.role!r}"
        elif message.role == "worker" and message.name in self.workers:
            problem = f"a worker named {message.name} is connected already"
        if problem is not None:
            log.warning("refused %s (%s): %s", peer.name, message.name, problem)
            peer.send(Stop(error=f"the coordinator refused the connection: {problem}"))
            peer.close()
            return
        peer.role, peer.name = message.role, message.name
        peer.accept(_FROM[peer.role])
        if peer.role == "worker":
            self.workers[peer.name] = _WorkerView(peer)
        if self._deleter is None:
            self.waiting.append(peer)
        else:
            self._welcome(peer)

    def _welcome(self, peer: Peer) -> None:
        assert self.store is not None
        job = {name: self.config[name] for name in ("target", "engine", "engines", "max_length")} if peer.role == "worker" else {}
        peer.send(Welcome(run=self.config["run"], incarnation=self.config["incarnation"], store=self.store.address, spec=self.spec, job=job))

    def _message(self, peer: Peer, message: Any) -> None:
        try:
            if peer.role == "worker":
                self._from_worker(peer, message)
            else:
                self._from_trainer(peer, message)
        except ProtocolError as error:
            log.error("%s broke the protocol: %s", peer.name, error)
            peer.send(Stop(error=f"coordinator: {error}"))
            peer.close()
        self._settle()

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
                self.ranks[m.rank, m.stage] = peer
                ledger.open_stage(m.rank, m.stage, m.epoch, first_pack=m.first_pack, num_packs=m.num_packs, world=m.world)
            case CloseStage():
                ledger.close_stage(peer.rank, m.stage, m.epoch)
            case Ask():
                peer.send(Answer(state=self.state()))

    def _from_worker(self, peer: Peer, m: Any) -> None:
        view = self.workers[peer.name]
        match m:
            case Report():
                if view.ready:
                    for done in m.finished:
                        self.ledger.finish(peer.name, done.lease, done.nbytes, done.rows)
                    for lost in m.failed:
                        log.warning("%s failed lease %d: %s", peer.name, lost.lease, lost.reason)
                        self.ledger.fail(peer.name, lost.lease, lost.reason, retry=lost.retry)
            case Pull():
                view.pull = m if view.ready else None
            case Beat():
                view.beat, view.last_beat = m, time.monotonic()
            case Ready():
                self._ready(peer, view, m)

    def _ready(self, peer: Peer, view: _WorkerView, m: Ready) -> None:
        different = [f"{name} is {m.spec.get(name)!r}, the trainer expects {value!r}" for name, value in self.spec.items() if m.spec.get(name) != value]
        if different:
            self.stop(f"{peer.name} would write other records than this run needs: {'; '.join(different)}")
            return
        if m.max_tokens < self.config["max_length"]:
            self.stop(f"{peer.name} takes at most {m.max_tokens} tokens, data.max_length is {self.config['max_length']}: lower it, or raise the engine's limit")
            return
        log.info("%s ready: %s", peer.name, json.dumps(m.info))
        view.ready = True
        self.ledger.join(peer.name, m.max_tokens)
        for process in self.processes:
            if process.name == peer.name:
                process.ready = process.was_ready = True

    def _lost(self, peer: Peer) -> None:
        self.peers.discard(peer)
        if peer in self.waiting:
            self.waiting.remove(peer)
        if peer.role == "worker" and self.workers.get(peer.name) is not None and self.workers[peer.name].peer is peer:
            del self.workers[peer.name]
            self.ledger.leave(peer.name, f"{peer.name} was lost")
        for (rank, stage), connected in list(self.ranks.items()):
            if connected is peer:
                del self.ranks[rank, stage]
                self._close_passes(rank, stage)
        self._settle()

    def _close_passes(self, rank: int, stage: str) -> None:
        for name, epoch in self.ledger.passes():
            if name == stage:
                self.ledger.close_stage(rank, stage, epoch)

    # -- consequences

    def _settle(self) -> None:
        """Carry out what the ledger decided, and give work to who asked for it."""
        ledger = self.ledger
        now = time.monotonic()
        for name, view in self.workers.items():
            if view.pull is not None and ledger.has_work:
                leases = ledger.pull(name, view.pull.samples, view.pull.tokens, now)
                if leases:
                    view.pull = None
                    view.peer.send(Work(leases=leases))
        out, ledger.out = ledger.out, Out()
        for rank, message in out.ready:
            peer = self.ranks.get((rank, message.stage))
            if peer is not None:
                peer.send(message)
        for name, lease in out.cancel:
            if name in self.workers:
                self.workers[name].peer.send(Cancel(leases=[lease]))
        if out.delete:
            self._deletions.put(out.delete)
        if out.stop is not None:
            self.stop(out.stop)

    def _delete(self, loop: asyncio.AbstractEventLoop, address: dict[str, Any]) -> None:
        """The deleting thread: everything queued in one call."""
        try:
            store = open_store(address)
        except Exception as error:
            loop.call_soon_threadsafe(self.stop, f"the coordinator cannot reach its store: {error}")
            return
        while (keys := self._deletions.get()) is not None:
            last = False
            while not self._deletions.empty():
                more = self._deletions.get()
                if more is None:
                    last = True
                    break
                keys += more
            try:
                store.delete(keys)
            except Exception as error:
                loop.call_soon_threadsafe(self.stop, f"deleting from the store failed: {error}")
                break
            loop.call_soon_threadsafe(self._deleted, keys)
            if last:
                break
        store.close()

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
                self.stop(f"coordinator failed: {error!r}")

    def _tick(self, now: float) -> None:
        elapsed, self._last_tick = now - self._last_tick, now
        assert self.store is not None
        if not self.store.alive():
            self.stop(f"the {self.store.kind} store died; see {self.config['log_dir']}")
            return
        for view in self.workers.values():
            if view.pull is not None:
                if self.ledger.waits_for_credit:
                    view.idle_for_credit_s += elapsed
                else:
                    view.idle_for_packs_s += elapsed
        late = self.ledger.overdue(now)
        for process in self.processes:
            self._watch(process, late, now)
        for name in late.keys() - {process.name for process in self.processes}:
            log.error("%s holds %d leases past their deadline: connection closed", name, late[name])
            self.workers[name].peer.close()

    def _watch(self, process: WorkerProcess, late: dict[str, int], now: float) -> None:
        """Restart a worker that ended, hangs or is silent; give up when it cannot start."""
        if process.process is None:
            if now >= process.next_start:
                process.start(host=self._own_host, port=self.port, token=self.config["token"], now=now)
            return
        code = process.exit_code()
        view = self.workers.get(process.name)
        if code is None and process.ready and view is not None:
            if process.name in late:
                log.error("%s holds %d leases past their deadline: killed", process.name, late[process.name])
                process.kill()
            elif now - view.last_beat > self.engines["silence_timeout"]:
                log.error("%s was silent for %.0f s: killed", process.name, now - view.last_beat)
                process.kill()
        elif code is None and not process.ready and now - process.started > self.engines["start_timeout"]:
            process.kill()
            self.stop(f"{process.name} was not ready after data.engines.start_timeout={self.engines['start_timeout']:.0f} s; its log ends: {process.last_lines()}")
        if code is not None:
            self._ended(process, code, view, now)

    def _ended(self, process: WorkerProcess, code: int, view: _WorkerView | None, now: float) -> None:
        how = f"signal {-code}" if code < 0 else f"code {code}"
        if not process.was_ready:
            self.stop(f"{process.name} ended with {how} before it was ready; its log ends: {process.last_lines()}")
            return
        if process.restarts >= self.engines["max_restarts"]:
            self.stop(f"{process.name} ended with {how} after {process.restarts} restarts (data.engines.max_restarts); its log ends: {process.last_lines()}")
            return
        process.kill()  # what is left of its group
        if view is not None:
            view.peer.close()
            self._lost(view.peer)
        self.restarts += 1
        delay = process.back_off(now)
        log.warning("%s ended with %s: restart %d in %.1f s", process.name, how, process.restarts, delay)

    def state(self) -> dict[str, Any]:
        """docs/design.md, "Group metrics"."""
        workers = {
            name: {
                "samples": view.beat.samples,
                "tokens": view.beat.tokens,
                "busy_s": view.beat.busy_s,
                "write_s": view.beat.write_s,
                "alive": view.ready,
                "idle_for_credit_s": view.idle_for_credit_s,
                "idle_for_packs_s": view.idle_for_packs_s,
            }
            for name, view in self.workers.items()
        }
        return {**self.ledger.state(), "restarts": self.restarts, "workers": workers}


def _say(words: dict[str, Any]) -> None:
    try:
        print(json.dumps(words), flush=True)
    except (BrokenPipeError, ValueError):
        pass


def main() -> None:
    """Entry of the process."""
    config = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[attr-defined]  # unbuffered: the rest of stdin is the lifeline
    log_dir = Path(config["log_dir"])
    log_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=log_dir / "coordinator.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        code = asyncio.run(_serve(config))
    except Exception as error:
        log.exception("coordinator failed")
        _say({"error": f"coordinator failed: {error!r}; see {log_dir / 'coordinator.log'}"})
        code = 1
    logging.shutdown()
    os._exit(code)


async def _serve(config: dict[str, Any]) -> int:
    return await Coordinator(config).run()


if __name__ == "__main__":
    main()
