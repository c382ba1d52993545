"""Log files of a run: each begins empty, and what an earlier run wrote under its name is kept once."""

from __future__ import annotations

import contextlib
from pathlib import Path


def keep_one_before(log_file: Path) -> None:
    """Move what an earlier run wrote to ``NAME.before``, in place of what an even earlier one did."""
    with contextlib.suppress(OSError):
        if log_file.stat().st_size:
            log_file.replace(log_file.with_name(f"{log_file.name}.before"))
