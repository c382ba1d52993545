"""What we export is what vLLM serves: on 50 prompts, every draft token that stock vLLM proposes is the one that training's own forward computes.

One vLLM process serves all drafts, in fp32, greedily.
"""

from __future__ import annotations

import pytest

from tests.parity.served import CASES, PROMPTS, TOKENS, run
from tests.parity.vllm import Agreement, K

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


AGAIN = ("pruned", "Qwen3 (qk_norm)", "norm_output", "MLA")
"""What others of the cases have as well, together with more."""


@pytest.fixture(scope="module")
def agreements(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Agreement]:
    """Of the cases whose tests were selected, and of the plain one."""
    selected = {item.callspec.params["name"] for item in request.session.items if getattr(item, "module", None) is request.module and hasattr(item, "callspec")}
    return run(tmp_path_factory.mktemp("vllm"), [name for name in CASES if name in selected | {"plain"}])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.nightly] if name in AGAIN else []) for name in CASES])
def test_vllm_proposes_our_tokens(name: str, agreements: dict[str, Agreement]) -> None:
    found = agreements[name]
    assert found.different == 0 and found.logit_difference < 1e-3
    assert found.proposals >= PROMPTS * TOKENS // (K + 1) and found.tokens > 0.95 * K * found.proposals


def test_some_drafts_were_accepted(agreements: dict[str, Agreement]) -> None:
    """So that what follows an accepted token, whose keys vLLM overwrites, was compared too."""
    assert agreements["plain"].accepted > 50
