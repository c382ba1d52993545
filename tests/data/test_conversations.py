"""What is accepted as a source and as a row, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from torchspec.data.conversations import RowError, parse
from torchspec.data.sources import find_sources, read_rows
from torchspec.errors import UserError

ROW = {"id": "a", "conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def rows_of(path: Path) -> list[tuple[dict, int]]:
    return [
        (json.loads(text), line) for source in find_sources(str(path), config_key="data.train") for text, line in read_rows(source, config_key="data.train")
    ]


@pytest.mark.parametrize("form", ["jsonl", "json array", "json lines", "parquet", "arrow stream", "arrow file"])
def test_every_file_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    rows = [{**ROW, "id": str(i)} for i in range(3)]
    if form in ("jsonl", "json lines"):
        path = tmp_path / ("a.jsonl" if form == "jsonl" else "a.json")
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif form == "json array":
        path = tmp_path / "a.json"
        path.write_text("\n " + json.dumps(rows, indent=1))
    elif form == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "a.arrow"
        table = pa.Table.from_pylist(rows)
        make = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    found = rows_of(path)
    assert [row for row, _ in found] == rows
    assert [line for _, line in found] == [1, 2, 3]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(ROW) + "\n\n\n" + json.dumps(ROW) + "\n", encoding="utf-8")
    assert [line for _, line in rows_of(path)] == [1, 4]


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({**ROW, "id": name}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    assert [row["id"] for row, _ in rows_of(tmp_path)] == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_a_saved_datasets_folder_is_read_without_its_json_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "saved")
    assert [row["id"] for row, _ in rows_of(tmp_path / "saved")] == ["a", "a"]


def test_content_and_not_the_date_of_a_file_makes_its_fingerprint(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("x")
    two.write_text("x")
    first = find_sources(str(one), config_key="data.train")[0].fingerprint
    assert find_sources(str(two), config_key="data.train")[0].fingerprint == first
    one.write_text("y")
    assert find_sources(str(one), config_key="data.train")[0].fingerprint != first


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere.jsonl", "does not exist"), ("no where/x", "does not exist"), ("empty", "folder without"), ("a.txt", "is a .txt file")],
)
def test_wrong_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match=said) as caught:
        find_sources(name, config_key="data.train")
    assert name in str(caught.value) and "data.train" in str(caught.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("this is no parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*cannot be read as parquet"):
        rows_of(path)


def parsed(**row: object) -> object:
    return parse(json.dumps(row).encode())


def test_openai_and_sharegpt_rows_mean_the_same() -> None:
    openai = parsed(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])
    sharegpt = parsed(conversations=[{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}])
    assert openai == sharegpt


def test_text_parts_are_joined_and_extra_fields_kept() -> None:
    conversation = parse(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "weight": 3},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "thinking": "hm"},
                ],
                "tools": '[{"type": "function"}]',
            }
        ).encode()
    )
    assert conversation.messages[0] == {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert conversation.messages[1]["content"] == "" and conversation.messages[1]["reasoning_content"] == "hm" and conversation.messages[1]["tool_calls"]
    assert conversation.tools == [{"type": "function"}]


def test_finish_length_marks_the_last_answer_or_the_message_that_says_so() -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}] * 2
    assert parse(json.dumps({"messages": messages, "finish": "length"}).encode()).cut == {3}
    assert parse(json.dumps({"messages": messages, "finish": "stop"}).encode()).cut == set()
    messages = [dict(m) for m in messages]
    messages[1]["finish"] = "length"
    assert parse(json.dumps({"messages": messages}).encode()).cut == {1}


def test_a_key_of_the_users_own() -> None:
    row = json.dumps({"dialog": ROW["conversations"], "messages": "something else"}).encode()
    assert len(parse(row, messages_key="dialog").messages) == 2
    with pytest.raises(RowError, match="has no talk"):
        parse(row, messages_key="talk")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no valid JSON"),
        ("\xff", "no valid JSON"),
        ("[1]", "is a list, not an object"),
        ('{"question": 1, "answer": 2}', "has no conversations or messages .keys: question, answer"),
        ('{"messages": []}', "not a list of messages"),
        ('{"messages": "hello"}', "not a list of messages"),
        ('{"messages": ["hello"]}', "message 0 is a str"),
        ('{"messages": [{"content": "x"}]}', "message 0 has neither role nor from"),
        ('{"messages": [{"role": "narrator", "content": "x"}]}', "message 0 has the unknown role 'narrator'"),
        ('{"messages": [{"from": "robot", "value": "x"}]}', "message 0 has the unknown role 'robot'"),
        ('{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]}', "message 0: its content is a int"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}', "message 0: its content is missing"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "a part of type 'image', which the engine is not given",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no assistant message"),
        ('{"input_ids": [1, 2]}', "input_ids without loss_mask"),
        ('{"input_ids": [1, 2], "loss_mask": [1]}', "input_ids has 2 entries and loss_mask 1"),
        ('{"input_ids": [1, -2], "loss_mask": [1, 1]}', "input_ids is not a list of token ids"),
        ('{"input_ids": [1, 2], "loss_mask": [1, 2]}', "loss_mask is not a list of 0 and 1"),
    ],
)
def test_what_is_wrong_with_a_row(text: str, said: str) -> None:
    with pytest.raises(RowError, match=said):
        parse(text.encode("latin-1"))


@pytest.mark.parametrize("chunk", [3, 16, 1 << 20])
def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("torchspec.data.rows._CHUNK", chunk)
    rows = [{"id": i, "messages": [{"role": "user", "content": 'émigré 🦜 ] , [ \\ " ' * i}]} for i in range(20)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(rows, indent=1, ensure_ascii=chunk == 3), encoding="utf-8")
    assert rows_of(path) == list(zip(rows, range(1, 21), strict=True))
    for text, said in (
        ("[1, 23, 456]", None),
        ("[]", None),
        ('[{"a": 1}, {"b"', "after row 1"),
        ('[{"a": 1}', "has no end|after row 1"),
        ("[1 2", "no valid JSON"),
    ):
        path.write_text(text)
        if said is None:
            assert [row for row, _ in rows_of(path)] == json.loads(text)
        else:
            with pytest.raises(UserError, match=said):
                rows_of(path)


def test_tool_calls_have_their_arguments_as_objects() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [call, {"name": "g", "arguments": {"y": 2}}]}]
    calls = parse(json.dumps({"messages": given}).encode()).messages[1]["tool_calls"]
    assert calls == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}},
    ]


def test_messages_as_text_and_media_as_placeholders() -> None:
    given = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_text", "text": "u"}]},
        {"role": "assistant", "content": "a"},
    ]
    conversation = parse(json.dumps({"messages": json.dumps(given)}).encode(), media="placeholder")
    assert conversation.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "u"}]
