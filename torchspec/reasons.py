"""Why something failed, in one line, from whatever a library raised or wrote into a log.

The first line of an error is often the one that says nothing: validation errors count themselves there and name the fields below, wrappers point to "the log"
while the package that is missing stands in their cause. What is shown here is every message, the missing package by name, and what a log says last.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LAST_ERROR = re.compile(r"^(?:\([^)]*\)\s*|\[rank\d+\]:\s*)?(?:ERROR\b.*?\s)?([\w.]*(?:Error|Exception|Interrupt)\b: .*)$")
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named ['\"]([\w.]+)['\"]")
_SAYS_NOTHING = ("See root cause above", "Engine core initialization failed")
_TRACEBACK = "Traceback (most recent call last)"
_OF_PYDANTIC = ("Value error, ", "Assertion failed, ")
_BAR = re.compile(r"\d+%\|")


def reason_of(error: BaseException, *, heard: Iterable[str] = (), limit: int = 500) -> str:
    """One line that says why, without the values that a validation error repeats.

    Args:
        error: with what it was raised from.
        heard: what the library logged meanwhile (:func:`overheard`); only a missing package is looked for in it.
        limit: characters, at most.
    """
    said = _message(error)
    for cause in _causes(error):
        more = _message(cause)
        if more not in said:
            said = f"{said}; caused by {more}"
    missing = missing_package(error, heard=heard)
    if missing is not None:
        there = importlib.util.find_spec(missing.partition(".")[0]) is not None
        lacks = f"the module {missing} does not exist here" if there else f"the package {missing} is not installed"
        said = lacks if said == f"No module named '{missing}'" else f"{lacks}: {said}"
    return said if len(said) <= limit else said[: limit - 3] + "..."


def missing_package(error: BaseException, *, heard: Iterable[str] = ()) -> str | None:
    """The module that could not be imported, where that is behind an error; of a package that is not there at all its name alone.

    Args:
        error, heard: as of :func:`reason_of`.
    """
    name: str | None = None
    for one in _all_behind(error):
        if isinstance(one, ModuleNotFoundError) and one.name:
            name = one.name
        elif found := _NO_MODULE.findall(str(one)):
            name = found[-1]
    if name is None:
        name = next((found[-1] for text in heard if (found := _NO_MODULE.findall(text))), None)
    top = name.partition(".")[0] if name is not None else None
    return name if top is None or importlib.util.find_spec(top) is not None else top


def last_error_in(lines: Iterable[str]) -> str | None:
    """The last line of a log that names an error, without what a logger put before it; one that only points to another is passed over where there is one."""
    named = [match.group(1) for line in lines if (match := _LAST_ERROR.match(line.strip()))]
    telling = [line for line in named if not says_nothing(line)]
    return (telling or named or [None])[-1]


def says_nothing(reason: str) -> bool:
    """Whether this only points to another error, in a log."""
    return any(words in reason for words in _SAYS_NOTHING)


def without_bars(text: str) -> list[str]:
    """Lines of a log that hold words: no progress bars, and of a line that was written over only its last state."""
    lines = (line.rsplit("\r", 1)[-1].strip() for line in text.replace("\r\n", "\n").split("\n"))
    return [line for line in lines if line and not _BAR.search(line)]


@contextmanager
def overheard(package: str) -> Iterator[list[str]]:
    """What a library logs as an error while this is open, with tracebacks: some say why there, and raise something else.

    Records are seen as they are made, since a library that sets its logging up meanwhile (vLLM does) throws away handlers that were added before.

    Args:
        package: its name, with which those of its loggers begin.
    """
    heard: list[str] = []
    make = logging.getLogRecordFactory()

    def listen(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.ERROR and record.name.partition(".")[0] == package:
            heard.append(logging.Formatter().format(copy.copy(record)))
        return record

    logging.setLogRecordFactory(listen)
    try:
        yield heard
    finally:
        logging.setLogRecordFactory(make)


def validation_errors(error: BaseException) -> list[dict[str, Any]]:
    """The single errors of one of pydantic's, each with ``loc`` and ``msg``; none for any other error (pydantic itself is not imported)."""
    errors = getattr(error, "errors", None)
    if not callable(errors) or not isinstance(getattr(error, "title", None), str):
        return []
    return [dict(one) for one in errors()]


def _message(error: BaseException) -> str:
    """What one error says, without its causes."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(_message(part) for part in error.exceptions))
    if single := validation_errors(error):
        return "; ".join(dict.fromkeys(map(_validation_message, single)))
    text = str(error)
    if _TRACEBACK in text and (last := last_error_in(text.splitlines())):
        return " ".join(last.split())
    words = " ".join(text.split())
    kind = type(error).__name__
    return f"{kind}: {words}" if words and isinstance(error, KeyError | AssertionError) else words or kind


def _validation_message(single: dict[str, Any]) -> str:
    message = " ".join(str(single.get("msg", "")).split())
    for prefix in _OF_PYDANTIC:
        message = message.removeprefix(prefix)
    where = ".".join(map(str, single.get("loc", ())))
    return f"{where}: {message}" if where else message


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error was explicitly raised from, and so on."""
    seen = {id(error)}
    while (cause := error.__cause__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        error = cause


def _all_behind(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and what a validation error or a group holds."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [before for before in (one.__cause__, None if one.__suppress_context__ else one.__context__) if before is not None]
        waiting += [inner for single in validation_errors(one) if isinstance(inner := (single.get("ctx") or {}).get("error"), BaseException)]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else []
