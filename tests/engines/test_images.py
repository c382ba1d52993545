"""Conversations with images: tokens as the target's own processor makes them, and records that equal what Transformers computes of text and pixels."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.engines.parts import read_record
from tests.engines.test_transformers_engine import work_off
from tests.tiny_vl import FAMILIES, save_image, save_vl_target
from torchspec.data.corpus import Corpus
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.prepare import DataOptions
from torchspec.engines.engine import EngineConfig, Job
from torchspec.engines.messages import Failed, Finished, Lease
from torchspec.engines.transformers.engine import TransformersEngine
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.images import VisionTower, temporal_positions
from torchspec.target import Target, TargetConfig
from torchspec.transfer import StoreServer, open_store
from torchspec.transfer.record import Record

MAX_LENGTH = 128
AUX = (0, 1, 2, 4)
SIZES = [(60, 90), (120, 40), (28, 28)]
"""Width and height of the images."""


def save_rows(folder: Path) -> tuple[Path, list[list[Path]]]:
    """One image from a file, two of which one is inside the row, one cut off by the length, and none at all; and the images of each."""
    a, b, c = (save_image(folder / f"{i}.png", width=width, height=height, seed=i) for i, (width, height) in enumerate(SIZES))
    inside = "data:image/png;base64," + base64.b64encode(b.read_bytes()).decode()
    answer = {"role": "assistant", "content": "a red dog sleeps under the small cat"}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "the cat runs"}]}, answer]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "where is "}, {"type": "image_url", "image_url": {"url": inside}}, {"type": "image"}]},
                answer,
                {"role": "user", "content": "and why"},
                answer,
            ],
            "images": [str(c)],
        },
        {"messages": [{"role": "user", "content": "the cat"}, answer,
                      {"role": "user", "content": [{"type": "text", "text": "big " * 86}, {"type": "image"}]}, answer],
         "image": {"bytes": base64.b64encode(a.read_bytes()).decode(), "path": None}},
        {"messages": [{"role": "user", "content": "you and they"}, answer]},
    ]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, [[a], [b, c], [], []]


def tokenised(target: Path, file: Path, **options: Any) -> TokenizedDataset:
    given = DataOptions(max_length=MAX_LENGTH, media="engine", **options)
    corpus = Corpus(
        Target(TargetConfig(str(target))), sources={"train": str(file)}, options=given, max_tokens=MAX_LENGTH, packs_per_step=1, seed=0,
        cache_dir=target / "cache", say=lambda line: None,
    )  # fmt: skip
    return corpus.dataset("train")


def leases_of(data: TokenizedDataset) -> list[Lease]:
    requests = [data.request(i, epoch=0) for i in range(len(data))]
    return [Lease(i, f"key-{i}", "train", i, request.ids, images=request.images) for i, request in enumerate(requests)]


def job_for(target: Path, server: StoreServer, **config: Any) -> Job:
    spec = Target(TargetConfig(str(target))).record_spec(AUX, tokenizer="none")
    given = EngineConfig(**{"batch_samples": 4, "batch_tokens": 64, "threads": 1, **config})
    return Job(TargetConfig(str(target)), spec, server.address, given, max_length=MAX_LENGTH, device="cpu", images=True)


@torch.inference_mode()
def expected(model: Any, tower: VisionTower, ids: list[int], files: list[Path]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Transformers' hidden_states 0..L-1 and the state after the final norm, of the whole model given ids and pixels. Qwen3-VL adds features of images after
    its first blocks, behind what Transformers shows: there, what the blocks are given."""
    seen = tower.inputs([Image.open(file).convert("RGB") for file in files]) if files else {}
    tokens = torch.tensor([ids])
    if tower.has_axes and files:
        seen["mm_token_type_ids"] = (tokens == tower.image_id).int()
    entered: list[torch.Tensor] = []
    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0].clone())) for layer in layers]
    out = model(input_ids=tokens, output_hidden_states=True, **seen)
    for handle in handles:
        handle.remove()
    shown = [state[0] for state in out.hidden_states[:-1]]
    added = [i for i, (a, b) in enumerate(zip(entered, shown, strict=True)) if not torch.equal(a, b)]
    assert added == ([1, 2] if model.config.model_type == "qwen3_vl" and files else [])
    return entered, out.hidden_states[-1][0]


