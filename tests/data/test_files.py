"""Which files of a folder are read: each once, of one split, and the rest by name (issues of the field: hidden copies, shards left out, test data trained)."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from torchspec.data.files import kind_of, split_of
from torchspec.data.sources import check_outside, find_sources, read_rows
from torchspec.errors import UserError


def row(id: str) -> dict[str, object]:
    return {"id": id, "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}


def put(path: Path, *ids: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row(id or path.name)) + "\n" for id in ids or [""]))
    return path


def ids(given: object, said: list[str] | None = None, **options: object) -> list[str]:
    say = (lambda line: None) if said is None else said.append
    sources = find_sources(given if isinstance(given, list | dict) else str(given), config_key="data.train", say=say, **options)  # type: ignore[arg-type]
    return [json.loads(text)["id"] for source in sources for text, _ in read_rows(source, config_key="data.train")]


def test_folders_hidden_files_and_backups_are_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for name in (
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        ".cache/x/b.jsonl",
        "_temporary/0/a.jsonl",
        "._a.jsonl",
        "a.jsonl~",
        "__MACOSX/a.jsonl",
        "#a.jsonl#",
        ".git/x.json",
    ):
        put(tmp_path / name)
    said: list[str] = []
    assert ids(tmp_path, said) == ["a.jsonl"]
    assert len(said) == 1 and all(name in said[0] for name in (".ipynb_checkpoints/ (hidden)", ".cache/", "._a.jsonl", "a.jsonl~ (a backup)", "__MACOSX/"))
    assert ids(tmp_path / ".cache") == ["b.jsonl"]  # what is named is read


def test_folders_compressed_files_and_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    put(tmp_path / "0.JSONL")
    text = [(json.dumps(row(f"{i}")) + "\n").encode() for i in range(1, 5)]
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(text[0]) + gzip.compress(text[0]))  # members joined by cat
    (tmp_path / "2.json.bz2").write_bytes(bz2.compress(b"[" + text[1] + b"]"))
    (tmp_path / "3.jsonl.XZ").write_bytes(lzma.compress(text[2]))
    (tmp_path / "4.ndjson.zst").write_bytes(2 * pa.compress(text[3], codec="zstd", asbytes=True))
    pyarrow.feather.write_feather(pa.Table.from_pylist([row("5")]), tmp_path / "5.feather")
    pyarrow.parquet.write_table(pa.Table.from_pylist([row("6")]), tmp_path / "6.Parquet")
    assert ids(tmp_path) == ["0.JSONL", "1", "1", "2", "3", "4", "4", "5", "6"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_that_ends_early_is_named(tmp_path: Path, suffix: str) -> None:
    whole = "".join(json.dumps(row(str(i))) + "\n" for i in range(200)).encode()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda b: pa.compress(b, codec="zstd", asbytes=True)}[suffix](whole)
    for content in (packed[: len(packed) // 2], b"no such file"):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}' cannot be read as jsonl\.{suffix}"):
            ids(tmp_path / f"a.jsonl.{suffix}")


def test_folders_what_is_not_read_is_named_in_one_line(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for name in ("b.csv", "c.tar.gz", "d.jsonl.zip", "README.md", "e.txt", "f.tsv", "g.gz", "h.parquet.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.jsonl").touch()
    said: list[str] = []
    assert ids(tmp_path, said) == ["a.jsonl"]
    assert said == [f"data.train: {tmp_path}: not read: README.md, b.csv, c.tar.gz, d.jsonl.zip, e.txt, empty.jsonl (empty), f.tsv, g.gz, h.parquet.gz"]
    for i in range(30):
        (tmp_path / f"x{i}.csv").touch()
    ids(tmp_path, said)
    assert said[-1].endswith(" and 19 more")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"is a folder without anything to read \(not read: README.md, b.csv"):
        ids(tmp_path)
    for name in ("b.csv", "c.tar.gz", "h.parquet.gz"):
        with pytest.raises(UserError, match=rf"is a .*{name[1:]} file"):
            ids(tmp_path / name)


def test_folders_links_are_followed_once(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    put(data / "b.jsonl")
    put(other / "c.jsonl")
    (data / "deep").mkdir()
    os.symlink(other, data / "linked")
    os.symlink("b.jsonl", data / "a-link.jsonl")  # sorts before the file, and is its second name all the same
    os.link(data / "b.jsonl", data / "hard.jsonl")
    os.symlink("..", data / "deep" / "loop")
    os.symlink("self.jsonl", data / "self.jsonl")
    os.symlink("gone.jsonl", data / "broken.jsonl")
    os.symlink(other, data / "linked-again")
    os.symlink(put(tmp_path / "blob", "from a blob"), data / "named.jsonl")
    said: list[str] = []
    assert ids(data, said) == ["b.jsonl", "c.jsonl", "from a blob"]
    for name in ("a-link.jsonl (the same as b.jsonl)", "hard.jsonl (the same as b.jsonl)", "deep/loop/ (the same as ./)", "self.jsonl (a link that leads no"):
        assert name in said[0]
    assert "broken.jsonl (a link that leads nowhere)" in said[0] and "linked-again/ (the same as linked/)" in said[0]
    for name in ("broken.jsonl", "self.jsonl"):
        with pytest.raises(UserError, match="is a link that leads nowhere"):
            ids(data / name)
    os.symlink(data, tmp_path / "all")
    assert ids(tmp_path / "all") == ["b.jsonl", "c.jsonl", "from a blob"]


@pytest.mark.parametrize("second", ["a.jsonl", "link.jsonl", "../data/a.jsonl", "."])
def test_a_file_that_is_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    folder = tmp_path / "data"
    put(folder / "a.jsonl")
    os.symlink("a.jsonl", folder / "link.jsonl")
    monkeypatch.chdir(folder)
    for given in (["a.jsonl", second], {"a.jsonl": 1.0, second: 2.0}):
        if len(given) == 2:
            with pytest.raises(UserError, match="is named twice"):
                ids(given)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"], ["train", "train", "test"]),
        (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"], ["train_sft", "train_gen"]),
        (["train.jsonl", "validation.jsonl", "dev/x.jsonl", "my_val_2.jsonl"], ["train", "validation", "validation", "validation"]),
        (["train/a.jsonl", "eval/train.jsonl", "split=test/part-0.jsonl"], ["train", "test", "test"]),
        (["a.jsonl", "b.jsonl", "train.jsonl", "contest.jsonl", "latest.jsonl", "data-00000-of-00002.jsonl", "train-test-mix.jsonl"], ["train"] * 7),
    ],
)
def test_splits_are_told_by_names_as_on_the_hub(names: list[str], splits: list[str]) -> None:
    assert [split_of(Path(name)) for name in names] == splits


def test_folders_of_several_splits_need_one_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "train-2.jsonl", "test.jsonl", "sub/validation/x.jsonl"):
        put(tmp_path / name)
    with pytest.raises(UserError) as caught:
        ids(tmp_path)
    assert f"holds several splits: test (1 file), train (2 files), validation (1 file). Fix: name one ({tmp_path}:train)" in str(caught.value)
    assert ids(f"{tmp_path}:train") == ["a.jsonl", "train-2.jsonl"]
    assert ids(f"{tmp_path}:val") == ["x.jsonl"]
    assert ids(f"{tmp_path}:train+test") == ["a.jsonl", "test.jsonl", "train-2.jsonl"]
    with pytest.raises(UserError, match="names the split dessert, and the folder has test"):
        ids(f"{tmp_path}:dessert")
    with pytest.raises(UserError, match="names a split of a file"):
        ids(f"{tmp_path}/test.jsonl:train")
    put(tmp_path / "with:colon" / "a.jsonl")
    assert ids(tmp_path / "with:colon") == ["a.jsonl"]
    assert ids(tmp_path / "sub") == ["x.jsonl"]


def test_saved_data_sets_are_read_by_their_own_lists(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list([row(str(i)) for i in range(4)])
    datasets.DatasetDict(train=made.select(range(3)), test=made.select([3])).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match=r"holds several splits: test \(1 file\), train \(1 file\)"):
        ids(tmp_path / "dict")
    assert ids(f"{tmp_path}/dict:train") == ["0", "1", "2"] and ids(f"{tmp_path}/dict:test") == ["3"]
    datasets.DatasetDict(train_sft=made).save_to_disk(tmp_path / "one")
    assert ids(tmp_path / "one") == ["0", "1", "2", "3"] == ids(f"{tmp_path}/one:train_sft")
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    shard = sorted((tmp_path / "saved").glob("data-*.arrow"))[0]
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(shard.read_bytes())  # what .map leaves
    said: list[str] = []
    assert ids(tmp_path / "saved", said) == ["0", "1", "2", "3"]
    assert said == [f"data.train: {tmp_path}/saved: not read: cache-0123.arrow (no part of the saved data set)"]
    assert ids(tmp_path / "saved" / "cache-0123.arrow")
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}, which the saved data set names"):
        ids(tmp_path / "saved")
    put(tmp_path / "clone" / "train.jsonl")
    (tmp_path / "clone" / "dataset_infos.json").write_text("{}")
    assert ids(tmp_path / "clone") == ["train.jsonl"]


def test_an_output_is_no_input_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path / "data" / "prompts.jsonl")
    output = put(tmp_path / "data" / "out.jsonl")
    os.symlink(tmp_path / "data", tmp_path / "link")
    for written in (output, tmp_path / "link" / "out.jsonl", tmp_path / "data" / ".." / "data" / "out.jsonl"):
        said: list[str] = []
        assert ids(tmp_path / "link", said, written=[written]) == ["prompts.jsonl"] and "out.jsonl (the output)" in said[0]
        with pytest.raises(UserError, match="is also the output"):
            ids(output, written=[written])


def test_an_output_folder_inside_the_input_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "data" / "deep" / "a.jsonl")
    os.symlink(tmp_path / "data", tmp_path / "link")
    for inside in ("data", "data/records", "data/deep/x/y", "link/records", "data/../data/records"):
        with pytest.raises(UserError, match=r"data\.tee=.* lies in its own input"):
            check_outside(tmp_path / inside, [str(tmp_path / "data")], field="data.tee")
    check_outside(tmp_path / "records", str(tmp_path / "data"), field="data.tee")


def test_records_and_lists_of_failures_in_a_folder_are_no_rows(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "a.jsonl.failed.jsonl")
    put(tmp_path / "records" / "failed_samples.jsonl")
    (tmp_path / "records" / "manifest.json").write_text('{"format": 1, "stored": "exact", "record": {}}')
    said: list[str] = []
    assert ids(tmp_path, said) == ["a.jsonl"]
    assert "records/ (records of hidden states)" in said[0] and "a.jsonl.failed.jsonl" in said[0]


def test_files_that_may_be_one_are_named(tmp_path: Path) -> None:
    text = put(tmp_path / "a.jsonl", "1").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "copy.jsonl").write_bytes(text)
    put(tmp_path / "a.b.jsonl", "2")
    said: list[str] = []
    assert ids(tmp_path, said) == ["2", "1", "1", "1"]
    assert said == [f"data.train: {tmp_path}: all of these are read: a.jsonl, copy.jsonl (the same bytes); a.jsonl, a.jsonl.gz (one name)"]


def test_what_is_no_file_is_told_so() -> None:
    with pytest.raises(UserError, match="is no file and no folder"):
        ids("/dev/null")


def test_a_run_and_a_model_in_a_folder_are_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for name in ("run/provenance.json", "run/failed_samples.jsonl", "draft/config.json", "draft/tokenizer.json"):
        put(tmp_path / name)
    said: list[str] = []
    assert ids(tmp_path, said) == ["a.jsonl"]
    assert "draft/ (a model)" in said[0] and "run/provenance.json" in said[0]


def test_the_target_an_adapter_and_logs_in_a_folder_are_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    for name in (
        *("target/config.json", "target/model-00001-of-00002.safetensors", "target/processor_config.json", "target/chat_template.json"),
        *("lora/adapter_config.json", "lora/adapter_model.safetensors", "lora/trainer_state.json", "wandb/run-1/files/wandb-summary.json"),
        *("mistral/params.json", "mistral/tekken.json", "mistral/consolidated.safetensors.index.json", "~$a.json"),
    ):
        put(tmp_path / name)
    put(tmp_path / "params" / "params.json", "read")  # a name alone is none
    said: list[str] = []
    assert ids(tmp_path, said) == ["a.jsonl", "read"]
    assert all(f"{name}/ (a model)" in said[0] for name in ("target", "lora", "mistral")) and "wandb/ (no data)" in said[0]


def test_what_is_no_path_is_told_so(tmp_path: Path) -> None:
    put(tmp_path / "d:1" / "train.jsonl")
    assert ids(f"{tmp_path}/d:1") == ids(f"{tmp_path}/d:1:train") == ["train.jsonl"]
    for given, said in (
        ("", "is empty"),
        (" ", "is empty"),
        ("https://example.org/a.jsonl", "is a URL"),
        (f"{tmp_path}/*.jsonl", "patterns are not expanded"),
        (f"{tmp_path}/d:1:train[:10%]", "names a slice of a file or folder"),
        (f"{tmp_path}/d:1:test", "names the split test"),
    ):
        with pytest.raises(UserError, match=said):
            ids(given)


def test_a_cache_in_a_folder_is_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "cache" / "0123" / "bad_rows.jsonl")
    (tmp_path / "cache" / "0123" / "tokens.i32").touch()
    assert ids(tmp_path) == ["a.jsonl"]


def test_kinds_of_names() -> None:
    assert kind_of("a.b.JSON.GZ") == ("json", "gz") and kind_of("x.ndjson") == ("jsonl", "")
    assert [kind_of(name) for name in ("a.gz", "a.parquet.gz", "jsonl", "a.zip", "a.jsonl.lz4")] == [None] * 5
