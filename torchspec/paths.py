"""``~`` in what a user types: the home folder, wherever a path may stand.

A shell expands it at the beginning of a word alone, so ``--output=~/draft``, a YAML file and JSON in an argument bring it to us as it is. Every value of every
command goes through :func:`expand_all` once it is parsed, so no option can be forgotten; what is built from Python expands its own with :func:`home`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", str, Path)
R = TypeVar("R")
_WORDS = ("template_args", "chat_template_kwargs")
"""Sections whose texts are no paths: they go into a prompt as they are."""


def home(path: T) -> T:
    """A path with ``~`` or ``~name`` at its beginning replaced by that home folder."""
    return type(path)(os.path.expanduser(path))


def at_home(function: Callable[..., R]) -> Callable[..., R]:
    """A command whose arguments go through :func:`expand_all`."""

    @wraps(function)
    def called(*args: Any, **options: Any) -> R:
        return function(*args, **expand_all(options))

    return called


def expand_all(value: Any) -> Any:
    """Plain values, and namespaces of a parser, with :func:`home` on every text in them that begins with ``~``, names of a table included."""
    if isinstance(value, Path):
        return home(value)
    if isinstance(value, str):
        return home(value) if _begins_at_home(value) else value
    if isinstance(value, dict):
        return {_name(name): entry if name in _WORDS else expand_all(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(expand_all(entry) for entry in value)
    if hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        for name, entry in vars(value).items():
            if name not in _WORDS:
                setattr(value, name, expand_all(entry))
    return value


def _begins_at_home(text: str) -> bool:
    return text.startswith("~") and "\n" not in text and (text == "~" or "/" in text)


def _name(name: Any) -> Any:
    return home(name) if isinstance(name, str) and _begins_at_home(name) else name
