"""What vLLM refuses, as an error of the user's: the argument or the target, and vLLM's whole reason rather than its first line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchspec.errors import UserError
from torchspec.reasons import missing_package, overheard, reason_of, validation_errors

log = logging.getLogger(__name__)
_REFUSES = (TypeError, ValueError, ImportError, OSError, RuntimeError, AssertionError, LookupError, AttributeError)
"""What vLLM raises of a configuration or a target that it does not take."""


@contextmanager
def refusals(given: Mapping[str, Any], *, field: str, engine: tuple[str, Any] = ("data.engine", "vllm")) -> Iterator[None]:
    """Turn what vLLM raises inside into a :class:`UserError`.

    Args:
        given: arguments that the user set: of these the one at fault is named, where vLLM says which.
        field: how the user calls them.
        engine: name and value of what chose vLLM: at fault where none of the arguments is.

    Raises:
        UserError: vLLM refused.
    """
    with overheard("vllm") as heard:
        try:
            yield
        except UserError:
            raise
        except _REFUSES as error:
            log.info("vLLM refused", exc_info=True)
            raise _refused(error, given, field=field, engine=engine, heard=heard) from error


def _refused(error: BaseException, given: Mapping[str, Any], *, field: str, engine: tuple[str, Any], heard: list[str]) -> UserError:
    reason = reason_of(error, heard=heard)
    package = missing_package(error, heard=heard)
    if package is not None:
        return UserError(*engine, f"does not take this target ({reason})", f"install {package} beside vLLM, or set {engine[0]} to transformers")
    named = {str(part) for single in validation_errors(error) for part in single.get("loc", ())}
    at_fault = next((name for name in given if name in named), None) or next((name for name in given if _speaks_of(reason, name, given[name])), None)
    if at_fault is not None:
        return UserError(f"{field}.{at_fault}", given[at_fault], f"is refused by vLLM ({reason})", "check name and value in vLLM's documentation")
    if given:
        return UserError(field, dict(given), f"are refused by vLLM, or the target is ({reason})", "check them, and the target, in vLLM's documentation")
    return UserError(*engine, f"does not take this target ({reason})", f"set {engine[0]} to transformers, or take a vLLM that serves it")


def _speaks_of(reason: str, name: str, value: Any) -> bool:
    """Whether a reason holds an argument's name, or the text that it was given."""
    words = [name, value] if isinstance(value, str) and len(value) > 2 else [name]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reason) for word in words)
