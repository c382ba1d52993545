"""The serving walks of validation: any k whatever is trained, of greedy and of sampled answers, with and without
answers that loop, beside training's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.defects.fits import STEPS, module
from tests.models.differences import PRUNED, made_for
from tests.models.exports import save_plain_target
from tests.models.packs import Conversation, conversation, draft_config, pack
from torchspec.batch import PackedBatch
from torchspec.callbacks.acceptance import AcceptanceLength
from torchspec.callbacks.walks import Parting, Walk, Walks, looping_share, walks_of
from torchspec.errors import UserError
from torchspec.looping import repeats
from torchspec.models.metrics import serving_walk
from torchspec.models.module import DraftModule
from torchspec.supervision import Unroll
from torchspec.target import Target
from torchspec.trainer import Trainer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def loader(conversations: list[Conversation], steps: int, times: int = 1) -> Any:
    given: Any = [pack(draft_config(), conversations, steps, dtype=torch.float32)] * times
    return DataLoader(given, batch_size=None)


def run(folder: Path, made: DraftModule, callback: AcceptanceLength, *, steps: int, conversations: list[Conversation], fit: int = 0) -> dict[str, float]:
    """Metrics of a validation over one batch unrolled ``steps`` times, after ``fit`` steps of training."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "max_steps": fit, "callbacks": [callback]}
    runner = Trainer(default_root_dir=folder, **quiet)
    if fit:
        runner.fit(made, loader(conversations, STEPS, fit), loader(conversations, steps))
    else:
        runner.validate(made, loader(conversations, steps), verbose=False)
    return {name: float(value) for name, value in runner.callback_metrics.items()}


def answers(length: int = 40) -> list[Conversation]:
    return [conversation(draft_config(), [0] + [1] * (length + n), n) for n in range(4)]


def test_validation_unrolls_as_far_as_is_asked_whatever_is_trained(target: Target, tmp_path: Path) -> None:
    """A draft of three trained steps has the walk at k=7 of the same weights as a draft of seven; loss and names of k=3
    are what they are alone."""
    given = answers()
    with pytest.warns(UserWarning, match=r"7 tokens are proposed of a draft that is trained for 3"):
        both = run(tmp_path, module(target), AcceptanceLength([7, 3]), steps=7, conversations=given)
    alone = run(tmp_path, module(target), AcceptanceLength(3), steps=STEPS, conversations=given)
    torch.manual_seed(0)
    seven = DraftModule(target.config, aux_layers=[1, 2, 3], unroll_steps=7, compute_dtype="fp32")
    deep = run(tmp_path, seven, AcceptanceLength(7), steps=7, conversations=given)
    assert both["val/acceptance_length_k3"] == alone["val/acceptance_length"] > 1.0
    assert both["val/acceptance_length_k7"] == both["val/acceptance_length"] == deep["val/acceptance_length"]
    assert [both[f"val/acceptance_rate_k7_{i}"] for i in range(7)] == [deep[f"val/acceptance_rate_{i}"] for i in range(7)]
    for name in ("val/loss", "val/loss_2", "val/expected_acceptance_greedy", "val/expected_acceptance_sampling", "val/accuracy_0"):
        assert both[name] == pytest.approx(alone[name], rel=1e-6), name
    assert both["val/accuracy_6"] == pytest.approx(deep["val/accuracy_6"])
    lines = [json.loads(line) for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()]
    assert set(lines[0]["each_k"]) == {"k3", "k7"} and "each_k" not in lines[1] and len(lines[1]["rates"]) == 3


def test_the_rule_of_validation_is_as_deep_as_is_asked_before_any_hook_has_run(target: Target) -> None:
    """The datamodule asks for it before callbacks are set up."""
    made = module(target)
    assert made.supervision("train") == made.supervision("validate") == Unroll(STEPS)
    callbacks: list[Any] = [AcceptanceLength([7, 3])]
    made.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=callbacks)
    assert made.supervision("train") == Unroll(STEPS) and made.supervision("validate") == Unroll(7)


@pytest.mark.parametrize("draft_ids", [None, PRUNED])
def test_a_sampled_answer_is_followed_where_the_draft_chooses_what_stands_there(draft_ids: list[int] | None) -> None:
    made, _ = made_for("plain", draft_ids)
    batch = pack(made.draft.config, [conversation(made.draft.config, [0] + [1] * 60, n) for n in range(10)], 3)
    with torch.no_grad():
        output = made(batch, measure=True)
        states = made.draft(batch)
        expected = torch.zeros(batch.rows.base.shape[0], dtype=torch.int64)
        for k, state in enumerate(states):
            row = made.draft.lm_head(made.draft.norm(state)).argmax(-1)
            token = row if draft_ids is None else torch.tensor(draft_ids)[row]
            entries = batch.rows.index[k]
            right = token == batch.input_ids[batch.rows.base[entries] + 2 + k]
            expected[entries] += right & (expected[entries] == k)
    assert torch.equal(output.followed, expected) and int(expected.sum()) > 0
    assert not torch.equal(output.followed, output.accepted)  # of random ids the target says something else
    assert made(batch).followed.shape == (0,)


