"""Answers of the target in place of the given ones: in order, resumable, whole lines only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.tiny import save_target
from torchspec.data.conversations import parse
from torchspec.data.generators import EngineAnswerer
from torchspec.data.regenerate import answer_file, made_with, open_output
from torchspec.data.render import Renderer
from torchspec.engines.engine import Answer, Sampling
from torchspec.errors import UserError
from torchspec.target import TargetConfig


class Echo:
    """Answers a prompt of n tokens with "two" n % 5 + 1 times; the last prompt is answered first."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.asked: list[str] = []
        self.stop_after: int | None = None

    def words(self, prompt: Sequence[int]) -> str:
        return " ".join(["two"] * (len(prompt) % 5 + 1))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        for index in reversed(range(len(prompts))):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(self.tokenizer.decode(prompts[index]))
            if "silent" in self.asked[-1]:
                yield Answer(index, [2], "stop")
                continue
            ids = self.tokenizer(self.words(prompts[index]), add_special_tokens=False)["input_ids"]
            cut = len(ids) >= sampling.max_new_tokens
            yield Answer(index, ids[: sampling.max_new_tokens] if cut else [*ids, 2], "length" if cut else "stop")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetConfig:
    return TargetConfig(str(save_target(tmp_path_factory.mktemp("target"), layers=1)))


def conversation(*contents: str, **fields: Any) -> str:
    roles = ("user", "assistant")
    return json.dumps({**fields, "conversations": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]})


def run(
    target: TargetConfig, folder: Path, rows: list[str] | None = None, *, generator: Echo | None = None, **changes: Any
) -> tuple[Any, list[dict[str, Any]], Echo]:
    if rows is not None:
        (folder / "in.jsonl").write_text("\n".join(rows) + "\n")
    echo = generator or Echo(AutoTokenizer.from_pretrained(target.path))
    sampling = Sampling(**{"max_new_tokens": 50, **changes.pop("sampling", {})})
    renderer = Renderer(AutoTokenizer.from_pretrained(target.path), name="tiny")
    report = answer_file(
        EngineAnswerer(echo, renderer),
        made_with(target.path, sampling),
        input=str(folder / "in.jsonl"),
        output=folder / "out.jsonl",
        sampling=sampling,
        **changes,
    )
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return report, written, echo


def test_turns_are_answered_in_order_on_top_of_the_targets_own(target: TargetConfig, tmp_path: Path) -> None:
    rows = [
        conversation("the dog", "OLD", "and the cat", "OLDER", id="a", source="x"),
        conversation("why", "OLD", "or", id="b"),
        json.dumps({"id": "c", "prompt": "when"}),
    ]
    report, written, echo = run(target, tmp_path, rows)
    by_id = {row["id"]: row for row in written}
    assert set(by_id) == {"a", "b", "c"} and report.answered == 3 and report.failed == 0
    assert by_id["a"]["source"] == "x" and by_id["a"]["finish"] == "stop"
    how = {"engine": "transformers", "revision": None, "dtype": "auto", "engine_args": {}, "template_args": {}}
    assert by_id["a"]["sampling"] == {"target": target.path, "max_new_tokens": 50, "temperature": 0.0, "top_p": 1.0, "seed": 0, **how}
    assert [m["role"] for m in by_id["a"]["conversations"]] == ["user", "assistant", "user", "assistant"]
    assert [m["role"] for m in by_id["b"]["conversations"]] == ["user", "assistant", "user", "assistant"]  # the open question is answered, too
    assert by_id["c"]["conversations"][0] == {"role": "user", "content": "when"}
    assert not any("OLD" in prompt for prompt in echo.asked)
    tokenizer = AutoTokenizer.from_pretrained(target.path)
    for row in written:
        messages = row["conversations"]
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                text = str(tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False))
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert message["content"] == echo.words(prompt)


def test_what_is_written_renders_to_what_was_generated(target: TargetConfig, tmp_path: Path) -> None:
    report, written, _ = run(target, tmp_path, [conversation("the dog", "OLD", id="a")])
    renderer = Renderer(AutoTokenizer.from_pretrained(target.path), name="t")
    rendered = renderer.render(parse(json.dumps(written[0]).encode()))
    answer = renderer.tokenizer.decode(rendered.ids[rendered.mask == 1].tolist())
    assert answer == written[0]["conversations"][1]["content"] + "<|im_end|>" and report.exact == 0


def test_a_cut_answer_ends_its_conversation_and_has_no_end_token(target: TargetConfig, tmp_path: Path) -> None:
    report, written, _ = run(target, tmp_path, [conversation("the dog", "OLD", "and", "OLDER", id="a")], sampling={"max_new_tokens": 1})
    assert written[0]["finish"] == "length" and len(written[0]["conversations"]) == 2 and report.cut == 1
    rendered = Renderer(AutoTokenizer.from_pretrained(target.path), name="t").render(parse(json.dumps(written[0]).encode()))
    assert 2 not in rendered.ids[rendered.mask == 1]


