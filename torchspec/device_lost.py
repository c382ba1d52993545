"""Whether an error says that the device is gone: after such a one every further call on it fails too, so that nothing can be saved, moved or
waited for any more. Running out of memory is none of these."""

from __future__ import annotations

_GONE = (
    "unspecified launch failure",
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "illegal address",
    "device-side assert",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "invalid address space",
    "uncorrectable ECC error",
    "unknown error",
    "EXECUTION_FAILED",
)
"""Words of CUDA's errors that outlive the call, and of what cuBLAS and cuDNN make of them."""


def device_failure(error: BaseException) -> str | None:
    """The line of the first error behind ``error`` that says so, or None."""
    found: str | None = None
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        line = (str(here).splitlines() or [""])[0].strip()
        if isinstance(here, RuntimeError) and any(words in line for words in _GONE):
            found = line
        here = here.__cause__ or here.__context__
    return found
