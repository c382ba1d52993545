"""Clipping by norm without a pass of its own over the gradients.

Torch's fused Adam divides every gradient by ``optimizer.grad_scale``, a number on the device, while it reads it, and writes the quotient back: so it takes
the factor that ``clip_grad_norm_`` would have multiplied all gradients by before (for a draft of 0.4 billion parameters, 3 GB read and written).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_ours: WeakKeyDictionary[Optimizer, Tensor] = WeakKeyDictionary()
"""The factor last given to each optimizer."""


def clip(optimizer: Optimizer, max_norm: float) -> Tensor | None:
    """Have the next step of a fused Adam or AdamW clip the norm of all gradients.

    Args:
        optimizer: about to step. A factor that is left from a step that failed is replaced.
        max_norm: longest norm allowed.

    Returns:
        The norm before, a scalar; None where nothing was done: another optimizer, sharded gradients, or somebody else's ``grad_scale``.
    """
    if type(optimizer) not in (Adam, AdamW) or not all(group["fused"] for group in optimizer.param_groups):
        return None
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients or any(type(gradient) is not Tensor for gradient in gradients):
        return None
    left = getattr(optimizer, "grad_scale", None)
    if left is not None and left is not _ours.get(optimizer):
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    if optimizer not in _ours:
        optimizer.register_step_post_hook(_forget)
    optimizer.grad_scale = _ours[optimizer] = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
    return norm


def _forget(optimizer: Optimizer, *_: Any) -> None:
    """After a step."""
    if getattr(optimizer, "grad_scale", None) is _ours.get(optimizer):
        optimizer.__dict__.pop("grad_scale", None)
