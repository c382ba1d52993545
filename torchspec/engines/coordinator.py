"""The coordinator process: ``python -m torchspec.engines.coordinator``.

It gets one JSON line of configuration (``CoordinatorConfig``) on stdin, says where it listens in one JSON line on stdout, and lives
as long as its stdin: at end of file, for whatever reason, it kills the workers' process groups, closes the store and exits. The rules
are in ``ledger.py``, clients in ``exchange.py``; here are process, store and clock. No torch is imported.

Its clock stands still while the process does: a coordinator that was stopped or starved for a minute finds no lease overdue and no worker silent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torchspec.engines.attendance import Attendance
from torchspec.engines.cleaner import Cleaner
from torchspec.engines.client import Endpoint
from torchspec.engines.desk import Desk
from torchspec.engines.exchange import Exchange
from torchspec.engines.group_config import CoordinatorConfig
from torchspec.engines.ledger import Ledger
from torchspec.engines.supervisor import Supervisor, WorkerProcess
from torchspec.engines.table import ANSWERER
from torchspec.errors import UserError
from torchspec.logs import keep_one_before
from torchspec.network import host_port
from torchspec.transfer import make_server
from torchspec.transfer.store import StoreServer

log = logging.getLogger("torchspec.coordinator")
_TICK = 0.1
"""Seconds between two looks at processes and deadlines."""
_LONGEST_TICK = 1.0
"""What the clock counts of a longer one."""


class Coordinator:
    """See the module.

    Args:
        config: of the group.
        say: takes words for the owner.
    """

    def __init__(self, config: CoordinatorConfig, *, say: Callable[[dict[str, Any]], None]) -> None:
        self.config = config
        self.error: str | None = None
        self.user: list[str] | None = None
        self.finished = asyncio.Event()
        self.now = time.monotonic()
        """The clock; see the module."""
        engines = config.engines
        ledger = Ledger(
            prefix=f"{config.run}/{config.incarnation}",
            budget=config.budget,
            reserve=config.reserve,
            nbytes=cache(config.spec.nbytes),
            max_attempts=engines.max_attempts,
            max_failed_fraction=engines.max_failed_fraction,
            lease_timeout=engines.lease_timeout,
            separate_answers=bool(config.answer_devices),
        )
        log_dir = Path(config.log_dir)
        processes = [
            WorkerProcess(f"{name}-{i}", device, log_dir / f"{name}-{i}.log", answers=answers)
            for name, devices, answers in (("worker", config.devices, False), (ANSWERER, config.answer_devices, True))
            for i, device in enumerate(devices)
        ]
        self.attendance = Attendance(
            (process.name for process in processes if not process.answers),
            (process.name for process in processes if process.answers),
            min_workers=engines.min_workers,
            timeout=engines.no_worker_timeout,
            say=self._record,
            stop=self.stop,
        )
        self.supervisor = Supervisor(
            processes, limits=engines, on_end=lambda name, how: self.exchange.worker_ended(name, how), on_given_up=self.attendance.given_up
        )
        desk = Desk(config, ledger, now=lambda: self.now, workers=self.supervisor, attendance=self.attendance, say=self.note)
        self.exchange = Exchange(desk, stop=self.stop)
        self._largest = config.spec.nbytes(config.max_length)
        self._say = say
        self._store: StoreServer | None = None
        self._cleaner: Cleaner | None = None
        self._last_tick = self.now

    async def run(self) -> int:
        """Serve until the owner is gone; returns the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._broken)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.finished.set)
        loop.add_reader(sys.stdin.fileno(), self._stdin)
        try:
            server = await loop.create_server(self.exchange.connect, self.config.listen_host, self.config.listen_port)
        except OSError as error:
            self.stop(f"cannot listen on {host_port(self.config.listen_host, self.config.listen_port)} ({error.strerror})")
            return 1
        port = server.sockets[0].getsockname()[1]
        log.info("listening on %s", host_port(self.config.listen_host, port))
        self._say({"port": port, "pid": os.getpid()})
        self.attendance.logs = f"logs in {self.config.log_dir}"
        self.attendance.joins = f"more may join by main.py worker --coordinator {host_port(self.config.listen_host, port)}"
        ticking = asyncio.create_task(self._ticks())
        try:
            self.supervisor.start(Endpoint(self.config.listen_host, port, self.config.token), now=self.now)
            await self._start_store(loop)
            await self.finished.wait()
        finally:
            ticking.cancel()
            server.close()
            self.exchange.close(self.error or "", self.user)
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
            store = make_server(
                c.store,
                run=c.run,
                budget=c.budget,
                largest=self._largest,
                expected_host=c.expected_host,
                log_dir=c.log_dir,
            )
            self._store = store
            await asyncio.to_thread(store.start)
        except UserError as error:
            self.stop(str(error), error.words)
            return
        except Exception as error:
            self.stop(f"the store did not start: {error}")
            return
        log.info("store %s (%s) up after %.2f s", store.kind, store.reason, time.monotonic() - started)
        self._cleaner = Cleaner(
            store.address,
            on_deleted=lambda keys: _in_loop(loop, self.exchange.deleted, keys),
            on_error=lambda problem: _in_loop(loop, self.stop, problem),
        )
        self.exchange.store_is_up(store.address, self._cleaner)

    def note(self, line: str) -> None:
        """A line for the user."""
        if not self.finished.is_set():
            self._say({"note": line})

    def _record(self, line: str) -> None:
        """The same of what nothing else has logged."""
        log.info("%s", line)
        self.note(line)

    def stop(self, error: str, user: list[str] | None = None) -> None:
        """End the group; clients are told why. The first reason counts.

        Args:
            error: the reason, one line.
            user: the words of a ``UserError``, where it is one.
        """
        if self.error is None:
            self.error, self.user = error, user
            log.error("stopping: %s", error)
            self._say({"error": error, "user": user})
        self.finished.set()

    def _broken(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback failed. What is left of the books is not to be trusted then; troubles of a socket are its own."""
        error = context.get("exception")
        log.error("%s", context["message"], exc_info=error)
        if not isinstance(error, OSError):
            self.stop(f"the coordinator failed: {error!r}")

    def _stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            log.info("the owner closed the pipe")
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.finished.set()

    # -- the clock

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            try:
                self._tick(time.monotonic())
            except Exception as error:
                log.exception("tick failed")
                self.stop(f"the coordinator failed: {error!r}")

    def _tick(self, real: float) -> None:
        elapsed = min(real - self._last_tick, _LONGEST_TICK)
        self._last_tick = real
        self.now += elapsed
        if os.getppid() != self.config.owner:
            log.info("the owner is gone")  # its pipe may be held open by a child of its
            self.finished.set()
        if self.finished.is_set():
            return
        self.supervisor.watch(self.now, {name: view.last_beat for name, view in self.exchange.views.items()})
        self.exchange.tick(self.now, elapsed)
        if self._store is not None and self._cleaner is not None and not self._store.alive():
            self.stop(f"the {self._store.kind} store died; see {self.config.log_dir}")


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


async def _serve(config: CoordinatorConfig) -> int:
    return await Coordinator(config, say=_say).run()


def _first_line() -> bytes:
    """The first line of stdin, unbuffered: what follows is the lifeline."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return line


def main() -> None:
    """Entry of the process."""
    config = CoordinatorConfig.from_json(_first_line())
    log_dir = Path(config.log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    keep_one_before(log_dir / "coordinator.log")
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
