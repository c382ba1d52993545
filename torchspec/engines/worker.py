"""One engine worker: ``python -m torchspec.engines.worker``, or ``main.py worker`` by hand.

It connects, builds the engine that the coordinator names, says ready, and from then on asks for work whenever it has room. A thread of its
own sends a heartbeat a second. It ends when the connection does; started by a coordinator it also dies with it (parent-death signal).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import NoReturn

import torchspec
from torchspec.engines.connection import SILENCE, BadFrame, Closed, Connection
from torchspec.engines.engine import Engine, Job, TakesDrafts
from torchspec.engines.group_config import WorkerConfig
from torchspec.engines.handshake import SECRET_VARIABLE, Over, Refused, greet
from torchspec.engines.messages import (
    Answered,
    Beat,
    Cancel,
    Failed,
    Finished,
    Leave,
    NewDraft,
    Pull,
    Ready,
    Report,
    Stop,
    ToWorker,
    Unfit,
    Welcome,
    Work,
)
from torchspec.engines.parent_death import die_with
from torchspec.engines.table import ENGINES, EngineKind
from torchspec.errors import UserError
from torchspec.imports import heavy_imports
from torchspec.named import find_named
from torchspec.network import host_port, split_host_port
from torchspec.transfer.spec import RecordSpec

log = logging.getLogger("torchspec.worker")

_POLL = 0.25


def build(kind: EngineKind, job: Job) -> Engine:
    """The engine of a kind that has workers."""
    assert kind.worker is not None
    module, _, name = kind.worker.partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(job)
    return engine


def work(host: str, port: int, *, token: str, name: str, device: str, secret: str = "") -> None:
    """Serve a coordinator until it ends.

    Args:
        host, port: where it listens.
        token: of the run.
        name: by which logs call it.
        device: torch device, cpu or cuda:0.
        secret: of a worker that the coordinator started (``handshake.SECRET_VARIABLE``); "" by hand.

    Raises:
        UserError: refused, of another version, or the engine cannot be built (then the run's user is told as well).
        Closed: the coordinator is gone.
    """
    connection = Connection((host, port), ToWorker, silence=SILENCE)
    where = host_port(host, port)
    try:
        welcome = greet(connection, token=token, role="worker", name=name, secret=secret)
        try:
            kind, job = _told(welcome, device=device)
            _serve_run(connection, job, kind)
        except UserError as error:
            _tell(connection, error)
            raise
        except ToldToEnd:
            log.info("told to end: what this worker holds goes to others")
            with contextlib.suppress(Closed):
                connection.send(Leave())
        except Closed:
            if not _was_stopped(connection):
                raise
    except Over:
        log.info("the run has ended")
    except Refused as error:
        raise UserError("coordinator", where, str(error), "check address, token and version, and look at its log") from error
    except TurnedDown as error:
        fix = "give this host the target, the types and the versions of the run"
        raise UserError("coordinator", where, f"refused this worker: it {error}", fix) from error
    except BadFrame as error:
        raise UserError("coordinator", where, f"does not speak as a coordinator of this version ({error})", "install the same version everywhere") from error
    finally:
        connection.close()


class ToldToEnd(BaseException):
    """SIGTERM came: a node is given back, say."""


class TurnedDown(Exception):
    """The run goes on without this worker; the message says what it would do wrong."""


def _told(welcome: Welcome, *, device: str) -> tuple[EngineKind, Job]:
    """Which engine to build, and from what.

    Raises:
        UserError: the run is of another version of this program.
    """
    theirs = welcome.job.get("version")
    if theirs != torchspec.__version__:
        raise UserError("torchspec", torchspec.__version__, f"is another version than the run's ({theirs})", "install the same version on every host")
    try:
        told = WorkerConfig.from_dict(welcome.job)
        spec = RecordSpec.from_dict(welcome.spec)
    except (ValueError, TypeError, KeyError) as error:  # an unknown or a missing option
        problem = f"does not know all that this run asks for ({error})"
        raise UserError("torchspec", torchspec.__version__, problem, "install the same commit on every host") from error
    kind = find_named(told.engine, ENGINES, EngineKind, field="data.engine")
    job = Job(
        target=told.target,
        spec=spec,
        store=welcome.store,
        config=told.engines,
        max_length=told.max_length,
        device=device,
        on_policy=told.on_policy,
        images=told.images,
    )
    return kind, job


def _serve_run(connection: Connection, job: Job, kind: EngineKind) -> None:
    """Build the engine, say that it is ready, and work until the run ends."""
    faulthandler.enable()  # what crashes below Python leaves the threads' stacks in the worker's log
    with heavy_imports():
        engine = build(kind, job)
    stopped = threading.Event()
    try:
        started = time.monotonic()
        info = engine.start()
        log.info("engine up after %.1f s: %s", time.monotonic() - started, info)
        answers = isinstance(engine, TakesDrafts)
        spec = {} if answers else engine.spec.to_dict()
        info = {**info, "host": socket.gethostname(), "pid": os.getpid()}
        connection.send(Ready(spec=spec, info=info, max_tokens=engine.max_tokens, answers=answers))
        threading.Thread(target=_beat, args=(connection, engine, stopped), name="heartbeat", daemon=True).start()
        _loop(connection, engine)
    finally:
        stopped.set()
        engine.close()


def _tell(connection: Connection, error: UserError) -> None:
    """Let the coordinator know why this worker ends, so that the user of the run does."""
    with contextlib.suppress(Closed):
        connection.send(Unfit(words=error.words))


def _was_stopped(connection: Connection) -> bool:
    """Whether the coordinator said that the run is over before it closed the connection: while the engine loaded, nobody listened.

    Raises:
        TurnedDown: as of :func:`_stop`.
    """
    try:
        while (message := connection.receive(0.2)) is not None:
            if isinstance(message, Stop):
                _stop(message)
                return True
    except Closed:
        pass
    return False


def _stop(message: Stop) -> None:
    """The coordinator ends this worker.

    Raises:
        TurnedDown: it alone; the run goes on.
    """
    if message.refused:
        raise TurnedDown(message.error)
    log.info("the coordinator ended the run%s", f": {message.error}" if message.error else "")


def _beat(connection: Connection, engine: Engine, stopped: threading.Event) -> None:
    while not stopped.is_set():
        stats = engine.stats()
        try:
            connection.send(Beat(**asdict(stats)))
        except Closed:
            return
        stopped.wait(1.0)


def _loop(connection: Connection, engine: Engine) -> None:
    """Pull while there is room, work, report."""
    held = 0
    asked: tuple[int, int] | None = None
    draft: NewDraft | None = None
    while True:
        samples, tokens = engine.room()
        if samples > 0 and tokens > 0 and asked != (samples, tokens):
            connection.send(Pull(samples=samples, tokens=tokens))
            asked = (samples, tokens)
        message = connection.receive(0.0 if held else _POLL)
        while message is not None:
            if isinstance(message, Stop):
                _stop(message)
                return
            if isinstance(message, Work):
                engine.submit(message.leases)
                held += len(message.leases)
                asked = None
            elif isinstance(message, NewDraft):
                assert isinstance(engine, TakesDrafts), "only engines that take drafts are told of them"
                draft = message  # of several the newest: those before it may be gone from the disk
            elif isinstance(message, Cancel):
                dropped = engine.cancel(message.leases)
                held -= len(dropped)
                if dropped:
                    connection.send(Report(finished=[], failed=[Failed(lease, "cancelled") for lease in dropped]))
            message = connection.receive(0.0)
        if draft is not None and isinstance(engine, TakesDrafts) and engine.take_draft(draft.path, draft.step, draft.speculative):
            draft = asked = None
        if held:
            done, failed = engine.poll(_POLL)
            held -= len(done) + len(failed)
            if done or failed:
                finished = [d for d in done if isinstance(d, Finished)]
                answered = [d for d in done if isinstance(d, Answered)]
                connection.send(Report(finished=finished, failed=list(failed), answered=answered))
                asked = None


def main(argv: list[str] | None = None) -> None:
    """Entry of the process."""
    if parent := os.environ.get("TORCHSPEC_PARENT"):
        die_with(int(parent))
    parser = argparse.ArgumentParser(prog="torchspec.engines.worker", allow_abbrev=False)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT")
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    secret = os.environ.pop(SECRET_VARIABLE, "")  # of this process, not of those that it starts
    serve(args.coordinator, token=os.environ.get("TORCHSPEC_TOKEN", ""), name=args.name, device=args.device, secret=secret)


def _told_to_end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise ToldToEnd


def serve(coordinator: str, *, token: str, name: str, device: str, secret: str = "") -> NoReturn:
    """:func:`work`, and then the end of this process: 0 after a run's end or SIGTERM, 2 for what a user can mend, 1 for anything else.

    No engine's atexit may hold the process, and a thread that is still inside torch when the interpreter says good-bye aborts it (Python below 3.14).

    Args:
        coordinator: HOST:PORT.
        token, name, device, secret: as of :func:`work`.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    code = 0
    if not secret:  # those of ours are the coordinator's to end
        signal.signal(signal.SIGTERM, _told_to_end)
    try:
        host, port = split_host_port(coordinator, field="coordinator")
        work(host, port, token=token, name=name, device=device, secret=secret)
    except Closed as error:
        log.error("%s", UserError("coordinator", coordinator, f"is gone ({error})", "start the run first, then its workers"))
        code = 2
    except UserError as error:
        log.error("%s", error)
        code = 2
    except ToldToEnd:  # before it was let in
        log.info("told to end")
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
