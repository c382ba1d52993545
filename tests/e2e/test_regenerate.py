"""``main.py regenerate`` with real vLLM: greedy answers equal those of the Transformers generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import run
from tests.tiny import save_conversations, save_target

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]


def answers(file: Path) -> dict[str, Any]:
    """By id: messages, or the exact ids of words that a random target has put in no way that its tokenizer would."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["id"]: (row.get("conversations") or (row["input_ids"], row["loss_mask"]), row["finish"]) for row in rows}


def test_vllm_answers_as_transformers_does(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    prompts = save_conversations(tmp_path / "prompts.jsonl", 12, turns=2)
    found = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / f"{engine}.jsonl"
        words = ("regenerate", "--target", str(target), "--input", str(prompts), "--output", str(output), "--max_new_tokens", "16", "--engine", engine)
        code, said = run(*words, timeout=200)
        assert code == 0, said
        found[engine] = answers(output)
    assert found["vllm"].keys() == found["transformers"].keys() and len(found["vllm"]) == 12
    different = [id for id in found["vllm"] if found["vllm"][id] != found["transformers"][id]]
    assert len(different) <= 1, "fp32 logits of the two differ by rounding: a tie may fall the other way, not more"
    code, said = run(
        "regenerate", "--target", str(target), "--input", str(prompts), "--output", "x.jsonl", "--engine", "vllm", "--engine_args", '{"dtype": "x"}'
    )
    assert code == 2 and "engine_args.dtype" in said.splitlines()[-1]
