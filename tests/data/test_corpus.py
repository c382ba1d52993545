"""What the rest of a run derives from its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import save_conversations, save_target
from torchspec.data.corpus import Corpus
from torchspec.data.prepare import DataOptions
from torchspec.errors import UserError
from torchspec.supervision import Unroll
from torchspec.target import Target, TargetConfig
from torchspec.transfer.record import RecordSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    return {"target": save_target(folder / "target"), "train": save_conversations(folder / "train.jsonl", 30), "cache": folder / "cache"}


def corpus(world: dict[str, Path], **changes: Any) -> Corpus:
    settings = {
        "sources": {"train": str(world["train"]), "validate": None},
        "options": DataOptions(max_length=128),
        "max_tokens": 256,
        "packs_per_step": 2,
        "seed": 0,
        "cache_dir": world["cache"],
        "say": lambda line: None,
        **changes,
    }
    made = Corpus(Target(TargetConfig(str(world["target"]))), **settings)
    made.supervise(train=Unroll(3), validate=Unroll(3))
    return made


def test_the_same_on_every_rank(world: dict[str, Path]) -> None:
    one, two = corpus(world), corpus(world)
    assert one.plan(3).fingerprint == two.plan(0).fingerprint == one.any_plan.fingerprint
    assert [one.plan(3).pack(i).tolist() for i in range(4)] == [two.plan(3).pack(i).tolist() for i in range(4)]
    assert one.spec((2, 4)) == two.spec((2, 4))


def test_end_ids_come_from_config_tokenizer_and_data(world: dict[str, Path], tmp_path: Path) -> None:
    made = corpus(world)
    assert made.special_end_ids() == [2]
    counts = made.token_counts()
    assert counts.shape == (made.target.vocab_size,) and int(counts[2]) == 30
    (world["target"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert corpus(world).special_end_ids() == [2, 7]


def test_a_stage_without_data_is_named(world: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"data\.validate=None is needed here"):
        corpus(world).dataset("validate")


SPEC = RecordSpec(target="t", tokenizer="", aux_layers=(1, 2, 3), hidden_size=24, dtype="bfloat16")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120), tokens=st.integers(100, 400), epoch=st.integers(0, 4))
def test_no_pack_of_any_epoch_needs_more_than_the_bound(lengths: list[int], tokens: int, epoch: int) -> None:
    from torchspec.data.plan import Plan

    class Lengths:
        pass

    stub = Lengths()
    stub.lengths = np.array(lengths)  # type: ignore[attr-defined]
    made = Corpus.__new__(Corpus)
    made.max_tokens = tokens
    made._data = {"train": stub}  # type: ignore[dict-item]
    made.sources = {"train": "x"}
    made.on_policy = None
    bound = made.largest_pack("train", SPEC)
    plan = Plan(lengths, seed=1, epoch=epoch, max_tokens=tokens, packs_per_step=2)
    needed = plan.sums(np.array([SPEC.nbytes(n) for n in lengths]))
    assert int(needed.max()) <= bound


def test_validation_is_planned_as_deep_as_a_callback_asks(world: dict[str, Path]) -> None:
    """Counts of a batch say how far it is unrolled; training's stay."""
    made = corpus(world, sources={"train": str(world["train"]), "validate": str(world["train"])})
    assert made.validation_plan("validate", 1).step_counts(0).shape == (3,)
    made.supervise(train=Unroll(3), validate=Unroll(5))
    deeper = made.validation_plan("validate", 1)
    assert deeper.step_counts(0).shape == (5,) and made.plan(0).step_counts(0).shape == (3,)
    assert deeper.pack(0).tolist() == corpus(world, sources=made.sources).validation_plan("validate", 1).pack(0).tolist()
