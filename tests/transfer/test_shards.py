"""Records on disk come back bit for bit, in any order; what is damaged, foreign or missing is said by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchspec.errors import UserError
from torchspec.transfer import open_store
from torchspec.transfer.keys import key_of
from torchspec.transfer.record import Record, RecordSpec, open_record, seal, views
from torchspec.transfer.shard_reader import ShardReader
from torchspec.transfer.shards import ShardWriter
from torchspec.transfer.store import StoreError

SPEC = RecordSpec(target="t", tokenizer="k", aux_layers=(1, 2, 5), hidden_size=24, dtype="bfloat16")


def record(seed: int, tokens: int, rows: int, spec: RecordSpec = SPEC) -> tuple[torch.Tensor, Record]:
    """A random record: its bytes, and opened."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.zeros(spec.nbytes(tokens), dtype=torch.uint8)
    ids, aux, last = views(buffer, spec, tokens, rows)
    ids.copy_(torch.randint(0, 1000, ids.shape, generator=generator))
    aux.copy_(torch.randn(aux.shape, generator=generator) * torch.logspace(-3, 3, aux.shape[0])[:, None])
    last.copy_(torch.randn(last.shape, generator=generator))
    whole = seal(buffer, spec, tokens, rows, producer="test")
    return whole, open_record(whole, spec)


def write(folder: Path, sizes: list[tuple[int, int]], **options: object) -> list[Record]:
    writer = ShardWriter(folder, SPEC, **{"shard_bytes": 20_000, **options})  # type: ignore[arg-type]
    made = [record(i, *size)[1] for i, size in enumerate(sizes)]
    for one in made:
        writer.add(one, key_of(one.input_ids.numpy()))
    writer.close()
    return made


SIZES = [(7, 7), (40, 39), (1, 1), (90, 90), (3, 2), (64, 64), (25, 24), (33, 33)]


def test_records_come_back_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    made = write(tmp_path / "r", SIZES)
    assert len(list((tmp_path / "r").glob("records-0-*.safetensors"))) > 1
    store = open_store({"kind": "shards", "folder": str(tmp_path / "r")})
    reader = ShardReader(tmp_path / "r")
    for i in np.random.default_rng(0).permutation(len(made)):
        numbers = reader.find(np.array([key_of(made[i].input_ids.numpy())], dtype=np.uint64))
        tokens, rows = reader.size(int(numbers[0]))
        assert (tokens, rows) == SIZES[i]
        out = store.buffer(SPEC.nbytes(tokens)).fill_(255)
        (nbytes,) = store.get([str(numbers[0])], [out])
        again = open_record(out[:nbytes], SPEC)
        for name in ("input_ids", "aux", "last"):
            assert torch.equal(getattr(again, name).view(torch.uint8), getattr(made[i], name).view(torch.uint8)), name
    assert reader.find(np.array([1, 2**64 - 1], dtype=np.uint64)).tolist() == [-1, -1]
    store.close()


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    made = write(tmp_path / "r", SIZES, shard_bytes=1 << 30)
    (file,) = (tmp_path / "r").glob("*.safetensors")
    tensors = load_file(file)
    assert torch.equal(tensors["input_ids"], torch.cat([one.input_ids for one in made])) and torch.equal(tensors["aux"], torch.cat([one.aux for one in made]))
    assert tensors["tokens"].tolist() == [t for t, _ in SIZES] and tensors["rows"].tolist() == [r for _, r in SIZES]


def test_a_second_writer_goes_on_and_writes_nothing_twice(tmp_path: Path) -> None:
    write(tmp_path / "r", SIZES[:4])
    left = tmp_path / "r" / ".records-0-00099.safetensors"  # of a writer that was killed
    left.write_bytes(b"half")
    before = sorted(file.name for file in (tmp_path / "r").glob("records-*"))
    write(tmp_path / "r", SIZES)
    write(tmp_path / "r", SIZES[:2], part="other")  # has nothing to add
    reader = ShardReader(tmp_path / "r")
    assert len(reader) == len(SIZES) and not left.exists()
    assert [file.name for file in reader.files][: len(before)] == before and not list((tmp_path / "r").glob("records-other*"))


