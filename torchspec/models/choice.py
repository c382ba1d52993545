"""What a run's configuration says of its draft: family, architecture, aux layers and the weights to start from, by one rule for training and extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchspec.errors import UserError
from torchspec.models.families import DraftFile, chosen, family_named
from torchspec.models.family import Architecture, Family
from torchspec.models.training.start import Start, read_start
from torchspec.target import Target


@dataclass(frozen=True, eq=False)
class Choice:
    """The draft of a run."""

    name: str
    """Of its family, as it was typed."""
    family: Family
    config: Architecture
    """Before a callback prunes the vocabulary."""
    start: Start | None

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Hidden-state indices fed to it."""
        return self.config.aux_layers


def choose(target: Target, *, family: str | None, draft: str | None, start_from: str | None, aux_layers: Sequence[int] | None) -> Choice:
    """The draft that these options of ``model`` mean.

    Args:
        target: the frozen model.
        family: ``model.family``.
        draft: ``model.draft``, a file.
        start_from: ``model.start_from``.
        aux_layers: ``model.aux_layers``.

    Raises:
        UserError: they contradict each other or the target, or name what is not there.
    """
    given = None if aux_layers is None else target.aux_layers(list(aux_layers))
    if start_from is not None:
        if draft is not None:
            raise UserError("model.draft", draft, f"would change the architecture of model.start_from={start_from}", "give one of the two")
        start = read_start(start_from, target, family=family)
        name = chosen(family=family, draft=DraftFile.read(None), started=start.family)
        config = start.draft.config
        if given is not None and config.aux_layers != given:
            raise UserError("model.aux_layers", list(given), f"are not those of {start_from}", f"set model.aux_layers to {list(config.aux_layers)}")
        return Choice(name, family_named(name), config, start)
    file = DraftFile.read(draft)
    name = chosen(family=family, draft=file)
    made = family_named(name)
    layers = made.aux_layers(target) if given is None else given
    return Choice(name, made, made.config(target, aux_layers=layers, given=file.given, where=file.where), None)
