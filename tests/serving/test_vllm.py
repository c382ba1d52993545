"""What we write is what vLLM serves: every token that stock vLLM proposes with a block draft is the one that training's own forward gives.

DFlash by the runner that every machine has (whose logits are compared as well); DSpark, DFlash 2 and DFlash once more by the newer one, its kernels
interpreted. One vLLM process for each, in fp32, greedily.
"""

from __future__ import annotations

import pytest

from tests.serving.drafts import Agreement, Case, run

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

OLDER: dict[str, Case] = {
    "one layer": Case({"kind": "dflash"}),
    "two layers, 16 slots": Case({"kind": "dflash", "num_layers": 2, "block_size": 16}, aux_layers=(0, 2, 3, 5, 8)),
    "causal": Case({"kind": "dflash", "causal": True, "block_size": 4}),
    "window": Case({"kind": "dflash", "sliding_window": 16}),
    "window, causal, speculators": Case({"kind": "dflash", "sliding_window": 16, "causal": True}, form="speculators"),
    "pruned": Case({"kind": "dflash"}, pruned=100),
    "learned mask": Case({"kind": "dflash", "learned_mask": True}),
    "speculators": Case({"kind": "dflash", "num_layers": 2, "attention_bias": True}, form="speculators"),
}
NEWER: dict[str, Case] = {
    "dflash": Case({"kind": "dflash", "num_layers": 2}),
    "dspark": Case({"kind": "dspark", "num_layers": 2, "block_size": 7, "markov_rank": 32}),
    "dspark, pruned, speculators": Case({"kind": "dspark", "block_size": 7, "markov_rank": 32}, pruned=100, form="speculators"),
    "dflash2": Case({"kind": "dflash2", "num_layers": 2, "conv_taps": 3, "selector_rank": 32, "selector_candidates": 4}),
    "dflash2, speculators": Case({"kind": "dflash2", "selector_rank": 32, "selector_candidates": 4}, form="speculators"),
}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Agreement]:
    return run(tmp_path_factory.mktemp("older"), OLDER, prompts=20, tokens=9, newer=False)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Agreement]:
    return run(tmp_path_factory.mktemp("newer"), NEWER, prompts=5, tokens=5, newer=True)


@pytest.mark.parametrize("name", OLDER)
def test_the_older_runner_proposes_our_tokens(name: str, older: dict[str, Agreement]) -> None:
    found = older[name]
    assert found.different == 0 and found.logit_difference < 1e-5, found
    assert found.proposals >= 60 and found.ties <= 0.01 * found.tokens, found


@pytest.mark.parametrize("name", NEWER)
def test_the_newer_runner_proposes_our_tokens(name: str, newer: dict[str, Agreement]) -> None:
    found = newer[name]
    assert found.different == 0 and found.ties <= 0.01 * found.tokens, found
    assert found.proposals >= 10, found
