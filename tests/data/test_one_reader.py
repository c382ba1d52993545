"""All commands read rows by the same code: what they say is obeyed in each, what is not used is named once by each, an output is no input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.data.families import renderer, supervised
from tests.data.test_mistakes import corpus
from tests.data.test_regenerate import Echo
from tests.data.test_server_answers import server  # noqa: F401
from tests.tiny import save_target
from torchspec.acceptance_requests import read_requests
from torchspec.commands.regenerate import regenerate
from torchspec.data import prepare as prepared
from torchspec.data.conversations import parse
from torchspec.data.extract import extract
from torchspec.data.generators import EngineAnswerer
from torchspec.data.prepare import DataOptions
from torchspec.data.regenerate import answer_file, made_with
from torchspec.data.render import Renderer
from torchspec.data.show import shown_rows
from torchspec.engines.engine import Sampling
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

ASK, SAY = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "runs"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=1)


def answered(target: Path, source: str, output: Path, **options: Any) -> tuple[list[dict[str, Any]], Echo]:
    tokenizer = AutoTokenizer.from_pretrained(target)
    echo, sampling = Echo(tokenizer), Sampling(50)
    answer_file(
        EngineAnswerer(echo, Renderer(tokenizer, name="tiny")), made_with(str(target), sampling), input=source, output=output, sampling=sampling, **options
    )
    return [json.loads(line) for line in output.read_text().splitlines()], echo


def put(file: Path, *rows: dict[str, Any]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts(data: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(data.ids(i)[data.mask(i) == 1].tolist()) for i in range(len(data))]


# -- marks, in the mask


def test_message_weights_make_answers_context_only(target: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [ASK, {**SAY, "weight": 0}, ASK, {"role": "assistant", "content": "sleeps", "weight": 1}]},
        {"messages": [ASK, {**SAY, "train": False}, ASK, SAY, {"role": "user", "content": "why"}, {**SAY, "trainable": False}]},
        {"messages": [ASK, {**SAY, "loss_mask": 0}]},
    ]
    made = corpus(target, tmp_path, rows)
    data, tokenizer = made.dataset("train"), AutoTokenizer.from_pretrained(target)
    assert texts(data, tokenizer) == ["sleeps<|im_end|>", "runs<|im_end|>"]
    assert "why" in tokenizer.decode(data.ids(1).tolist()) and data.summary.too_short == 1 and data.summary.bad == 0
    last = corpus(target, tmp_path, rows, supervise="last").dataset("train")
    assert texts(last, tokenizer) == ["sleeps<|im_end|>"] and last.summary.too_short == 2


@pytest.mark.parametrize("name", ["qwen3", "glm-4.5", "gpt-oss", "marked"])
@pytest.mark.parametrize("supervise", ["auto", "all"])
def test_message_weights_under_templates_of_families(name: str, supervise: str) -> None:
    row = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}, {"role": "user", "content": "why"}]
    marked = [*row, {"role": "assistant", "content": "because it is", "weight": 0}]
    found = renderer(name, supervise=supervise)
    plain, context = (found.render(parse(json.dumps({"messages": messages}).encode())) for messages in ([*row, {**marked[-1], "weight": 1}], marked))
    assert context.ids.tolist() == plain.ids.tolist()
    words = [text for text in supervised(found.tokenizer, plain) if "because" not in text]
    assert supervised(found.tokenizer, context) == words and len(supervised(found.tokenizer, plain)) == len(words) + 1


# -- what a row tells the template


def test_what_a_row_tells_the_template_is_obeyed_over_the_options(tmp_path: Path) -> None:
    def rendered(row: dict[str, Any], **variables: Any) -> tuple[str, str]:
        found = renderer("qwen3", variables=variables)
        conversation = parse(json.dumps({"messages": [ASK, SAY], **row}).encode())
        return found.decode(found.prompt(conversation, 1)), found.decode(found.render(conversation).ids.tolist())

    for row in ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}):
        prompt, text = rendered(row, enable_thinking=False)
        assert prompt.endswith("assistant\n") and (prompt, text) == rendered({}, enable_thinking=True)
    assert rendered({"enable_thinking": False})[0].endswith("<think>\n\n</think>\n\n")


def test_what_the_template_never_looks_at_is_named(target: Path, tmp_path: Path) -> None:
    said: list[str] = []
    row = {"messages": [ASK, SAY], "tools": [{"name": "f"}], "enable_thinking": False}
    corpus(target, tmp_path, [row], said).dataset("train")
    assert any(line.endswith("keys that are not used: chat_template_kwargs.enable_thinking (1 row), tools (1 row)") for line in said)
    conversation = parse(json.dumps(row).encode())
    assert (
        renderer("qwen3").unused(conversation) == ("tools",)
        and renderer("llama-3").template.ignored(parse(json.dumps({"messages": [ASK, SAY]}).encode())) == ()
    )


def test_rows_reach_a_server_with_what_they_say(server: Any, tmp_path: Path) -> None:  # noqa: F811
    tool = {"name": "find", "parameters": {"type": "object"}}
    source = put(
        tmp_path / "in.jsonl",
        {"prompt": "one", "messages": [ASK, SAY, ASK], "system": "small", "functions": [tool], "enable_thinking": False, "mood": 1, "id": 7},
    )
    regenerate("model", input=source, output=str(tmp_path / "out.jsonl"), engine="server", server=server.url, template_args={"x": 1, "enable_thinking": True})
    asked = server.asked[-1]
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"] and asked["messages"][0]["content"] == "small"
    assert asked["tools"] == [{"type": "function", "function": tool}] and asked["chat_template_kwargs"] == {"x": 1, "enable_thinking": False}
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    again = parse(json.dumps(row).encode())
    assert again.tools == asked["tools"] and again.template_args == {"enable_thinking": False} and set(again.unused) == {"mood", "id", "prompt"}


# -- regenerate


def test_prompt_beside_messages_does_not_replace_them(target: Path, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "small"}, ASK, SAY, {"role": "user", "content": "why"}, SAY]
    source = put(tmp_path / "in.jsonl", {"prompt": "the dog", "messages": turns}, {"system": "blue", "question": "the cat", "response": "OLD", "category": "x"})
    written, echo = answered(target, source, tmp_path / "out.jsonl")
    assert len(echo.asked) == 3 and all("OLD" not in asked and "runs" not in asked for asked in echo.asked)
    by_first = {row["conversations"][0]["content"]: row for row in written}
    assert [message["role"] for message in by_first["small"]["conversations"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in by_first["blue"]["conversations"][:2]] == ["blue", "the cat"]
    assert by_first["blue"].keys() == {"id", "finish", "conversations", "sampling", "category"}  # what became messages is nowhere else
    facts = Target(TargetConfig(str(target)))
    requests, skipped = read_requests(source, facts, limit=None)
    assert sorted(facts.tokenizer().decode(ids) for ids in requests[:1]) == sorted(asked for asked in echo.asked if "small" in asked and "why" not in asked)
    assert len(requests) == 3 and not skipped


def test_a_given_call_that_is_context_only_stays_so(target: Path, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "we", "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "weight": 0}
    source = put(tmp_path / "in.jsonl", {"messages": [ASK, call, {"role": "tool", "content": "x"}, {**SAY, "weight": 0}]})
    (row,), _ = answered(target, source, tmp_path / "out.jsonl")
    assert [message.get("weight") for message in row["conversations"]] == [None, 0, None, None]
    assert parse(json.dumps(row).encode()).context == {1}


def test_regenerate_does_not_answer_its_own_output(target: Path, tmp_path: Path) -> None:
    put(tmp_path / "data" / "prompts.jsonl", *({"prompt": word} for word in ("one", "two", "be silent")))
    os.symlink(tmp_path / "data", tmp_path / "link")
    counts = []
    for source, output in (("data", "data/out.jsonl"), ("data", "link/out.jsonl"), ("link", "data/../data/out.jsonl"), ("link", "link/out.jsonl")):
        written, _ = answered(target, str(tmp_path / source), tmp_path / output)
        counts.append(len(written))
    assert counts == [2, 2, 2, 2] and (tmp_path / "data" / "out.jsonl.failed.jsonl").is_file()
    with pytest.raises(UserError, match="is also the output"):
        answered(target, str(tmp_path / "data" / "out.jsonl"), tmp_path / "link" / "out.jsonl")
    with pytest.raises(UserError, match="under the name of another kind of file"):
        regenerate(str(target), input=str(tmp_path / "data"), output=str(tmp_path / "out.jsonl.gz"))


# -- what is not used is named


ODD = [
    {"id": "a", "mood": "good", "messages": [{**ASK, "mood": "bad"}, SAY], "score": 3},
    {"id": "b", "mood": "bad", "messages": [ASK, {**SAY, "content": "sleeps"}]},
]
LINE = "keys that are not used: mood (2 rows), messages[].mood (1 row), score (1 row); metadata that is not used: id"


def test_keys_that_are_not_used_are_named_once_a_source(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = corpus(target, tmp_path, ODD, said)
    made.dataset("train")
    made.dataset("train")
    named = f"data.train: {tmp_path / 'train.jsonl'}: {LINE}"
    assert [line for line in said if "not used" in line] == [named]
    monkeypatch.setattr(prepared, "_build", lambda *a: pytest.fail("built again"))
    corpus(target, tmp_path, ODD, said).dataset("train")
    assert [line for line in said if "not used" in line] == [named] * 2  # from the cache as well
    split = tmp_path / "folder"
    for i, row in enumerate(ODD):
        put(split / f"{i}.jsonl", row)
    monkeypatch.undo()
    (tmp_path / "folder" / "notes.csv").touch()
    lines: list[str] = []
    prepared.prepare(
        str(split),
        options=DataOptions(64),
        tokenizer=AutoTokenizer.from_pretrained(target),
        vocab_size=384,
        cache_dir=tmp_path / "c",
        target_name="t",
        say=lines.append,
    )
    assert lines == [f"data.train: {split}: not read: notes.csv", f"data.train: {split}: {LINE}"]


def test_every_command_names_what_it_does_not_use(target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = put(tmp_path / "in.jsonl", *ODD)
    facts = Target(TargetConfig(str(target)))
    prepared.prepare(source, options=DataOptions(64), tokenizer=facts.tokenizer(), vocab_size=384, cache_dir=tmp_path / "cache", target_name="t")
    read_requests(source, facts, limit=None)
    written, _ = answered(target, source, tmp_path / "out.jsonl")
    assert all(row["mood"] for row in written)
    assert caplog.messages == [f"{key}: {source}: {LINE}" for key in ("data.train", "prompts", "input")]
    titles = [row.title for row in shown_rows(facts, source, options=DataOptions(64), skip=0, limit=2)]
    assert titles[0].endswith("; keys that are not used: mood, score, messages[].mood; metadata that is not used: id")
    assert titles[1].endswith("; keys that are not used: mood; metadata that is not used: id")


def test_records_are_not_written_into_the_data(target: Path, tmp_path: Path) -> None:
    from torchspec.data.datamodule import DraftDataModule

    put(tmp_path / "data" / "train.jsonl", *ODD)
    data = DraftDataModule(TargetConfig(str(target)), str(tmp_path / "data"), max_length=64, max_tokens=64, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"output=.* lies in its own input"):
        extract(data, str(tmp_path / "data" / "records"), (0,))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.jsonl"]
