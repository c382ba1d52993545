"""Which workers are there, what is said of it, and when too few are left to go on. No socket, no process, no clock of its own (time is an argument).

Two kinds of workers are counted apart: those that capture, and (on-policy) those that only answer. A worker of ours that cannot serve is *given up*: it is not
started again. A run that started workers itself ends when those that are not given up and those that others started are fewer than ``min_workers``. Without one
alive, training waits; that is said, and goes on until another joins or ``no_worker_timeout`` is over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

_FIRST_WORD = 10.0
_LOADING = 30.0
_EVERY = 60.0
"""Seconds without enough workers until that is said, the same where some of ours are loading (most targets take longer than ten), and until it is
said again."""


class Say(Protocol):
    """Takes a line for the user."""

    def __call__(self, line: str, /) -> object: ...


class Stop(Protocol):
    """Ends the group; ``user`` are the words of a ``UserError`` where the user can mend the reason."""

    def __call__(self, error: str, user: list[str] | None = None, /) -> object: ...


class Attendance:
    """See the module.

    Args:
        ours: names of the workers that this run starts.
        answering: of those of ours that only answer.
        min_workers: ``data.engines.min_workers``.
        timeout: ``data.engines.no_worker_timeout``.
        say, stop: see there.
    """

    def __init__(self, ours: Iterable[str], answering: Iterable[str], *, min_workers: int, timeout: float | None, say: Say, stop: Stop) -> None:
        self.logs = self.joins = ""
        """Where those of ours that are starting say how far they are; how others join."""
        self._capture = _Kind("worker", ours, least=min_workers, field="data.engines.min_workers", timeout=timeout, say=say, stop=stop)
        self._answer = _Kind("answering worker", answering, least=1, field="", timeout=None, say=say, stop=stop)

    def joined(self, name: str, host: str) -> None:
        """A worker is ready."""
        self._of(name).joined(name, host)

    def left(self, name: str, why: str) -> None:
        """A worker is there no more, if it was."""
        self._of(name).left(name, why)

    def given_up(self, name: str, reason: str, user: list[str] | None) -> None:
        """A worker of ours will not be started again.

        Args:
            name: of the worker; it has left.
            reason: one line.
            user: the same as words of a ``UserError``, where it is one.
        """
        self._of(name).given_up(name, reason, user)

    def tick(self, elapsed: float) -> None:
        """So many seconds have gone by."""
        self._capture.tick(elapsed, logs=self.logs, otherwise=self.joins)
        if self._answer.started:
            self._answer.tick(elapsed, logs=self.logs, otherwise=self.logs)

    def _of(self, name: str) -> _Kind:
        return self._answer if name in self._answer.started else self._capture


class _Kind:
    """Workers of one kind."""

    def __init__(self, what: str, ours: Iterable[str], *, least: int, field: str, timeout: float | None, say: Say, stop: Stop) -> None:
        self.started = frozenset(ours)
        self._ours = set(self.started)  # not given up
        self._alive: dict[str, str] = {}  # host by name
        self._what = what
        self._least = least
        self._field = field
        self._timeout = timeout
        self._say = say
        self._stop = stop
        self._below_s = 0.0
        self._alone_s = 0.0  # of these, with none of ours that is starting
        self._next_word = _FIRST_WORD

    def joined(self, name: str, host: str) -> None:
        self._alive[name] = host
        self._say(f"{self._what} {name} joined (host {host}): {self._count} alive")

    def left(self, name: str, why: str) -> None:
        host = self._alive.pop(name, None)
        if host is not None:
            self._say(f"{self._what} {name} left (host {host}, {why}): {self._count} alive")
            self._end_if_too_few(f"{name} left ({why})", None)

    def given_up(self, name: str, reason: str, user: list[str] | None) -> None:
        self._ours.discard(name)
        if not self._end_if_too_few(reason, user):
            self._say(f"{self._what} {name} is not started again, {self._left} of {len(self.started)} are left: {reason}")

    def tick(self, elapsed: float, *, logs: str, otherwise: str) -> None:
        if self._count >= max(self._least, 1):
            self._below_s, self._alone_s, self._next_word = 0.0, 0.0, _FIRST_WORD
            return
        starting = sum(name not in self._alive for name in self._ours)
        self._below_s += elapsed
        self._alone_s += 0.0 if starting else elapsed
        if self._timeout is not None and self._alone_s >= self._timeout:
            self._stop(f"{self._state(self._alone_s)}, which is data.engines.no_worker_timeout")
        elif self._below_s >= max(self._next_word, _LOADING if starting else 0.0):
            self._next_word = _EVERY * (self._next_word // _EVERY + 1)
            if starting and not self._count:
                plural = "s" if starting > 1 else ""
                self._say(f"waiting for {starting} {self._what}{plural} to load the target, {self._below_s:.0f} s so far: {logs}")
            else:
                self._say(f"{self._state(self._below_s)}: " + (f"{starting} starting, {logs}" if starting else otherwise))

    @property
    def _count(self) -> int:
        return len(self._alive)

    @property
    def _left(self) -> int:
        """Workers that are there or may still be."""
        return len(self._ours | self._alive.keys())

    def _state(self, seconds: float) -> str:
        if not self._count:
            return f"no {self._what} alive for {seconds:.0f} s"
        return f"only {self._count} {self._what}{'s' * (self._count > 1)} alive for {seconds:.0f} s ({self._field} is {self._least})"

    def _end_if_too_few(self, reason: str, user: list[str] | None) -> bool:
        if not self.started or self._left >= self._least:
            return False
        if len(self.started) > 1 and user is None:
            counted = f"{self._left} of {len(self.started)} {self._what}s are left" + (f", {self._field} is {self._least}" if self._field else "")
            reason = f"{counted}; the last: {reason}"
        self._stop(reason, user)
        return True
