"""The cache: built once, found again only when nothing changed, whole or not there."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from transformers import AutoTokenizer

from tests.tiny import save_conversations, save_tokenizer
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.prepare import DataOptions, prepare
from torchspec.data.tokenise import Tokenise
from torchspec.errors import UserError
from torchspec.supervision import Unroll

VOCAB = 384


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def build(source: Path | list[str] | dict[str, float], cache: Path, tokenizer: Any, **changes: Any) -> TokenizedDataset:
    options = DataOptions(
        max_length=changes.pop("max_length", 256), min_supervised_tokens=changes.pop("min_supervised_tokens", 2), messages_key=changes.pop("messages_key", None)
    )
    given = str(source) if isinstance(source, Path) else source
    return prepare(given, **{"options": options, "tokenizer": tokenizer, "vocab_size": VOCAB, "cache_dir": cache, "target_name": "tiny", **changes})


def entries(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def chat(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def test_samples_come_back_in_order_with_their_place(tmp_path: Path, tokenizer: Any) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 50, turns=2)
    data = build(source, tmp_path / "cache", tokenizer)
    assert len(data) == 50 and data.summary.kept == 50 and data.summary.bad == 0
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for i in (0, 17, 49):
        expected = tokenizer.apply_chat_template(rows[i]["conversations"], tokenize=True, return_dict=True)["input_ids"]
        assert data.ids(i).tolist() == expected
        answers = "".join(m["content"] + "<|im_end|>" for m in rows[i]["conversations"] if m["role"] == "assistant")
        assert tokenizer.decode(data.ids(i)[data.mask(i) == 1].tolist()) == answers
        assert data.place(i) == f"{source}:{i + 1}"
    assert data.lengths.tolist() == [len(data.ids(i)) for i in range(50)]
    assert data.end_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def counts_of(mask: Any, steps: int) -> list[int]:
    """Of one conversation alone."""
    return list(Unroll(steps).counts(np.asarray(mask), np.array([0, len(mask)]))[0].tolist())


def test_counts_are_those_of_the_rule(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build(save_conversations(tmp_path / "a.jsonl", 40, turns=3), tmp_path / "cache", tokenizer)
    expected = [counts_of(data.mask(i), 5) for i in range(40)]
    assert data.measured(Unroll(5))[0].tolist() == expected
    monkeypatch.setattr("torchspec.data.dataset._CHUNK", 100)  # many chunks, some smaller than a conversation
    assert data.measured(Unroll(5))[0].tolist() == expected
    counted = np.zeros(VOCAB, dtype=np.int64)
    for i in range(40):
        np.add.at(counted, data.ids(i)[data.mask(i) == 1], 1)
    assert data.token_counts(VOCAB).tolist() == counted.tolist()
    assert data.token_counts(VOCAB + 64).shape == (VOCAB + 64,)


def test_counts_of_masks_that_begin_or_end_a_conversation(tmp_path: Path) -> None:
    masks = [[1, 1, 1, 1], [1, 1], [0, 1, 1], [1, 0, 1, 1, 1, 0, 0, 1], [1, 1, 1], [0, 0, 1, 1, 1, 1]]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"input_ids": list(range(len(m))), "loss_mask": m}) + "\n" for m in masks))
    data = build(source, tmp_path / "cache", None)
    assert data.measured(Unroll(4))[0].tolist() == [counts_of(m, 4) for m in masks]
    assert data.tokenizer == "" and data.mask(3).tolist() == masks[3]


def test_a_second_run_reads_the_cache(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 5)
    first = build(source, tmp_path / "cache", tokenizer)
    monkeypatch.setattr("torchspec.data.prepare._build", lambda *a: pytest.fail("built again"))
    os.utime(source, (1, 1))
    assert build(source, tmp_path / "cache", tokenizer).content == first.content
    assert entries(tmp_path / "cache") == [first.folder.name]


def test_everything_that_changes_the_result_makes_another_entry(tmp_path: Path, tokenizer: Any) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 5)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = "{# another #}" + tokenizer.chat_template
    cache = tmp_path / "cache"
    folders = [
        build(source, cache, tokenizer).folder,
        build(source, cache, tokenizer, max_length=40).folder,
        build(source, cache, tokenizer, min_supervised_tokens=3).folder,
    ]
    folders += [
        build(source, cache, tokenizer, messages_key="conversations").folder,
        build(source, cache, other).folder,
        build(source, cache, tokenizer, vocab_size=VOCAB + 1).folder,
    ]
    source.write_text(source.read_text() + chat("why", "because it is") + "\n")
    folders.append(build(source, cache, tokenizer).folder)
    assert len(set(folders)) == 7


def test_damage_is_noticed_and_built_anew(tmp_path: Path, tokenizer: Any) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 5)
    folder = build(source, tmp_path / "cache", tokenizer).folder
    for name in ("tokens.i32", "offsets.npy"):
        with (folder / name).open("r+b") as handle:
            handle.truncate(8)
        with pytest.raises(FileNotFoundError, match=name):
            TokenizedDataset(folder)
        assert len(build(source, tmp_path / "cache", tokenizer)) == 5


def test_a_crash_in_the_first_shard_leaves_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 5)
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            build(source, cache, tokenizer)
    assert entries(cache) == []
    key = build(source, cache, tokenizer).folder.name
    left = cache / f".{key}.{socket.gethostname()}"  # of a build that was killed before it had anything
    left.mkdir()
    (cache / key / "meta.json").unlink()
    build(source, cache, tokenizer)
    assert entries(cache) == [key]


def test_a_build_that_was_killed_goes_on(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were done are not tokenised again, and the result is that of an unbroken build."""
    source = save_conversations(tmp_path / "a.jsonl", 50)
    source.write_text(source.read_text().replace("row-7", 'row-7", "messages": [{"role": "narrator"}], "was": "', 1))
    monkeypatch.setattr("torchspec.data.build.SHARD", 8)
    unbroken = build(source, tmp_path / "unbroken", tokenizer, max_bad_fraction=0.1, messages_key=None)
    cache, seen = tmp_path / "cache", []
    whole = Tokenise.__call__

    def dies(self: Tokenise, batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(batch["row"]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return whole(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tokenise, "__call__", dies)
        build(source, cache, tokenizer, max_bad_fraction=0.1)
    (left,) = (path for path in cache.iterdir() if path.is_dir())
    with (left / "tokens.i32").open("ab") as handle:
        handle.write(b"cut off in the middle")
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Tokenise, "__call__", lambda self, batch: seen.append(len(batch["row"])) or whole(self, batch))  # type: ignore[func-returns-value]
        data = build(source, cache, tokenizer, max_bad_fraction=0.1)
    assert sum(seen) == 50 - 3 * 8
    assert data.content == unbroken.content and data.summary == unbroken.summary and entries(cache) == [data.folder.name]
    for name in ("tokens.i32", "mask.u8", "offsets.npy", "places.i32", "hashes.u64", "counts.npy", "bad_rows.jsonl"):
        assert (data.folder / name).read_bytes() == (unbroken.folder / name).read_bytes(), name


def test_one_process_builds_and_the_others_wait_for_it(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = save_conversations(tmp_path / "a.jsonl", 20), tmp_path / "cache"
    whole, tokenised = Tokenise.__call__, []

    def slow(self: Tokenise, batch: dict[str, Any]) -> dict[str, Any]:
        tokenised.append(len(batch["row"]))
        time.sleep(0.5)
        return whole(self, batch)

    monkeypatch.setattr(Tokenise, "__call__", slow)
    with ThreadPoolExecutor(3) as pool:  # a lock is of an open file: threads exclude each other as processes do
        built = list(pool.map(lambda _: build(source, cache, tokenizer), range(3)))
    assert sum(tokenised) == 20 and len({data.folder for data in built}) == 1 and entries(cache) == [built[0].folder.name]


def test_a_disk_without_locks(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("torchspec.data.prepare.fcntl.flock", refuses)
    data = build(save_conversations(tmp_path / "a.jsonl", 5), tmp_path / "cache", tokenizer)
    assert len(data) == 5 and entries(tmp_path / "cache") == [data.folder.name]


def test_weights_say_how_often_an_epoch(tmp_path: Path, tokenizer: Any) -> None:
    one, two, three = (save_conversations(tmp_path / f"{name}.jsonl", 20, seed=i) for i, name in enumerate("abc"))
    plain = build([str(one), str(two), str(three)], tmp_path / "cache", tokenizer)
    mixed = build({str(one): 2.5, str(two): 1, str(three): 0.25}, tmp_path / "cache", tokenizer)
    assert entries(tmp_path / "cache") == [plain.folder.name]  # the same tokens: nothing is tokenised again
    places = Counter(mixed.place(i) for i in range(len(mixed)))
    assert sorted(n for place, n in places.items() if str(one) in place) == [2] * 10 + [3] * 10
    assert sum(n for place, n in places.items() if str(two) in place) == 20 and sum(n for place, n in places.items() if str(three) in place) == 5
    assert len(mixed) == 75 == len(mixed.lengths) == len(mixed.hashes) == len(mixed.measured(Unroll(3))[0]) and mixed.content != plain.content
    again = build({str(one): 2.5, str(two): 1, str(three): 0.25}, tmp_path / "cache", tokenizer)
    assert again.content == mixed.content
    counted = np.zeros(VOCAB, dtype=np.int64)
    supervised = mixed.measured(Unroll(3))[0]
    for i in range(len(mixed)):
        np.add.at(counted, mixed.ids(i)[mixed.mask(i) == 1], 1)
        assert mixed.lengths[i] == len(mixed.ids(i)) and supervised[i].tolist() == counts_of(mixed.mask(i), 3)
    assert mixed.token_counts(VOCAB).tolist() == counted.tolist()
    with pytest.raises(UserError, match=r"data\.train\..*a\.jsonl=0 is no weight"):
        build({str(one): 0}, tmp_path / "cache", tokenizer)


def test_hashes_are_of_the_tokens(tmp_path: Path, tokenizer: Any) -> None:
    data = build(save_conversations(tmp_path / "a.jsonl", 9), tmp_path / "cache", tokenizer)
    assert data.hashes.tolist() == [xxhash.xxh3_64_intdigest(data.ids(i).astype("<i4").tobytes()) for i in range(9)]


def test_rendered_text_and_a_prefix_of_the_data(tmp_path: Path, tokenizer: Any) -> None:
    messages = tmp_path / "a.jsonl"
    messages.write_text(chat("hi", "the dog") + "\n" + chat("why", "we two") + "\n")
    texts = tmp_path / "b.jsonl"
    rows = [json.loads(line)["messages"] for line in messages.read_text().splitlines()]
    texts.write_text("".join(json.dumps({"text": tokenizer.apply_chat_template(row, tokenize=False)}) + "\n" for row in rows))
    assert build(texts, tmp_path / "cache", tokenizer).content == build(messages, tmp_path / "cache", tokenizer).content


def test_truncation_is_on_the_right_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(chat("hi", "the cat " * 50) + "\n" + chat("the dog " * 30, "two") + "\n" + chat("hi", "the small dog runs") + "\n")
    whole, cut = build(source, tmp_path / "cache", tokenizer), build(source, tmp_path / "cache", tokenizer, max_length=40)
    assert cut.summary.truncated == 1 and cut.summary.too_short == 1 and len(cut) == 2  # the long question leaves no answer
    assert cut.ids(0).tolist() == whole.ids(0)[:40].tolist() and cut.mask(0).tolist() == whole.mask(0)[:40].tolist()
    assert cut.place(1).endswith(":3")
    assert "1 with too few supervised tokens" in str(cut.summary) and "2 of 3 conversations" in str(cut.summary)


def test_bad_rows_are_named_and_bounded(tmp_path: Path, tokenizer: Any) -> None:
    source = tmp_path / "a.jsonl"
    narrator = json.dumps({"messages": [{"role": "narrator", "content": "x"}]})
    source.write_text("\n".join([chat("hi", "the dog"), "{broken", chat("hi", "the cat"), narrator, chat("hi", "we two")]) + "\n")
    with pytest.raises(UserError) as caught:
        build(source, tmp_path / "cache", tokenizer, max_bad_fraction=0.3)
    said = str(caught.value)
    assert f"{source}:2" in said and "no valid JSON" in said and f"{source}:4" in said and "narrator" in said and "2 of 5 rows" in said and "\n" not in said
    data = build(source, tmp_path / "cache", tokenizer, max_bad_fraction=0.4)
    assert len(data) == 3 and [data.place(i)[-1] for i in range(3)] == ["1", "3", "5"]
    listed = [json.loads(line)["place"] for line in (data.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert listed == [f"{source}:2", f"{source}:4"]
    with pytest.raises(UserError, match="2 of 5 rows are bad"):  # a cached entry does not make it lenient
        build(source, tmp_path / "cache", tokenizer, max_bad_fraction=0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ("[]", "holds no rows"),
        (chat("hi", "") + "\n", "leaves no conversation"),
        (chat("the " * 300, "dog"), "leaves no conversation"),
    ],
)
def test_an_empty_result_is_an_error(tmp_path: Path, tokenizer: Any, text: str, said: str) -> None:
    source = tmp_path / ("a.json" if text == "[]" else "a.jsonl")
    source.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        build(source, tmp_path / "cache", tokenizer)
    assert str(source) in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=r"has 100 tokens, but .*a\.jsonl:1 renders to id"):
        build(source, tmp_path / "cache", tokenizer, vocab_size=100)


def test_a_target_without_tokenizer_or_template(tmp_path: Path, tokenizer: Any) -> None:
    source = save_conversations(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match="no tokenizer"):
        build(source, tmp_path / "cache", None)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(UserError, match="ships no chat template"):
        build(source, tmp_path / "cache", bare)


def test_several_sources_and_processes_keep_the_order(tmp_path: Path, tokenizer: Any) -> None:
    one, two = save_conversations(tmp_path / "a.jsonl", 30), save_conversations(tmp_path / "b.jsonl", 20, seed=1)
    alone = build([str(one), str(two)], tmp_path / "cache", tokenizer)
    together = build([str(one), str(two)], tmp_path / "other", tokenizer, num_proc=2)
    assert together.content == alone.content
    assert together.place(29) == f"{one}:30" and together.place(30) == f"{two}:1"
    swapped = build([str(two), str(one)], tmp_path / "cache", tokenizer)
    assert swapped.content != alone.content
