"""The fingerprint of a target: what it sees, and what it costs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchspec.errors import UserError
from torchspec.fingerprint import BLOCK, BLOCKS, of_directory, sample
from torchspec.target import Target, TargetConfig


def saved(folder: Path, *, seed: int, numbers: int = 300_000) -> Path:
    """A directory with two weight files, of equal names, shapes and types whatever the seed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "_name_or_path": str(folder)}))
    generator = torch.Generator().manual_seed(seed)
    for part in ("a", "b"):
        save_file({f"{part}.{i}": torch.randn(numbers, generator=generator) for i in range(2)}, folder / f"{part}.safetensors")
    return folder


def test_it_knows_weights_apart_that_differ_in_nothing_but_their_values(tmp_path: Path) -> None:
    one, same, other = saved(tmp_path / "1", seed=1), saved(tmp_path / "x" / "1", seed=1), saved(tmp_path / "2", seed=2)
    assert Target(TargetConfig(str(one))).fingerprint == of_directory(same) != of_directory(other)
    assert sum(file.stat().st_size for file in one.glob("*.safetensors")) > 4 * BLOCK * BLOCKS, "too small: all of it is read"
    for part in ("a", "b"):  # one file of another training run, too
        whole = (one / f"{part}.safetensors").read_bytes()
        (one / f"{part}.safetensors").write_bytes((other / f"{part}.safetensors").read_bytes())
        assert of_directory(one) not in (of_directory(same), of_directory(other))
        (one / f"{part}.safetensors").write_bytes(whole)
    (one / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "rope_theta": 5}))
    assert of_directory(one) != of_directory(same)


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "1", seed=1, numbers=1000)
    first, file = of_directory(folder), folder / "a.safetensors"
    content = bytearray(file.read_bytes())
    for at in (8, len(content) // 2, len(content) - 1):
        content[at] ^= 1
        file.write_bytes(content)
        assert of_directory(folder) != first
        content[at] ^= 1
    (folder / "pytorch_model.bin").write_bytes(b"x" * 10)  # not read where there is safetensors
    file.write_bytes(content)
    assert of_directory(folder) == first
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    without = of_directory(folder)
    (folder / "pytorch_model.bin").write_bytes(b"y" * 10)
    assert len({first, without, of_directory(folder)}) == 3


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK * BLOCKS - 1, BLOCK * BLOCKS, BLOCK * BLOCKS + 1, 5 << 30])
def test_blocks_reach_from_the_first_byte_to_the_last(size: int) -> None:
    offsets = sample(100, 100 + size)
    assert len(offsets) == min(-(-size // BLOCK), BLOCKS)
    if offsets:
        assert offsets[0] == 100 and offsets[-1] < 100 + size <= offsets[-1] + BLOCK
        gaps = [b - a for a, b in pairwise(offsets)]
        assert size > BLOCK * BLOCKS or all(gap <= BLOCK for gap in gaps)
        assert not gaps or max(gaps) <= max(BLOCK, -(-size // (BLOCKS - 1)))


def test_a_snapshot_of_the_hub_is_named_by_its_commit(tmp_path: Path) -> None:
    """vLLM names a hub id by this directory when the hub cannot be reached."""
    snapshot = saved(tmp_path / "models--org--name" / "snapshots" / "0123abcd", seed=1)
    assert Target(TargetConfig(str(snapshot))).fingerprint == "org/name@0123abcd"


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.target.path"):
        _ = Target(TargetConfig(str(tmp_path))).fingerprint
