"""Architecture and training options of a linear draft, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torchspec.errors import UserError
from torchspec.target import Target


@dataclass(frozen=True)
class LinearConfig:
    """A head [W, H] on the auxiliary hidden state of one layer; H is the target's hidden size."""

    hidden_size: int
    """H."""
    vocab_size: int
    """V, the target's."""
    draft_vocab_size: int
    """W; V where the vocabulary is not pruned."""
    aux_layers: tuple[int, ...]
    """One hidden-state index in Transformers' counting."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if len(self.aux_layers) != 1:
            raise UserError("model.aux_layers", list(self.aux_layers), "are not one layer, which is what a linear draft reads", "give one")

    def with_draft_vocabulary(self, size: int) -> LinearConfig:
        """The same draft over ``size`` tokens."""
        return replace(self, draft_vocab_size=size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {**asdict(self), "aux_layers": list(self.aux_layers)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LinearConfig:
        """Back from :meth:`to_dict`."""
        return cls(**{**plain, "aux_layers": tuple(plain["aux_layers"])})

    @classmethod
    def of(cls, target: Target, *, aux_layers: tuple[int, ...], given: Mapping[str, Any], where: str) -> LinearConfig:
        """For a target, with the fields ``eps`` of a user's file; ``where`` names that file in errors."""
        if unknown := sorted(given.keys() - {"eps"}):
            raise UserError(where, unknown, "are no fields of a linear draft", "remove them; it has eps")
        return cls(target.hidden_size, target.vocab_size, target.vocab_size, aux_layers, **given)


@dataclass(frozen=True)
class LinearOptions:
    """How it is trained: ``model.options``."""

    head_scale: float = 1.0
    """The head begins as the target's times this (``model.init: target`` and ``target_head``)."""

    def __post_init__(self) -> None:
        if not self.head_scale > 0:
            raise UserError("model.options.head_scale", self.head_scale, "must be above 0", "use 1.0 for the target's own logits")


ARCHITECTURE_FIELDS = tuple(f.name for f in fields(LinearConfig))
