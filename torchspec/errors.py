"""The error a user can cause, in one shape: which field, which value, and what to do about it.

The command line prints it as one line and exits with 2. Invariants of our own code use ``assert``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class Shown:
    """Stands for a value that itself stays where it is (another process, say)."""

    text: str
    """What ``repr`` showed of it."""

    def __repr__(self) -> str:
        return self.text


class UserError(ValueError):
    """Something that the user can mend.

    Example:
        >>> raise UserError("data.max_length", 9000, "is longer than data.max_tokens=8192", "lower it or raise data.max_tokens")

    Args:
        field: the config key, file or flag at fault, as the user typed it.
        value: what it held; shown with ``repr``, cut at 200 characters.
        problem: a clause that completes "<field>=<value> ...".
        fix: an imperative clause.
    """

    def __init__(self, field: str, value: Any, problem: str, fix: str) -> None:
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{field}={shown} {problem}. Fix: {fix}.")
        self.field = field
        self.value = value
        self.problem = problem
        self.fix = fix
        self.shown = shown

    @property
    def words(self) -> list[str]:
        """Field, value as it is shown, problem and fix: what crosses a wire."""
        return [self.field, self.shown, self.problem, self.fix]

    @classmethod
    def of(cls, words: Sequence[str]) -> UserError:
        """The error again of its :attr:`words`."""
        field, shown, problem, fix = words
        return cls(field, Shown(shown), problem, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its four parts (``Exception`` would call with the message alone). A value that another process may not know goes as it is shown."""
        return type(self), (self.field, self.value if _plain(self.value) else Shown(self.shown), self.problem, self.fix)


def _plain(value: Any) -> bool:
    """Whether any process can unpickle it."""
    if isinstance(value, dict):
        return type(value) is dict and all(_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes)


class GroupStopped(Exception):
    """The engine group ended while it was needed; the message, one line, says why."""


class DeviceLost(Exception):
    """The device failed for good; the message, one line, says why and what is left. The process can only end."""
