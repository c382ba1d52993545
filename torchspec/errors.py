"""The error a user can cause, in one shape: which field, which value, and what to do about it.

The command line prints it as one line and exits with 2. Invariants of our own code use ``assert``.
"""

from __future__ import annotations

from typing import Any


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


class GroupStopped(Exception):
    """The engine group ended while it was needed; the message, one line, says why."""