def check(records: dict[int, Record], data: TokenizedDataset, target: Path, files: list[list[Path]], *, tolerance: float) -> None:
    """Records against the whole model of Transformers; and that the pixels reach the states at all."""
    model = Target(TargetConfig(str(target))).auto_class().from_pretrained(target)
    tower = VisionTower(Target(TargetConfig(str(target))))
    hooks = HiddenStateHooks(model, (8,), num_layers=8)
    for index, record in records.items():
        ids, rows = data.ids(index).tolist(), record.last.shape[0]
        assert record.input_ids.tolist() == ids
        states, final = expected(model, tower, ids, files[index])
        with torch.inference_mode():
            pairs = [*zip(record.aux.view(rows, len(AUX), -1).unbind(1), [states[i] for i in AUX], strict=True), (hooks.norm(record.last), final)]
        for ours, theirs in pairs:
            assert (ours - theirs[:rows]).norm() <= tolerance * theirs[:rows].norm()
        if files[index]:
            blank = [save_image(target / f"other-{f.name}", width=Image.open(f).width, height=Image.open(f).height, seed=99) for f in files[index]]
            assert (expected(model, tower, ids, blank)[1][:rows] - pairs[-1][0]).norm() > 100 * tolerance * final.norm()


def read(server: StoreServer, job: Job, finished: list[Finished], leases: list[Lease]) -> dict[int, Record]:
    store = open_store(server.address)
    records = {done.lease: read_record(store, leases[done.lease].key, done.nbytes, job.spec) for done in finished}
    store.close()
    return records


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformers_engine(family: str, server: StoreServer, tmp_path: Path) -> None:
    target = save_vl_target(tmp_path / "target", family)
    file, files = save_rows(tmp_path)
    data = tokenised(target, file)
    job = job_for(target, server)
    engine = TransformersEngine(job)
    engine.start()
    leases = leases_of(data)
    finished, failed = work_off(engine, leases)
    assert not failed and len(finished) == 4
    check(read(server, job, finished, leases), data, target, files, tolerance=1e-5)
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "2.png").unlink()
    _, failed = work_off(engine, leases[:2])
    assert not any(problem.retry for problem in failed)
    assert [problem.reason for problem in sorted(failed, key=lambda f: f.lease)] == [
        f"image {tmp_path}/0.png has changed since it was tokenised",
        f"image {tmp_path}/2.png cannot be read here (No such file or directory): engines need the files of the data, on a disk that they share",
    ]
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_targets_processor(family: str, tmp_path: Path) -> None:
    """One token for an image becomes as many as Transformers' own processor writes; the mask moves along; no image is cut in two."""
    target = save_vl_target(tmp_path / "target", family)
    file, files = save_rows(tmp_path)
    data = tokenised(target, file)
    tokenizer = Target(TargetConfig(str(target))).tokenizer()
    for index in range(4):
        ids, mask = data.ids(index), data.mask(index).astype(bool)
        answer = "a red dog sleeps under the small cat<|im_end|>"
        assert tokenizer.decode(ids[mask].tolist()) == answer * (2 if index == 1 else 1)
        assert [image.tokens for image in data.images(index)] == [tokens_of(family, size) for size in ([SIZES[0]], SIZES[1:], [], [])[index]]
        places = np.concatenate([np.arange(image.at, image.at + image.tokens) for image in data.images(index)] or [np.zeros(0)])
        assert np.flatnonzero(ids == VisionTower(Target(TargetConfig(str(target)))).image_id).tolist() == places.tolist()
    assert len(data.ids(2)) < MAX_LENGTH and tokenizer.decode(data.ids(2).tolist()).endswith("big " if family == "llava" else "big <|vision_start|>")
    if family != "llava" and importlib.util.find_spec("torchvision") is None:
        return  # the whole processor of these has a part for video, which needs torchvision
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(target)
    for index, pictures in enumerate(files[:2]):
        row = json.loads(file.read_text().splitlines()[index])
        plain = [{**m, "content": [{"type": "image"} if "image" in part["type"] else part for part in m["content"]]} if isinstance(m["content"], list) else m
                 for m in row["messages"]]  # fmt: skip
        text = tokenizer.apply_chat_template(plain, tokenize=False)
        made = processor(text=[text], images=[Image.open(picture) for picture in pictures])
        assert data.ids(index).tolist() == made["input_ids"][0]


