"""Tensors in which something is NaN or infinite, found without waiting more than once, and named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SHOWN = 3


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors in which something is NaN or infinite; of a sharded one this rank's part is looked at. Waits for the device once."""
    names, flags = [], []
    for name, tensor in tensors:
        part = getattr(tensor, "_local_tensor", tensor)
        if part.is_floating_point() and part.numel():
            names.append(name)
            flags.append(torch.isfinite(part.detach().float() if part.element_size() == 1 else part.detach()).all())
    if not names:
        return []
    sound = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, good in zip(names, sound, strict=True) if not good]


def named(names: Sequence[str]) -> str:
    """``NaN or infinity in a, b, c and 5 more``."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"NaN or infinity in {', '.join(names[:_SHOWN])}{more}"


def no_longer_numbers(names: Sequence[str], *, what: str = "weights") -> str:
    """The clause for an error."""
    return f"{what} are no longer numbers ({named(names)})"
