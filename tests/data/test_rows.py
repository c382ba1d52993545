"""Rows of a file: all of them whatever form the file has, or an error that says what is wrong; no nulls that only a column's type put there."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from torchspec.data.conversations import parse
from torchspec.data.sources import find_sources, read_rows
from torchspec.errors import UserError

ONE, TWO = '{"messages": [{"role": "user", "content": "u"}], "n": 1}', '{"n": 2, "messages": []}'
PRETTY = json.dumps(json.loads(ONE), indent=2)


def read(path: Path) -> list[tuple[Any, int]]:
    (source,) = find_sources(str(path), config_key="data.train")
    return [(json.loads(text), place) for text, place in read_rows(source, config_key="data.train")]


def numbers(path: Path, text: str | bytes) -> list[Any]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row["n"] for row, _ in read(path)]


FORMS = {
    "arrays joined by cat": f"[{ONE}]\n[{TWO}]\n",
    "arrays without a line between": f"[{ONE}][{TWO}]",
    "an empty array first": f"[]\n[{ONE}, {TWO}]",
    "an array, then lines": f"[{ONE}]\n{TWO}\n",
    "lines": f"{ONE}\n{TWO}\n",
    "lines of Windows, and blank ones": f"\r\n{ONE}\r\n\r\n{TWO}\r\n",
    "objects over several lines": f"{PRETTY}\n{json.dumps(json.loads(TWO), indent=1)}",
    "objects in one line": f"{ONE}{TWO}",
    "objects in one line with a space": f"{ONE} {TWO}\n",
    "files with a mark at their beginning, joined": f"\ufeff[{ONE}]\n\ufeff[{TWO}]",
    "lines with a mark at their beginning": f"\ufeff{ONE}\n\ufeff{TWO}",
    "lines, then an array": f"{ONE}\n[{TWO}]\n",
    "an array a line": f"[{ONE}]\n[]\n[{TWO}]\n",
    "objects with their rows, joined": f'{{"data": [{ONE}]}}\n{{"data": [{TWO}]}}\n',
    "an object with its rows": f'{{"data": [{ONE}, {TWO}]}}',
    "an object with its rows, over lines": f'{{\n "rows" : [\n{PRETTY}\n,{TWO}]\n}}\n',
}


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_second_json_array_and_every_other_form_is_read_to_its_end(tmp_path: Path, form: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchspec.data.rows._CHUNK", chunk)
    assert numbers(tmp_path / "a.json", FORMS[form]) == [1, 2]


@pytest.mark.parametrize("form", ["arrays joined by cat", "an array a line", "lines, then an array", "objects over several lines", "lines"])
def test_every_form_is_read_whatever_suffix_it_has(tmp_path: Path, form: str) -> None:
    assert numbers(tmp_path / "a.jsonl", FORMS[form]) == [1, 2]


def test_a_file_is_unpacked_by_what_it_holds(tmp_path: Path) -> None:
    assert numbers(tmp_path / "a.jsonl", gzip.compress(FORMS["lines"].encode())) == [1, 2]  # copied under its old name
    assert numbers(tmp_path / "a.json.bz2", lzma.compress(FORMS["arrays joined by cat"].encode())) == [1, 2]
    assert numbers(tmp_path / "a.jsonl.gz", FORMS["lines"]) == [1, 2]  # a browser unpacked it


def test_a_pointer_of_git_lfs_is_named_and_not_read_as_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=r"is a pointer of Git LFS, not the data.*git lfs pull"):
            numbers(tmp_path / name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[{ONE}, {TWO},]", "after row 2.*a comma stands before the end of the array"),
        (f"[{ONE} {TWO}]", "after row 1.*stands where a comma should be"),
        (f"[{ONE},, {TWO}]", "after row 1"),
        (f"[{ONE}], [{TWO}]", "after row 1.*',' stands where a row should begin"),
        (f"[{ONE}]\n[{TWO}", "after row 2.*the array has no end"),
        (f"[{ONE}]\nand more", "after row 1.*'a' stands where a row should begin"),
        (f'{{"data": [{ONE}],\n"version": 1}}', "after row 1.*something stands beside the rows in 'data'"),
        (f"[{ONE}\x00]", "after row 1"),
        (f"[{ONE}]".encode("utf-16"), "it is UTF-16"),
        (ONE.encode("utf-16-be").join([b"\xfe\xff", b""]), "it is UTF-16"),
        (b'[{"n": "\xff"}]', "after row 0"),
    ],
)
def test_a_json_file_that_is_broken_is_refused_by_name(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json' cannot be read as json \({'' if 'UTF' in said else '.*'}{said if 'UTF' not in said else '.*' + said}"):
        numbers(tmp_path / "a.json", text)


def test_a_line_that_is_broken_costs_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"n": \n{ONE}\n\x00\x00\n{TWO}\n')
    (source,) = find_sources(str(path), config_key="data.train")
    rows = [(text, place) for text, place in read_rows(source, config_key="data.train")]
    assert [place for _, place in rows] == [1, 2, 3, 4] and rows[0][0] == b'{"n":' and json.loads(rows[3][0])["n"] == 2


def test_one_row_over_several_lines_and_rows_of_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(PRETTY)
    assert read(tmp_path / "a.json") == [(json.loads(ONE), 1)]
    (tmp_path / "a.json").write_text(f'{{"talks": [{ONE}]}}')  # refused as a row, by its keys
    assert read(tmp_path / "a.json") == [({"talks": [json.loads(ONE)]}, 1)]
    (tmp_path / "a.json").write_text(f'{{"data": [{ONE}], "version": 1}}')
    assert read(tmp_path / "a.json") == [({"data": [json.loads(ONE)], "version": 1}, 1)]
    (tmp_path / "a.json").write_text('{"data": [1, 2], "n": 3}\n{"n": 4}\n')
    assert [row["n"] for row, _ in read(tmp_path / "a.json")] == [3, 4]


# -- nulls


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]}


def tool(name: str, properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ASK = {"role": "user", "content": [{"type": "text", "text": "x?"}]}
ROWS = [
    {"messages": [ASK, call("weather", {"city": "Paris", "days": [{"n": 1}, {"m": 2}]})], "tools": [tool("weather", {"city": {"type": "string"}})]},
    {"messages": [ASK, call("count", {"n": 3})], "tools": [tool("count", {"n": {"type": "integer", "minimum": 0}})]},
    {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "so"}], "weight": 1}], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}], "chat_template_kwargs": {"date": "now"}},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "hub"])
def test_parquet_nulls_that_a_column_put_into_a_row_are_left_out(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = pa.Table.from_pylist([{"tools": None, "chat_template_kwargs": None, **row} for row in ROWS])
    path: Path | str = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(path)
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda repository, *, split: datasets.Dataset(table))
        path = "org/talks"
    (source,) = find_sources(str(path), config_key="data.train")
    found = [parse(text) for text, _ in read_rows(source, config_key="data.train")]
    plain = [parse(json.dumps(row).encode()) for row in ROWS]
    assert found == plain and all(not conversation.unused for conversation in found)


def test_a_genuine_null_of_json_and_of_a_map_stays(tmp_path: Path) -> None:
    given = call("f", {"city": None, "n": [None, 1]})
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASK, given]}))
    assert parse(json.dumps(read(tmp_path / "a.jsonl")[0][0]).encode()).messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None, "n": [None, 1]}
    column = pa.array([[("city", None), ("n", "3")]], type=pa.map_(pa.string(), pa.string()))
    pyarrow.parquet.write_table(pa.table({"arguments": column, "list": pa.array([[None, 1]])}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [({"arguments": {"city": None, "n": "3"}, "list": [None, 1]}, 1)]


def test_json_columns_of_datasets_are_what_they_hold(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.Json()})
    rows = [{"messages": ROWS[0]["messages"], "tools": ROWS[0]["tools"]}, {"messages": [ASK, call("g", {"a": None})], "tools": None}]
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        (source,) = find_sources(str(path), config_key="data.train")
        found = [parse(text) for text, _ in read_rows(source, config_key="data.train")]
        assert found == [parse(json.dumps(row).encode()) for row in rows]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "a.parquet")
