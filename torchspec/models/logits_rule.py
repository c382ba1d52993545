"""What a target's class does to logits behind its output head: asked, not looked up.

Classes multiply by ``logit_scale``, divide by ``logits_scaling`` (Granite) or multiply by it (HyperCLOVA X), have
multipliers on the hidden state (MiniCPM) or on the logits (Falcon-H1), and cap with tanh under three names; some leave
out what their configuration says. So the class's own forward is run with its decoder and head replaced by ones whose
outputs are known, which costs nothing at any size, and the rule y = cap * tanh(scale * x / cap) is read off what it
gives back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.errors import UserError

_POWERS = 20
"""Logits from 2^-20 to 2^20 of both signs are put in."""


@dataclass(frozen=True)
class LogitsRule:
    """Logits become cap * tanh(scale * x / cap), or scale * x where there is no cap."""

    scale: float = 1.0
    soft_cap: float | None = None

    def of(self, x: Tensor) -> Tensor:
        """[...] logits of what the head gives."""
        return x * self.scale if self.soft_cap is None else self.soft_cap * torch.tanh(x * self.scale / self.soft_cap)


class _Said:
    """What a decoder returns: the normed state, and nothing under every other name."""

    def __init__(self, state: Tensor) -> None:
        self.last_hidden_state = state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None if isinstance(index, int) else ()


class _Ramp(nn.Module):
    """A head whose logits are the first entry of the state times known values."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values
        self.weight = values[:, None]
        self.bias = None

    def forward(self, state: Tensor) -> Tensor:
        return state[..., :1] * self.values


def logits_rule(model: nn.Module, *, head_name: str, width: int, rows: int) -> LogitsRule:
    """Ask a model's class. The model is not usable afterwards.

    Args:
        model: on the meta device.
        head_name: of its output head.
        width: D.
        rows: V.

    Raises:
        UserError: its forward cannot be run so, or does something else with logits (Chameleon bars the ids of images).
    """
    from transformers import PreTrainedModel

    powers = 2.0 ** torch.arange(-_POWERS, _POWERS + 1, dtype=torch.float64)
    ramp = torch.cat([powers, -powers])
    ramp = ramp.repeat(-(-rows // ramp.numel()))[:rows] if rows > ramp.numel() else ramp
    parent, _, short = head_name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, short, _Ramp(ramp))
    said = _Said(torch.ones(1, 1, width, dtype=torch.float64))
    for child in model.modules():
        if isinstance(child, PreTrainedModel) and child is not model:
            child.forward = lambda *args, **kwargs: said  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            found = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].double()
    except Exception as error:  # whatever a class does with what it is given
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "data.target.path", type(model).__name__, f"makes its logits in a way that cannot be followed ({reason[:120]})", "report this architecture"
        ) from error
    return _read_off(found, ramp, type(model).__name__)


def _read_off(found: Tensor, ramp: Tensor, name: str) -> LogitsRule:
    small, large = float(ramp.abs().argmin()), float(ramp.abs().argmax())
    scale = float(found[int(small)] / ramp[int(small)])
    most = abs(float(found[int(large)]))
    capped = scale != 0.0 and most < 0.5 * abs(scale) * float(ramp.abs().max())
    rule = LogitsRule(_plain(scale), _plain(most) if capped else None)
    expected = rule.of(ramp)
    if scale == 0.0 or found.shape != ramp.shape or not torch.allclose(found, expected, rtol=1e-5, atol=1e-9):
        raise UserError("data.target.path", name, "does something to its logits that is no scale and no soft cap", "choose a target of another architecture")
    return rule


def _plain(value: float) -> float:
    """The number without the rounding of a class that computes in fp32."""
    return float(f"{value:.7g}")
