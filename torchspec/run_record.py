"""The record that a run keeps of itself (config.yaml, provenance.json, pipeline.json, ...): plain values, and never the
end of the run.

A configuration may hold what YAML and JSON have no form for: an enum default of somebody's callback, a device, a
duration, an object given in Python. It is written as text, in the form that the command line reads back where there is
one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """A value as mappings, lists, numbers, truth values, None and text alone.

    Example:
        >>> plain({"after": timedelta(minutes=5), "sizes": (1, 2)})
        {'after': '0:05:00', 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(plain(key)) if not isinstance(key, int) else key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, Enum):
        return plain(value.value) if isinstance(value, str) else value.name  # the command line reads other enums by name
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (bool, int, float, str):  # a subclass of one of them
        if isinstance(value, kind):
            return kind(value)
    return _text(value)


def _text(value: Any) -> str:
    """As the command line would read it: a path, a device, a duration, the import path of a function or class.

    Of any other object the name of its class: its ``repr`` may hold an address, or fail.
    """
    of_torch = type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype")
    if isinstance(value, Path | timedelta) or of_torch:
        return str(value)
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def config_text(parser: Any, config: Any) -> str:
    """A run's whole configuration, defaults included, as YAML.

    Args:
        parser: of jsonargparse, that read it.
        config: its namespace.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where it cannot write a value jsonargparse warns, and writes a remark in its place
        try:
            return str(parser.dump(config, skip_none=False))
        except Exception:  # whatever the value's own code or YAML makes of it
            pass
    import yaml

    values = config.clone().as_dict()
    values.pop("config", None)  # the files that it was read from, as in the form above
    return yaml.safe_dump(plain(values), sort_keys=False)


@contextmanager
def or_without(path: Path) -> Iterator[None]:
    """Around the writing of a file that says something of the run: a disk that refuses it is told of, and the run goes
    on."""
    try:
        yield
    except OSError as error:
        log.warning("%s is not written (%s): the run goes on without it", path, error.strerror or error)
