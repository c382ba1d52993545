"""What users get wrong with data, and the one line that each is told: the place, the reason, the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.tiny import CHATML, save_conversations, save_target
from torchspec.data.corpus import Corpus
from torchspec.data.prepare import DataOptions
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

ASK, SAY = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "runs"}
DROPS = CHATML.replace("{{ message['content'] }}", "{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=1)


def corpus(target: Path, folder: Path, rows: list[Any], said: list[str] | None = None, **options: Any) -> Corpus:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"train": str(file), "validate": options.pop("validate", None)}
    return Corpus(
        Target(TargetConfig(str(target))),
        sources=sources,
        options=DataOptions(max_length=64, **options),
        max_tokens=64,
        packs_per_step=1,
        seed=0,
        cache_dir=folder / "cache",
        say=(said if said is not None else []).append,
    )


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"dialog": [ASK, SAY]}, {}, "has no conversations or messages (keys: dialog)"),
        ({"messages": [ASK, SAY]}, {"messages_key": "talk"}, "has no talk (keys: messages)"),
        ({"messages": [ASK]}, {}, "has no assistant message"),
        ({"messages": [SAY, ASK]}, {}, "has its roles out of order: message 0 is an answer to nothing"),
        (
            {"messages": [ASK, SAY, {"role": "system", "content": "x"}]},
            {},
            "message 2 (system) comes after one of the assistant; it belongs at the beginning",
        ),
        ({"messages": [ASK, SAY, SAY]}, {}, "messages 1 and 2 are both the assistant's"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}, SAY]}, {}, "message 1 is a tool result, and no assistant message before it called a tool"),
        ({"messages": [ASK, {**SAY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, {}, "arguments of f is no valid JSON"),
        ({"messages": [{**ASK, "content": [{"type": "image_url"}]}, SAY]}, {}, "data.media: engine gives it images, placeholder"),
        ({"text": "<|im_start|>no answer in here"}, {}, "text has no answer"),
    ],
)
def test_a_row_is_named_with_its_reason(target: Path, tmp_path: Path, row: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        corpus(target, tmp_path, [row], **options).dataset("train")
    told = str(caught.value)
    assert said in told and f"{tmp_path / 'train.jsonl'}:1" in told and told.startswith("data.train=") and "\n" not in told
    assert "Fix: mend or remove these rows, or raise data.max_bad_fraction." in told


def test_a_template_that_drops_the_answer(target: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "target"
    shutil.copytree(target, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = DROPS
    tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="the target's chat template drops or rewrites the content of message 1"):
        corpus(copy, tmp_path, [{"messages": [ASK, SAY]}]).dataset("train")


def test_a_tokenizer_of_another_target(target: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "target"
    shutil.copytree(target, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(UserError, match=r"data\.target\.path=.* has 64 tokens, but .*train\.jsonl:1 renders to id \d+\. Fix: use the tokenizer that belongs"):
        corpus(copy, tmp_path, [{"messages": [ASK, SAY]}]).dataset("train")


def test_validation_data_inside_the_training_data_is_warned_of(target: Path, tmp_path: Path) -> None:
    other = save_conversations(tmp_path / "validate.jsonl", 3, seed=5)
    with other.open("a") as handle:
        handle.write(json.dumps({"conversations": [ASK, SAY]}) + "\n")
    said: list[str] = []
    made = corpus(target, tmp_path, [{"messages": [ASK, SAY]}], said, validate=str(other))
    assert made.warn_of_overlap("validate") == 1
    assert f"warning: 1 of the 4 conversations of validate are in the training data as well, {other}:4 the first" in said[-1]
    made = corpus(target, tmp_path, [{"messages": [ASK, {**SAY, "content": "sleeps"}]}], said, validate=str(other))
    before = [line for line in said if "warning" in line]
    assert made.warn_of_overlap("validate") == 0 and [line for line in said if "warning" in line] == before


def test_a_hub_dataset_is_read_by_split_and_row(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is replaced by what it gives: the network is not part of this."""
    import datasets

    asked: list[tuple[str, str]] = []

    def load(repository: str, *, split: str) -> datasets.Dataset:
        asked.append((repository, split))
        return datasets.Dataset.from_list([{"messages": [ASK, SAY]}, {"messages": [SAY, ASK]}, {"messages": [ASK, {**SAY, "content": "sleeps"}]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = Corpus(
        Target(TargetConfig(str(target))), sources={"train": "org/talks:test[:3]"}, options=DataOptions(max_length=64), max_tokens=64,
        packs_per_step=1, seed=0, cache_dir=tmp_path / "cache", max_bad_fraction=0.5, say=lambda line: None,
    )  # fmt: skip
    data = made.dataset("train")
    assert set(asked) == {("org/talks", "test[:3]")} and len(data) == 2 and data.place(1) == "org/talks:test[:3]:3"
    bad = json.loads((data.folder / "bad_rows.jsonl").read_text())
    assert bad["place"] == "org/talks:test[:3]:2" and "message 0 is an answer to nothing" in bad["problem"]


def test_a_hub_dataset_that_does_not_load(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(repository: str, *, split: str) -> datasets.Dataset:
        raise ConnectionError(f"Couldn't reach '{repository}' on the Hub (OfflineModeIsEnabled)\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError) as caught:
        corpus(target, tmp_path, [], validate="org/talks").dataset("validate")
    assert str(caught.value) == (
        "data.validate='org/talks' is no local file or folder, and no hub dataset that loads (Couldn't reach 'org/talks' on the Hub (OfflineModeIsEnabled)). "
        "Fix: check the path or the id (org/name:split), and the network."
    )
    with pytest.raises(UserError, match=r"data\.validate='no such/file\.jsonl' does not exist"):
        corpus(target, tmp_path, [], validate="no such/file.jsonl").dataset("validate")
