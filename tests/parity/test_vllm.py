"""What we export is what vLLM serves: on 50 prompts, every draft token that stock vLLM proposes is the one that training's own forward computes.

One vLLM process serves all drafts, in fp32, greedily.
"""

from __future__ import annotations

import pytest

from tests.parity.served import CASES, PROMPTS, TOKENS, run
from tests.parity.vllm import Agreement, K

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def agreements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Agreement]:
    return run(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", CASES)
def test_vllm_proposes_our_tokens(name: str, agreements: dict[str, Agreement]) -> None:
    found = agreements[name]
    assert found.different == 0 and found.logit_difference < 1e-3
    assert found.proposals >= PROMPTS * TOKENS // (K + 1) and found.tokens > 0.95 * K * found.proposals


def test_some_drafts_were_accepted(agreements: dict[str, Agreement]) -> None:
    """So that what follows an accepted token, whose keys vLLM overwrites, was compared too."""
    assert agreements["plain"].accepted > 50
