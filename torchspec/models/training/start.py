"""Training that goes on from weights alone (continual training): of a checkpoint of ours, or of a published draft in any format that ``import_draft`` takes.

Architecture, aux layers and vocabulary are the source's; optimizer, schedule, position in the data and random state begin anew. A run that was cut off
goes on with ``--ckpt_path`` instead, which restores all of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from torchspec.errors import UserError
from torchspec.models.export.export import prune
from torchspec.models.export.import_draft import import_draft
from torchspec.models.families import family_named
from torchspec.models.family import Draft
from torchspec.models.training.checkpoint import is_checkpoint, read_draft_weights, read_facts
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target


@dataclass(frozen=True, eq=False)
class Start:
    """Weights to start from."""

    source: str
    family: str
    """Its name."""
    draft: Draft
    """Every trainable tensor by its name in the network; none of them once they are in it."""

    def load(self, network: nn.Module, vocabulary: VocabularyMapping | None) -> None:
        """Copy the weights into a network of the draft's architecture; one of the whole vocabulary may begin as one of a smaller ``vocabulary``.

        Raises:
            UserError: the two vocabularies contradict each other.
        """
        draft = self.draft
        if vocabulary is not None and not _same(vocabulary, draft.vocabulary):
            draft = prune(draft, vocabulary)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(draft.weights[name])

    def loaded(self) -> Start:
        """Without the weights, which are in the network now."""
        return replace(self, draft=replace(self.draft, weights={}))


def read_start(source: str, target: Target, *, family: str | None = None) -> Start:
    """Read what ``model.start_from`` names.

    Args:
        source: a ``.ckpt`` file, the folder of a sharded checkpoint, or a draft as :func:`~torchspec.models.export.import_draft.import_draft` takes it.
        target: of the run.
        family: ``model.family``; None takes the source's.

    Raises:
        UserError: nothing there, damaged, incomplete, or made for another target.
    """
    path = Path(source).expanduser()
    if not is_checkpoint(path):
        found = import_draft(source, target, family=None if family is None else family_named(family))
        assert found.family is not None
        return Start(source, family or found.family.name, found)
    facts = read_facts(path)
    if facts["target"]["fingerprint"] != target.fingerprint:
        raise UserError("model.start_from", source, f"was trained for another target ({facts['target']['path']})", "give a draft of this run's target")
    made = family_named(facts["family"], field="model.start_from (family)")
    config, weights = made.config_from_dict(facts["draft_config"]), read_draft_weights(path)
    expected = made.shapes(config)
    wrong = sorted(name for name in expected.keys() | weights.keys() if name not in expected or name not in weights or weights[name].shape != expected[name])
    if wrong:
        raise UserError("model.start_from", source, f"has missing, unknown or misshapen tensors: {', '.join(wrong)}", "use another checkpoint")
    ids = facts["draft_ids"]
    vocabulary = None if ids is None else VocabularyMapping(draft_ids=ids, target_size=config.vocab_size)
    return Start(source, facts["family"], Draft(config, weights, vocabulary, family=made))


def _same(one: VocabularyMapping, other: VocabularyMapping | None) -> bool:
    return other is not None and torch.equal(one.draft_ids, other.draft_ids)