def test_the_walk_of_a_set_is_the_one_asked_for(target: Target, tmp_path: Path) -> None:
    """Greedy and sampled walks of the same set are the walks over ``accepted`` and ``followed``."""
    given = answers()
    made = module(target)
    found = {rule: run(tmp_path, made, AcceptanceLength(3, walk=rule), steps=STEPS, conversations=given) for rule in ("greedy", "sampled")}  # type: ignore[arg-type]
    batch = next(iter(loader(given, STEPS)))
    with torch.no_grad():
        output = made(batch, measure=True)
    turns = batch.turn[batch.rows.base + 1].tolist()
    for rule, right in (("greedy", output.accepted), ("sampled", output.followed)):
        stops, taken, _ = serving_walk(right.tolist(), turns, 3)
        assert found[rule]["val/acceptance_length"] == pytest.approx(1.0 + taken / stops)


def test_a_walk_of_no_validation_set_is_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AcceptanceLength.walk.*'sampled'"):
        run(tmp_path, module(target), AcceptanceLength(3, walk={"sampled": "sampled"}), steps=STEPS, conversations=answers())
    for wrong in (0, [], [3, 0]):
        with pytest.raises(UserError, match="num_speculative_tokens"):
            AcceptanceLength(wrong)  # type: ignore[arg-type]


def test_repeats_counts_pieces_that_stood_there_before() -> None:
    assert repeats(np.arange(30)) == (23, 0)
    assert repeats(np.arange(7)) == (0, 0)
    assert repeats(np.tile(np.arange(3), 10)) == (23, 20)


def looping(batch: PackedBatch, conversation_index: int) -> PackedBatch:
    """The conversation's ids made to repeat three tokens."""
    low, high = batch.cu_seqlens[conversation_index : conversation_index + 2].tolist()
    batch.input_ids[low:high] = torch.arange(high - low) % 3
    return batch


def test_looping_conversations_are_told_from_the_others() -> None:
    config = draft_config()
    batch = looping(pack(config, answers(), 3), 1)
    right = torch.arange(batch.rows.base.shape[0]) % 3
    walks = Walks((1, 3))
    walks.add(right, batch)
    turn, owner = batch.turn[batch.rows.base + 1], batch.sequence[batch.rows.base]
    whole, steady = walks_of(walks.table, (1, 3)), walks_of(walks.table, (1, 3), looping=False)
    for k in (1, 3):
        stops, taken, positions = serving_walk(right.tolist(), turn.tolist(), k)
        assert whole[k].drafts == stops and whole[k].length == 1 + taken / stops and len(whole[k].rates) == len(positions) == k
        stops, taken, _ = serving_walk(right[owner != 1].tolist(), turn[owner != 1].tolist(), k)
        assert steady[k].drafts == stops and steady[k].length == 1 + taken / stops
    pieces = sum(len(c.ids) - 8 for c in answers())
    assert looping_share(walks.table) == pytest.approx((len(answers()[1].ids) - 8 - 3) / pieces)
    walks.clear()
    walks.add(right, batch)
    assert walks_of(walks.table, (1, 3)) == whole


def test_figures_without_loops_stand_beside_those_with_them(target: Target, tmp_path: Path) -> None:
    given = answers()
    given[2] = Conversation([i % 3 for i in range(len(given[2].ids))], given[2].mask, given[2].aux, given[2].last)
    found = run(tmp_path, module(target), AcceptanceLength(3), steps=STEPS, conversations=given)
    others = run(tmp_path / "others", module(target), AcceptanceLength(3), steps=STEPS, conversations=given[:2] + given[3:])
    assert found["val/looping_share"] > 0.1 > others["val/looping_share"]
    assert found["val/acceptance_length_without_loops"] == pytest.approx(others["val/acceptance_length"])
    assert "val/acceptance_length_without_loops" not in others


def test_training_and_validation_walk_side_by_side(target: Target, tmp_path: Path) -> None:
    found = run(tmp_path, module(target), AcceptanceLength([2, 3]), steps=STEPS, conversations=answers(), fit=3)
    (line,) = [json.loads(line) for line in (tmp_path / "acceptance.jsonl").read_text().splitlines()]
    assert line["train"] == pytest.approx(found["train/acceptance_length"]) and line["train"] >= 1.0


def test_over_fitting_is_warned_of_once_training_leaves_validation_behind() -> None:
    def look(watch: Parting, train: float, validate: float, epoch: int, drafts: int = 10_000) -> str | None:
        return watch.look(train=Walk(train, (), drafts), validate=Walk(validate, (), drafts), epoch=epoch, step=9)

    parting = Parting()
    assert look(parting, 2.0, 1.8, 0) is None and look(parting, 2.4, 2.1, 0) is None  # training's text is the easier one
    assert look(parting, 2.8, 2.4, 1) is None
    again = Parting()
    again.load_state_dict(parting.state_dict())
    assert look(parting, 3.4, 2.4, 2, drafts=20) is None  # noise
    said = look(parting, 3.4, 2.4, 2)
    assert said is not None and "3.400" in said and "2.400" in said and "over-fits" in said
    assert look(parting, 3.6, 2.4, 3) is None
    assert look(again, 3.4, 2.4, 2) == said
    assert look(Parting(), 1.0, 1.0, 0, drafts=0) is None
