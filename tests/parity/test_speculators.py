"""What we export in speculators' format means the same there: same logits at every step, over the grid of variants."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.differences import PRUNED
from tests.models.exports import save_plain_target
from tests.models.variants import VARIANTS
from tests.parity.speculators import conversation_for, exported, largest_difference
from torchspec.errors import UserError
from torchspec.target import Target

pytest.importorskip("speculators", reason="scripts/setup.sh installs it")
NOT_SAID = [name for name in VARIANTS if "MLA" in name or "own embedding" in name]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("draft_ids", [None, PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_SAID])
def test_same_logits_at_every_step(variant: str, draft_ids: list[int] | None, target: Target, tmp_path: Path) -> None:
    made = exported(variant, target, tmp_path / "draft", draft_ids=draft_ids)
    assert largest_difference(made, conversation_for(made)) < 1e-5


@pytest.mark.parametrize("variant", NOT_SAID)
def test_what_the_format_cannot_say_is_refused(variant: str, target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format vllm"):
        exported(variant, target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