def test_an_interrupted_run_goes_on_where_it_stopped(target: TargetConfig, tmp_path: Path) -> None:
    rows = [conversation(f"number {i}", "OLD", "and", "OLD", id=str(i)) for i in range(12)]
    first = Echo(AutoTokenizer.from_pretrained(target.path))
    first.stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path, rows, generator=first, group=4)
    out = tmp_path / "out.jsonl"
    done = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert 0 < len(done) < 12
    with out.open("a") as handle:
        handle.write('{"id": "11", "conversa')  # killed in the middle of a line
    report, written, second = run(target, tmp_path, group=4)
    assert sorted(row["id"] for row in written) == sorted(str(i) for i in range(12))
    assert report.skipped == len(done) and report.answered == 12 - len(done)
    assert not any(f"number {i}<" in prompt for i in done for prompt in second.asked)
    report, again, third = run(target, tmp_path, group=4)
    assert again == written and third.asked == [] and report.answered == 0


def test_other_settings_do_not_mix_in_one_file(target: TargetConfig, tmp_path: Path) -> None:
    run(target, tmp_path, [conversation("the dog", "OLD", id="a")])
    with pytest.raises(UserError, match=r"temperature=0\.7 differs from 0\.0"):
        run(target, tmp_path, sampling={"temperature": 0.7})
    for change in ({"dtype": "bfloat16"}, {"template_args": {"x": 1}}, {"engine": "vllm"}, {"revision": "v2"}, {"engine_args": {"x": 1}}):
        ((name, value),) = change.items()
        with pytest.raises(UserError, match=re.escape(f"{name}={value!r} differs from ")):
            open_output(tmp_path / "out.jsonl", made_with(target.path, Sampling(50), **change))
    more = json.loads((tmp_path / "out.jsonl").read_text())
    more["sampling"]["top_k"] = 5  # of another version
    (tmp_path / "out.jsonl").write_text(json.dumps(more) + "\n")
    with pytest.raises(UserError, match="top_k=None differs from 5"):
        run(target, tmp_path)
    # a file of another kind is left as it is, also where it has no last newline
    for theirs in ("hello\n", "hello", "[1, 2]", '[{"id": "a"', '{"id": "a", "messages": []}', '{\n"id": "a"', "7"):
        (tmp_path / "out.jsonl").write_text(theirs)
        with pytest.raises(UserError, match="no regenerate wrote"):
            run(target, tmp_path)
        assert (tmp_path / "out.jsonl").read_text() == theirs


def test_failures_are_listed_and_tried_again(target: TargetConfig, tmp_path: Path) -> None:
    rows = [
        "{broken",
        conversation("be silent", "OLD", id="s"),
        conversation("the dog", "OLD", id="a"),
        json.dumps({"messages": [{"role": "narrator", "content": "x"}]}),
    ]
    report, written, _ = run(target, tmp_path, rows)
    failed = [json.loads(line) for line in (tmp_path / "out.jsonl.failed.jsonl").read_text().splitlines()]
    assert report.failed == 3 and [row["id"] for row in written] == ["a"]
    assert {entry["place"][-1] for entry in failed} == {"1", "2", "4"} and any("empty answer" in entry["problem"] for entry in failed)
    report, _, echo = run(target, tmp_path)
    assert report.failed == 3 and len(echo.asked) == 1


def test_rows_without_id_and_with_the_same_id_are_kept_apart(target: TargetConfig, tmp_path: Path) -> None:
    rows = [conversation("one", "OLD"), conversation("two", "OLD"), conversation("three", "OLD", id="x"), conversation("we", "OLD", id="x")]
    _, written, _ = run(target, tmp_path, rows)
    assert len({row["id"] for row in written}) == 4
    report, _, _ = run(target, tmp_path)
    assert report.skipped == 4
    rows = [conversation(word, "OLD", id=id) for word, id in (("one", "a#2"), ("two", "a"), ("three", "a"), ("four", "a#3"), ("five", "a"), ("six", "a#2"))]
    (tmp_path / "out.jsonl").unlink()
    _, written, _ = run(target, tmp_path, rows)
    assert [row["id"] for row in sorted(written, key=lambda row: row["id"])] == ["a", "a#2", "a#2#2", "a#3", "a#3#2", "a#4"]


def test_limit_takes_the_first_rows(target: TargetConfig, tmp_path: Path) -> None:
    _, written, _ = run(target, tmp_path, [conversation("one", "OLD", id=str(i)) for i in range(5)], limit=2)
    assert sorted(row["id"] for row in written) == ["0", "1"]


def test_half_a_character_in_a_field_of_the_users_is_kept(target: TargetConfig, tmp_path: Path) -> None:
    _, written, _ = run(target, tmp_path, [conversation("the dog", "OLD", id="a", note="\ud83d", input_ids=[1], text="old")])
    assert written[0]["note"] == "\ud83d" and "input_ids" not in written[0] and "text" not in written[0]
