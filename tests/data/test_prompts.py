"""On-policy data: where conversations are cut, what is asked and accepted, and what answers of given lengths supervise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.sparse import Sparse
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.plan import Plan
from torchspec.data.prepare import DataOptions, prepare
from torchspec.data.prompts import Prompts, answer_counts
from torchspec.engines.engine import OnPolicy
from torchspec.engines.messages import PartialAnswer
from torchspec.errors import UserError
from torchspec.supervision import Unroll, turns

MASKS = [
    [0, 0, 1, 1, 1, 0, 0, 1, 1, 0],  # two answers: at 2 and 7
    [0, 0, 0, 0, 0, 0, 1, 1],  # one, at 6
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1],  # begins with one, which follows no prompt; another at 9
    [1, 1, 1],
    [0] * 11 + [1],
]


def data(folder: Path) -> TokenizedDataset:
    rows = [{"input_ids": [10 * (i + 1) + t % 10 for t in range(len(mask))], "loss_mask": mask} for i, mask in enumerate(MASKS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(max_length=12, min_supervised_tokens=1)
    return prepare(str(folder / "a.jsonl"), options=options, tokenizer=None, vocab_size=100, cache_dir=folder / "cache", target_name="t")


def test_conversations_are_cut_before_the_last_answer_with_room(tmp_path: Path) -> None:
    prompts = Prompts(data(tmp_path), OnPolicy(max_new_tokens=5), max_length=12)
    assert [prompts.prompt(i).shape[0] for i in range(len(prompts))] == [7, 6, 9]  # the last two have no prompt, or no room
    assert prompts.lengths.tolist() == [12, 11, 12]
    assert [prompts.place(i).rpartition("/")[2] for i in range(3)] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    wide = Prompts(data(tmp_path), OnPolicy(max_new_tokens=8), max_length=12)
    assert [wide.prompt(i).shape[0] for i in range(len(wide))] == [2, 6, 9]


def test_what_is_asked_is_the_prompt_with_a_seed_of_its_own(tmp_path: Path) -> None:
    prompts = Prompts(data(tmp_path), OnPolicy(max_new_tokens=5, temperature=1.0, seed=3), max_length=12)
    asked = [prompts.request(i, epoch=epoch) for epoch in (0, 1) for i in range(3)]
    assert np.frombuffer(asked[1].ids, dtype="<i4").tolist() == [20, 21, 22, 23, 24, 25]
    assert [a.generate_from.new_tokens for a in asked if a.generate_from] == [5, 5, 3, 5, 5, 3]
    assert len({a.generate_from.seed for a in asked if a.generate_from}) == 6 and prompts.request(2, epoch=1) == asked[5]
    assert isinstance(asked[0].generate_from, PartialAnswer)


def test_a_record_must_continue_its_prompt(tmp_path: Path) -> None:
    prompts = Prompts(data(tmp_path), OnPolicy(max_new_tokens=5), max_length=12)
    ids = torch.tensor([20, 21, 22, 23, 24, 25, 77, 78], dtype=torch.int32)
    assert prompts.mismatch(1, ids) == ""
    assert prompts.loss_mask(1, 8).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert "prompt 1" in prompts.mismatch(1, ids + 1)
    assert "6 tokens" in prompts.mismatch(1, ids[:6]) and "12 tokens" in prompts.mismatch(1, torch.cat([ids, ids[:4]]))


@pytest.mark.parametrize("lengths", [[1], [2, 1, 7], [30, 4], []])
def test_counts_of_answers_are_what_collation_supervises(lengths: list[int]) -> None:
    steps = 5
    total = np.zeros(steps)
    for length in lengths:
        mask = np.array([0, 0, 0] + [1] * length, dtype=np.uint8)
        bounds = np.array([0, mask.shape[0]])
        rows = Unroll(steps).rows(turns(mask, bounds), bounds)
        total += [len(index) for index in rows.index]
    assert answer_counts(lengths, Unroll(steps)).tolist() == total.tolist()


def test_a_family_that_draws_has_the_counts_and_at_most_the_work_of_its_answers(tmp_path: Path) -> None:
    rule = Sparse(3, width=4)
    assert answer_counts([2, 1, 7], rule).tolist() == [1 + 0 + 3]
    counts, work = Prompts(data(tmp_path), OnPolicy(max_new_tokens=5), max_length=12).measured(rule)
    assert counts is None and work.tolist() == [12, 12, 8]  # answers of 5, 5 and 3 tokens at most


def test_the_plan_depends_on_how_prompts_are_answered(tmp_path: Path) -> None:
    def fingerprint(**policy: Any) -> str:
        prompts = Prompts(data(tmp_path), OnPolicy(**policy), max_length=12)
        return Plan(prompts.lengths, seed=0, epoch=0, max_tokens=12, packs_per_step=1, content=prompts.content).fingerprint

    found = {
        fingerprint(max_new_tokens=5),
        fingerprint(max_new_tokens=4),
        fingerprint(max_new_tokens=5, seed=1),
        fingerprint(max_new_tokens=5, temperature=0.5),
    }
    assert len(found) == 4


def test_no_room_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.on_policy\.max_new_tokens=5"):
        Prompts(data(tmp_path), OnPolicy(max_new_tokens=5), max_length=3)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 1}, {"temperature": -1.0}, {"top_p": 0.0}, {"seed": -1}])
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=rf"data\.on_policy\.{name}"):
        OnPolicy(**wrong)