@pytest.mark.parametrize("fp8", [False, True])
def test_records_without_aux_layers(tmp_path: Path, fp8: bool) -> None:
    """Of drafts that are fed the last hidden state alone."""
    spec = replace(SPEC, aux_layers=())
    _, made = record(3, 40, 39, spec)
    writer = ShardWriter(tmp_path / "r", spec, fp8=fp8)
    writer.add(made, 7)
    writer.close()
    reader = ShardReader(tmp_path / "r")
    out = torch.empty(spec.nbytes(40), dtype=torch.uint8)
    again = open_record(out[: reader.read(int(reader.find(np.array([7], dtype=np.uint64))[0]), out)], spec)
    assert again.aux.shape == made.aux.shape == (39, 0) and torch.equal(again.input_ids, made.input_ids)
    assert torch.equal(again.last, made.last) or (fp8 and torch.allclose(again.last, made.last, rtol=0.1, atol=0.05))


def test_fp8_states_its_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "r", SPEC, fp8=True)
    made = [record(i, *size)[1] for i, size in enumerate(SIZES)]
    for one in made:
        writer.add(one, key_of(one.input_ids.numpy()))
    writer.close()
    reader = ShardReader(tmp_path / "r")
    wrong = right = 0.0
    for one in made:
        number = int(reader.find(np.array([key_of(one.input_ids.numpy())], dtype=np.uint64))[0])
        out = torch.zeros(SPEC.nbytes(one.input_ids.numel()), dtype=torch.uint8)
        again = open_record(out[: reader.read(number, out)], SPEC)
        assert torch.equal(again.input_ids, one.input_ids)
        for name in ("aux", "last"):
            ours, theirs = getattr(again, name).double(), getattr(one, name).double()
            wrong, right = wrong + float((ours - theirs).square().sum()), right + float(theirs.square().sum())
            assert ((ours - theirs).abs() <= theirs.abs() / 16 + theirs.abs().amax(-1, keepdim=True) / 400).all()  # e4m3: 3 bits of mantissa
    assert 0.01 < writer.fp8_error < 0.05 and (wrong / right) ** 0.5 == pytest.approx(writer.fp8_error, rel=0.05)
    exact = sum(file.stat().st_size for file in (tmp_path / "r").glob("records-*"))
    write(tmp_path / "exact", SIZES)
    assert exact < 0.75 * sum(file.stat().st_size for file in (tmp_path / "exact").glob("records-*"))


@pytest.mark.parametrize("fp8", [False, True])
def test_records_without_auxiliary_layers(fp8: bool, tmp_path: Path) -> None:
    spec = replace(SPEC, aux_layers=())
    writer = ShardWriter(tmp_path / "r", spec, fp8=fp8)
    one = record(0, 9, 9, spec)[1]
    writer.add(one, key_of(one.input_ids.numpy()))
    writer.close()
    reader = ShardReader(tmp_path / "r")
    out = torch.zeros(spec.nbytes(9), dtype=torch.uint8)
    again = open_record(out[: reader.read(0, out)], spec)
    assert again.aux.shape == (9, 0) and torch.equal(again.input_ids, one.input_ids)
    assert torch.equal(again.last, one.last) if not fp8 else torch.allclose(again.last.float(), one.last.float(), rtol=0.1, atol=0.1)


def test_damage_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "r", SIZES, shard_bytes=1 << 30)
    (file,) = (tmp_path / "r").glob("records-*")
    data = bytearray(file.read_bytes())
    reader = ShardReader(tmp_path / "r")
    at = reader._headers[0][0] + reader._headers[0][1]["aux"]["data_offsets"][0]
    data[at + 5] ^= 1
    file.write_bytes(data)
    broken = 0
    for number in range(len(reader)):
        try:
            reader.read(number, torch.zeros(SPEC.nbytes(100), dtype=torch.uint8))
        except StoreError as error:
            assert "checksum differs" in str(error)
            broken += 1
    assert broken == 1
    file.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"records-0-00000\.safetensors' is a damaged shard"):
        ShardReader(tmp_path / "r")


def test_other_records_are_refused_by_field(tmp_path: Path) -> None:
    write(tmp_path / "r", SIZES[:1])
    with pytest.raises(UserError, match=r"holds records whose aux_layers is \[1, 2, 5\], not \[1, 2, 4\]"):
        ShardWriter(tmp_path / "r", RecordSpec(target="t", tokenizer="k", aux_layers=(1, 2, 4), hidden_size=24, dtype="bfloat16"))
    with pytest.raises(UserError, match="whose stored is 'exact', not 'fp8'"):
        ShardWriter(tmp_path / "r", SPEC, fp8=True)
    with pytest.raises(UserError, match=r"data\.records=.* holds no records"):
        ShardReader(tmp_path)
