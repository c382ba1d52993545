"""Training that goes on from weights alone (continual training): of a checkpoint of ours, or of a published draft in any format that ``import_draft`` takes.

Architecture, aux layers and vocabulary are the source's; optimizer, schedule, position in the data and random state begin anew. A run that was cut off
goes on with ``--ckpt_path`` instead, which restores all of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.export.export import prune
from torchspec.models.export.import_draft import complete, import_draft
from torchspec.models.training.checkpoint import is_checkpoint, read_draft_weights, read_facts
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target


@dataclass(frozen=True, eq=False)
class Start:
    """Weights to start from."""

    source: str
    config: DraftConfig
    weights: dict[str, Tensor]
    """Every trainable tensor by its name in ``Eagle3Draft``."""
    vocabulary: VocabularyMapping | None
    """None for the whole vocabulary."""

    def load(self, draft: Eagle3Draft, vocabulary: VocabularyMapping | None) -> None:
        """Copy the weights into a draft of :attr:`config`; a draft of the whole vocabulary may begin as one of a smaller ``vocabulary``.

        Raises:
            UserError: the two vocabularies contradict each other.
        """
        weights = self.weights
        if vocabulary is not None and not _same(vocabulary, self.vocabulary):
            _, weights, _ = prune(self.config, weights, self.vocabulary, vocabulary)
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                parameter.copy_(weights[name])


def read_start(source: str, target: Target) -> Start:
    """Read what ``model.start_from`` names.

    Args:
        source: a ``.ckpt`` file, the folder of a sharded checkpoint, or a draft as :func:`~torchspec.models.export.import_draft.import_draft` takes it.
        target: of the run.

    Raises:
        UserError: nothing there, damaged, incomplete, or made for another target.
    """
    path = Path(source).expanduser()
    if not is_checkpoint(path):
        draft = import_draft(source, target)
        return Start(source, draft.config, complete(draft, target), draft.vocabulary)
    facts = read_facts(path)
    if facts["target"]["fingerprint"] != target.fingerprint:
        raise UserError("model.start_from", source, f"was trained for another target ({facts['target']['path']})", "give a draft of this run's target")
    config, weights = DraftConfig.from_dict(facts["draft_config"]), read_draft_weights(path)
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Eagle3Draft(config).named_parameters()}
    wrong = sorted(name for name in expected.keys() | weights.keys() if name not in expected or name not in weights or weights[name].shape != expected[name])
    if wrong:
        raise UserError("model.start_from", source, f"has missing, unknown or misshapen tensors: {', '.join(wrong)}", "use another checkpoint")
    ids = facts["draft_ids"]
    return Start(source, config, weights, None if ids is None else VocabularyMapping(draft_ids=ids, target_size=config.vocab_size))


def _same(one: VocabularyMapping, other: VocabularyMapping | None) -> bool:
    return other is not None and torch.equal(one.draft_ids, other.draft_ids)