def tokens_of(family: str, size: tuple[int, int]) -> int:
    """By hand: the area in patches of 28 (32) pixels, rounded; Llava scales and cuts every image to 4 x 4 patches."""
    if family == "llava":
        return 16
    side = 32 if family.startswith("qwen3") else 28
    width, height = size
    return max(round(width / side), 1) * max(round(height / side), 1)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava"])
def test_positions_are_the_targets_first_axis(family: str, tmp_path: Path) -> None:
    """``image_positions: temporal`` against Transformers' own index of multi-axis RoPE, and (where it is installed) vLLM's."""
    target = save_vl_target(tmp_path / "target", family)
    file, files = save_rows(tmp_path)
    data = tokenised(target, file, image_positions="temporal")
    assert data.content != tokenised(target, file).content and all(tokenised(target, file).positions(i, 8) is None for i in range(4))
    model = Target(TargetConfig(str(target))).auto_class().from_pretrained(target)
    tower = VisionTower(Target(TargetConfig(str(target))))
    for index in range(2):
        ids = torch.tensor([data.ids(index).tolist()])
        grid = tower.inputs([Image.open(picture).convert("RGB") for picture in files[index]])["image_grid_thw"]
        axes, _ = model.model.get_rope_index(ids, mm_token_type_ids=(ids == tower.image_id).int(), image_grid_thw=grid)
        ours = data.positions(index, ids.shape[1])
        assert ours is not None and ours.tolist() == axes[0, 0].tolist() != list(range(ids.shape[1]))
        text = ids[0] != tower.image_id
        assert all(axes[axis, 0][text].tolist() == ours[text.numpy()].tolist() for axis in (1, 2))  # text has one position on all axes
    assert data.positions(3, 9) is None


def test_temporal_positions_by_hand() -> None:
    assert temporal_positions(10, [(2, 6, 3)]).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert temporal_positions(6, [(0, 2, 2), (2, 3, 2)]).tolist() == [0, 0, 2, 2, 2, 4]
    assert temporal_positions(3, []).tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.nightly), "qwen3_vl"])
def test_vllm(family: str, server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is given the pixels and one token an image; its states and Transformers' agree, and ids it did not come to are a named failure."""
    pytest.importorskip("vllm")
    pytest.importorskip("torchvision", exc_type=ImportError, reason="vLLM's vision models need torchvision, whose build does not fit a CPU torch")
    from torchspec.engines.capture.requests import TOKEN_VARIABLE
    from torchspec.engines.vllm.engine import VLLMEngine

    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    target = save_vl_target(tmp_path / "target", family)
    file, files = save_rows(tmp_path)
    data = tokenised(target, file)
    job = job_for(target, server)
    engine = VLLMEngine(job)
    try:
        engine.start()
        leases = leases_of(data)
        image = leases[0].images[0]
        ids = np.insert(data.ids(0), image.at, data.ids(0)[image.at]).astype("<i4").tobytes()
        wrong = msgspec.structs.replace(leases[0], id=4, key="key-4", ids=ids, images=[msgspec.structs.replace(image, tokens=image.tokens + 1)])
        finished, failed = work_off(engine, [*leases, wrong])  # type: ignore[arg-type]  # it has the same interface
        total = len(data.ids(0))
        assert failed == [Failed(4, f"vLLM made other tokens of the images than the target's own processor did ({total} tokens in all)")]
        check(read(server, job, finished, leases), data, target, files, tolerance=1e-4)
    finally:
        engine.close()


def test_pixels_in_a_row_stay_encoded(tmp_path: Path) -> None:
    """What came inside rows is kept as it was, not as pixels."""
    target = save_vl_target(tmp_path / "target", "llava")
    file, files = save_rows(tmp_path)
    data = tokenised(target, file)
    image = data.images(1)[0]
    kept = (data.folder / "images.bin").read_bytes()[image.offset : image.offset + image.nbytes]
    assert kept == files[1][0].read_bytes() and Image.open(io.BytesIO(kept)).size == SIZES[1]
    assert (data.folder / "images.bin").stat().st_size == image.nbytes and data.images(0)[0].path == str(files[0][0])
