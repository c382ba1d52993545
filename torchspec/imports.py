"""Imports of Lightning, Transformers and vLLM without Python's garbage collector.

They make half a million objects that stay, which the collector would walk again and again: a tenth of the seconds that a process takes to start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """No collection inside the block; afterwards the collector is as it was."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
