"""Where a row may say that its images are, and what is wrong when they are not there; what images exclude."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_target
from tests.tiny_vl import save_image, save_vl_target
from torchspec.cli import main
from torchspec.data.checks import check_media
from torchspec.data.conversations import RowError, parse
from torchspec.data.corpus import Corpus
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.prepare import DataOptions
from torchspec.data.sources import encoded_images, find_sources, read_rows
from torchspec.engines.engine import OnPolicy
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

SAY = {"role": "assistant", "content": "a red dog"}


def ask(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, {"type": "text", "text": "the cat"}]}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vl_target(tmp_path_factory.mktemp("target"), "qwen2_5_vl", layers=1)


def dataset(target: Path, file: Path, *, num_proc: int = 1, **options: Any) -> TokenizedDataset:
    given = DataOptions(**{"max_length": 128, "media": "engine", **options})
    corpus = Corpus(
        Target(TargetConfig(str(target))), sources={"train": str(file)}, options=given, max_tokens=128, packs_per_step=1, seed=0,
        cache_dir=file.parent / "cache", num_proc=num_proc, say=lambda line: None,
    )  # fmt: skip
    return corpus.dataset("train")


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_way_to_give_an_image_is_the_same_image(target: Path, tmp_path: Path) -> None:
    picture = save_image(tmp_path / "a b.png")
    text = base64.b64encode(picture.read_bytes()).decode()
    sources: list[dict[str, Any]] = [
        {"type": "image", "image": "a b.png"},
        {"type": "image", "path": str(picture)},
        {"type": "image_url", "image_url": {"url": picture.as_uri()}},
        {"type": "image_url", "image_url": "data:image/png;base64," + text},
        {"type": "input_image", "image_url": "data:image/png;base64," + text},
        {"type": "image", "base64": text},
        {"type": "image", "image": text},
        {"type": "image", "image": {"bytes": text, "path": "somewhere/else.png"}},
    ]
    rows = [{"messages": [ask(source), SAY]} for source in sources]
    rows += [{"messages": [ask({"type": "image"}), SAY], name: value} for name, value in (("images", ["a b.png"]), ("image", "a b.png"))]
    data = dataset(target, write(tmp_path / "rows.jsonl", *rows), num_proc=2)
    assert len(data) == len(rows) and len({data.key(i) for i in range(len(rows))}) == 1
    assert [bool(data.images(i)[0].path) for i in range(len(rows))] == [True, True, True, False, False, False, False, False, True, True]
    other = dataset(target, write(tmp_path / "other.jsonl", {"messages": [ask({"type": "image", "image": str(save_image(tmp_path / "b.png", seed=1))}), SAY]}))
    assert other.ids(0).tolist() == data.ids(0).tolist() and other.key(0) != data.key(0)  # the same words about another picture
    assert other.content != data.content


def test_base64_may_be_as_long_as_a_path(target: Path, tmp_path: Path) -> None:
    short = save_image(tmp_path / "a.png", width=8, height=12)
    text = base64.b64encode(short.read_bytes()).decode()
    assert 255 < len(text) < 4096
    assert len(dataset(target, write(tmp_path / "rows.jsonl", {"messages": [ask({"type": "image", "image": text}), SAY]}))) == 1


def test_images_of_datasets_and_parquet_stay_encoded(target: Path, tmp_path: Path) -> None:
    import datasets

    picture = save_image(tmp_path / "a.png")
    rows = {"messages": [json.dumps([ask({"type": "image"}), SAY])], "images": [[{"bytes": picture.read_bytes(), "path": "gone.png"}]]}
    features = datasets.Features({"messages": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    data = dataset(target, tmp_path / "rows.parquet")
    kept = data.images(0)[0]
    assert kept.path == "" and (data.folder / "images.bin").read_bytes() == picture.read_bytes()
    assert encoded_images(made)[0]["images"][0] == {"bytes": picture.read_bytes(), "path": "gone.png"}
    single = datasets.Dataset.from_dict({"image": [str(picture)]}, features=datasets.Features({"image": datasets.Image()}))
    assert encoded_images(single)[0]["image"]["path"] == str(picture)
    (row, place) = next(read_rows(find_sources(str(tmp_path / "rows.parquet"), config_key="x")[0], config_key="x"))
    assert place == 1 and base64.b64decode(json.loads(row)["images"][0]["bytes"]) == picture.read_bytes()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ask({"type": "image", "image": "none.png"}), SAY]}, "has an image at none.png, which is no file (paths are relative to "),
        ({"messages": [ask({"type": "image_url", "image_url": {"url": "https://host/a.png"}}), SAY]}, "nothing is fetched from a network: download it and"),
        ({"messages": [ask({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}), SAY]}, "given as data: URL that does not decode"),
        ({"messages": [ask({"type": "image", "image": "words and words"}), SAY]}, "given as base64 that does not decode"),
        ({"messages": [ask({"type": "image", "image": "broken.png"}), SAY]}, "broken.png) that is no image that can be read (UnidentifiedImageError)"),
        ({"messages": [ask({"type": "image", "image": "half.png"}), SAY]}, "half.png) that is no image that can be read (OSError)"),
        ({"messages": [ask({"type": "image", "image": 3}), SAY]}, "has an image given as int, not as a path, a data: URL or base64"),
        ({"messages": [ask({"type": "image"}), SAY]}, "has an image part that says nowhere where its image is"),
        ({"messages": [ask({"type": "image"}), SAY], "images": ["a.png", "a.png"]}, "lists 1 more images than its messages have parts of type image"),
        ({"messages": [ask({"type": "video"}), SAY]}, "a part of type 'video'; engines are given images, but no video and no audio"),
        ({"messages": [ask(), {**SAY, "content": [{"type": "image", "image": "a.png"}]}]}, "has an image in an assistant message"),
        ({"messages": [ask({"type": "text", "text": "<|image_pad|>"}), SAY]}, "has 0 images, and the target's chat template writes 1 image tokens for them"),
        ({"messages": [ask({"type": "image", "image": "flat.png"}), SAY]}, "flat.png) that is refused by the target's image processor (absolute aspect ratio"),
    ],
)
def test_a_row_whose_image_cannot_be_used(target: Path, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    whole = save_image(tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.png").write_text("no image")
    save_image(tmp_path / "flat.png", width=900, height=2)
    with pytest.raises(UserError) as caught:
        dataset(target, write(tmp_path / "rows.jsonl", row))
    assert said in str(caught.value) and f"{tmp_path / 'rows.jsonl'}:1" in str(caught.value) and "\n" not in str(caught.value)


def test_placeholders_need_no_image() -> None:
    row = json.dumps({"messages": [ask({"type": "image"}, {"type": "video"}), SAY]}).encode()
    assert parse(row, media="placeholder").images == ()
    with pytest.raises(RowError, match="data.media: engine gives it images, placeholder trains on the rest"):
        parse(row)


def test_targets_that_are_given_no_images(target: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "the cat"}, SAY]})
    with pytest.raises(UserError, match="does not work with a target of type llama: it takes no images .known: qwen2_vl, qwen2_5_vl, qwen3_vl, "):
        dataset(save_target(tmp_path / "text", layers=1), file)
    llava = save_vl_target(tmp_path / "llava", "llava", layers=1)
    with pytest.raises(UserError, match=r"data\.image_positions='temporal' is an axis of RoPE that a target of type llava does not have"):
        dataset(llava, file, image_positions="temporal")
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))
    with pytest.raises(UserError, match="type llava_next: it has tokens for images that are laid out in a way of its own"):
        dataset(llava, file)
    (target / "preprocessor_config.json").rename(tmp_path / "away.json")
    try:
        with pytest.raises(UserError, match="has no image processor that loads"):
            dataset(target, file)
    finally:
        (tmp_path / "away.json").rename(target / "preprocessor_config.json")


def test_settings_that_images_exclude() -> None:
    check_media(media="engine", image_positions="temporal", engine="vllm", on_policy=None)
    check_media(media="placeholder", image_positions="index", engine="vllm_remote", on_policy=OnPolicy())
    for settings, said in (
        ({"image_positions": "temporal", "media": "placeholder"}, "data.image_positions='temporal' has no meaning without images"),
        ({"engine": "vllm_remote"}, "does not work with engine vllm_remote: it is not given images. Fix: use one of transformers, vllm, replay"),
        ({"on_policy": OnPolicy()}, "does not work with data.on_policy"),
    ):
        with pytest.raises(UserError, match=said):
            check_media(**{"media": "engine", "image_positions": "index", "engine": "vllm", "on_policy": None, **settings})  # type: ignore[arg-type]


def test_show_data_shows_the_tokens_of_images(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "a.png")
    file = write(tmp_path / "rows.jsonl", {"messages": [ask({"type": "image", "image": "a.png"}), SAY]})
    main(["show_data", "--target", str(target), "--input", str(file), "--media", "engine"])
    shown = capsys.readouterr().out
    assert "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>the cat<|im_end|>" in shown and "⟦a red dog<|im_end|>⟧" in shown
