"""What benchmarks ask of the package by duck typing, which no type checker sees."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import final_call, launch_failures, sanitize
from torchspec.batch import PackedBatch
from torchspec.transfer.record import Record
from torchspec.transfer.spec import RecordSpec

ROOT = Path(__file__).resolve().parents[2]


def test_the_parity_benchmark_makes_packs_of_records() -> None:
    described = importlib.util.spec_from_file_location("engine_parity", ROOT / "benchmarks" / "engine_parity.py")
    assert described is not None and described.loader is not None
    parity = importlib.util.module_from_spec(described)
    described.loader.exec_module(parity)
    spec = RecordSpec(target="t", tokenizer="", aux_layers=(1, 2), hidden_size=8, dtype="float32")
    lengths = [5, 1, 40]
    records = {i: Record(torch.arange(n, dtype=torch.int32), torch.randn(n, 16), torch.randn(n, 8), {}) for i, n in enumerate(lengths)}
    seen: list[PackedBatch] = []

    def task(batch: PackedBatch) -> SimpleNamespace:
        seen.append(batch)
        return SimpleNamespace(loss=torch.tensor(2.0))

    assert parity.loss_of(task, records, spec, "cpu") == 2.0
    (batch,) = seen
    assert batch.input_ids.shape[0] == sum(lengths) and batch.counts.tolist() == [41.0, 39.0, 37.0, 35.0]


def test_the_sanitizer_looks_at_every_kernel_of_ours_and_at_none_else() -> None:
    names = sanitize.kernel_names()
    assert {"_forward", "_backward", "_losses", "_ask", "_split", "_quantise"} <= set(names)
    for known, option in (("--kernel-name", "--kernel-name"), ("--kernel-regex", "--kernel-regex")):
        words = sanitize.command("compute-sanitizer", "memcheck", f"  {known} arg", ["--seed", "3"])
        chosen = words[words.index(option) + 1].split(",")
        assert chosen == [f"kne={name}" for name in names]
        assert words[-3:] == ["--inside", "--seed", "3"]
    rng = Random(0)
    seen = {sanitize.near(rng, 65, low=4) for _ in range(400)}
    assert {4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65} <= seen and min(seen) == 4 and max(seen) == 65


def test_runs_are_counted_over_sessions() -> None:
    rows = [{"runs": 30, "failed": []}, {"runs": 11, "failed": [{"run": 3}]}]
    assert launch_failures.total(rows).startswith("41 runs in 2 sessions, 1 failed") and "4.8%" in launch_failures.total(rows)


def served(side: str, draft: str, accepted: list[int], *, looping: list[bool] | None = None) -> final_call.Served:
    count = len(accepted)
    kinds = ["chat"] * (count // 2) + ["code"] * (count - count // 2)
    return final_call.Served(side, draft, "set", 3, 0.0, [10] * count, accepted, looping or [False] * count, kinds, 100.0)


def test_the_final_call_counts_drafts_of_a_side_together_and_pairs_by_prompt() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 20, 200)
    ours = [served("ours", f"a{i}", (base + 4 + i).tolist()) for i in range(2)]
    peer = [served("peer", "b", base.tolist())]
    every = np.ones(200, dtype=bool)
    mine, theirs, ratio, low, high = (float(word.strip("[]")) for word in final_call.compare(ours, peer, every).split())
    assert mine == pytest.approx(1 + (base.sum() + 200 * 4.5) / 2000, abs=1e-3)
    assert theirs == pytest.approx(1 + base.sum() / 2000, abs=1e-3)
    assert ratio == pytest.approx(mine / theirs, abs=2e-3) and low < ratio < high
    assert high - low < 0.04  # the prompts differ by far more than the drafts do: unpaired it would be 0.1
    assert final_call.compare(peer, peer, every).endswith("1.000 [1.000 1.000]")


def test_the_final_call_leaves_out_prompts_on_which_any_draft_looped() -> None:
    ours = served("ours", "a", [8, 8, 30, 8], looping=[False, False, True, False])
    peer = served("peer", "b", [4, 4, 30, 30], looping=[False, False, False, True])
    said = final_call.table([ours, peer])
    assert "4 prompts, 25% of the answers loop" in said
    assert " 2.350 2.700 " in said and " 1.800 1.400 1.286 [1.286 1.286] (2 prompts)" in said
    assert "chat" in said and "code" in said and "ours                     2.350 each; 100 tokens/s" in said


def test_counts_of_vllm_find_their_answers() -> None:
    counted = {"0-ab12cd34": [3, 1], "7": [2, 2]}
    assert final_call.of_answers(counted, ["7", "0", "3"]) == [[2, 2], [3, 1], [0, 0]]
