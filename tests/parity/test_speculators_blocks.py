"""Block drafts beside speculators' own classes, where definitions agree: loss and every gradient.

Where they do not: speculators' windows begin at the anchor for every slot (served: at the slot itself), its anchors stop a block before the end of a
pack, its labels are the target's most likely tokens, and under D-PACE its selector is weighed by D-PACE too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.exports import save_plain_target
from tests.parity.speculators_blocks import built, ours, text, theirs
from torchspec.target import Target

pytest.importorskip("speculators")
DEEPSPEC = {"cross_entropy": 0.1, "tv": 1.8}
CASES: list[tuple[str, dict[str, float], str]] = [
    ("dflash", {"cross_entropy": 1.0}, "dpace"),
    ("dflash", {"cross_entropy": 1.0}, "decay"),
    ("dflash", {"forward_kl": 1.0}, "decay"),
    ("dflash", {"reverse_kl": 1.0, "lk_alpha": 0.5}, "decay"),
    ("dspark", DEEPSPEC, "decay"),
    ("dflash2", {"cross_entropy": 1.0}, "decay"),
    ("dflash2", {"tv": 1.0}, "decay"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(("kind", "losses", "weights"), CASES)
def test_loss_and_gradients_are_those_of_speculators(kind: str, losses: dict[str, float], weights: Any, target: Target, tmp_path: Path) -> None:
    task = built(kind, target, losses=losses, weights=weights)
    given = text(task.draft.config)
    loss, gradients = ours(task, given)
    their_loss, their_gradients = theirs(task, given, target, tmp_path / "draft", losses=losses, weights=weights)
    if "forward_kl" not in losses:  # theirs is the divergence, ours the cross-entropy: the same gradient
        assert loss == pytest.approx(their_loss, rel=2e-6)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert float((gradients[name] - gradient).abs().max()) < 2e-5 * float(gradient.abs().max()), name
