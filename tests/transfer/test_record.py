"""The record's layout and everything that must be refused when it is opened."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from torchspec.transfer.record import HEADER_BYTES, MAGIC, RecordError, RecordSpec, is_finite, open_record, seal, views

SPEC = RecordSpec(target="sha256:abc", tokenizer="sha256:def", aux_layers=(2, 15, 27), hidden_size=48, dtype="bfloat16")


def aligned(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def written(spec: RecordSpec = SPEC, tokens: int = 10, rows: int | None = None, *, checksum: bool = True) -> torch.Tensor:
    rows = tokens if rows is None else rows
    buffer = aligned(spec.nbytes(tokens))
    ids, aux, last = views(buffer, spec, tokens, rows)
    chance = torch.Generator().manual_seed(tokens)
    ids.copy_(torch.randint(0, 50_000, ids.shape, generator=chance))
    aux.copy_(torch.randn(aux.shape, generator=chance))
    last.copy_(torch.randn(last.shape, generator=chance))
    return seal(buffer, spec, tokens, rows, producer="test 1.0", checksum=checksum)


def with_manifest(record: torch.Tensor, **changes: object) -> torch.Tensor:
    """The record with fields of its manifest changed (None removes one)."""
    length = int.from_bytes(bytes(record[8:12].tolist()), "little")
    manifest = {**json.loads(bytes(record[12 : 12 + length].tolist())), **changes}
    text = json.dumps({name: value for name, value in manifest.items() if value is not None}).encode()
    changed = record.clone()
    head = (MAGIC + len(text).to_bytes(4, "little") + text).ljust(HEADER_BYTES, b"\0")
    changed[:HEADER_BYTES] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    return changed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (1, 0), (2, 1), (7, 7), (7, 6), (333, 332)])
def test_round_trip(dtype: str, tokens: int, rows: int) -> None:
    """R = T, and R = T-1 for an engine that never computed the last row."""
    spec = replace(SPEC, dtype=dtype)
    record = written(spec, tokens, rows)
    opened = open_record(record.clone(), spec)
    ids, aux, last = views(record, spec, tokens, rows)
    assert opened.input_ids.dtype == torch.int32 and opened.aux.dtype == opened.last.dtype == spec.torch_dtype
    assert opened.input_ids.shape == (tokens,) and opened.aux.shape == (rows, 3 * 48) and opened.last.shape == (rows, 48)
    assert torch.equal(opened.input_ids, ids) and torch.equal(opened.aux, aux) and torch.equal(opened.last, last)
    assert opened.manifest["producer"] == "test 1.0"


def test_a_draft_may_read_the_last_state_alone() -> None:
    """No auxiliary layers: such a record holds ids and the last states, and says so."""
    spec = replace(SPEC, aux_layers=())
    record = written(spec, 7, 6)
    opened = open_record(record.clone(), spec)
    assert opened.aux.shape == (6, 0) and torch.equal(opened.last, views(record, spec, 7, 6)[2]) and opened.manifest["aux_layers"] == []
    assert spec.nbytes(7) < SPEC.nbytes(7) and is_finite(opened) and RecordSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(RecordError, match="'aux_layers' is"):
        open_record(record, SPEC)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("hidden", [1, 5, 48, 576])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
def test_layout(dtype: str, hidden: int, tokens: int) -> None:
    """Parts in order, each at a multiple of 64 bytes, none overlapping, and the credit of a sample covers both cases of R."""
    spec = replace(SPEC, dtype=dtype, hidden_size=hidden)
    for rows in (tokens, tokens - 1):
        at = spec.layout(tokens, rows)
        size = spec.torch_dtype.itemsize
        assert at.ids == HEADER_BYTES
        assert at.ids + 4 * tokens <= at.aux
        assert at.aux + rows * 3 * hidden * size <= at.last
        assert at.last + rows * hidden * size <= at.total <= spec.nbytes(tokens)
        assert all(offset % 64 == 0 for offset in (at.ids, at.aux, at.last, at.total))


def test_views_write_in_place() -> None:
    buffer = aligned(SPEC.nbytes(4) + 64)
    buffer.fill_(9)
    for part in views(buffer, SPEC, 4, 4):
        assert part.data_ptr() % 64 == 0
        part.zero_()
    at = SPEC.layout(4, 4)
    assert buffer[at.ids : at.ids + 16].eq(0).all()
    assert buffer[at.aux : at.aux + 4 * 144 * 2].eq(0).all() and buffer[at.last : at.last + 4 * 48 * 2].eq(0).all()
    assert buffer[:HEADER_BYTES].eq(9).all() and buffer[at.last + 4 * 48 * 2 :].eq(9).all()


def test_a_longer_buffer_is_fine() -> None:
    record = written()
    assert open_record(torch.cat([record, aligned(1000)]), SPEC).aux.shape == (10, 144)


@pytest.mark.parametrize(
    ("field", "value"),
    [("target", "sha256:other"), ("tokenizer", ""), ("aux_layers", (2, 15, 28)), ("hidden_size", 64), ("dtype", "float16"), ("schema", 2)],
)
def test_the_field_that_differs_is_named(field: str, value: object) -> None:
    with pytest.raises(RecordError, match=f"manifest field '{field}' is"):
        open_record(written(), replace(SPEC, **{field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["target", "tokenizer", "aux_layers", "hidden_size", "dtype", "schema"])
def test_a_field_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(RecordError, match=f"manifest field '{field}' is None"):
        open_record(with_manifest(written(), **{field: None}), SPEC)


@pytest.mark.parametrize("where", ["ids", "aux", "last"])
def test_one_changed_bit(where: str) -> None:
    record = written()
    record[getattr(SPEC.layout(10, 10), where) + 5] ^= 16
    with pytest.raises(RecordError, match="checksum differs"):
        open_record(record, SPEC)
    open_record(record, SPEC, verify=False)


def test_without_checksum() -> None:
    record = written(checksum=False)
    assert "xxh3" not in open_record(record, SPEC).manifest


@pytest.mark.parametrize("keep", [0, 5, 11, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 64, -64, -1])
def test_truncated(keep: int) -> None:
    with pytest.raises(RecordError):
        open_record(written()[:keep].clone(), SPEC)


def test_rows_and_tokens_that_lie() -> None:
    """A manifest that promises more than the bytes hold, or nonsense, is refused before a view is made."""
    record = written()
    for changes in (
        {"tokens": 11, "rows": 11},
        {"rows": 8},
        {"rows": 11},
        {"tokens": -1, "rows": -1},
        {"tokens": 0, "rows": -1},
        {"tokens": 10**12, "rows": 10**12},
    ):
        with pytest.raises(RecordError):
            open_record(with_manifest(record, **changes), SPEC)
    for changes in ({"tokens": "10"}, {"tokens": None}, {"rows": 10.0, "tokens": 10.0}, {"tokens": [1]}, {"tokens": True, "rows": True}):
        with pytest.raises(RecordError):
            open_record(with_manifest(record, **changes), SPEC)


def test_garbage() -> None:
    with pytest.raises(RecordError, match="magic"):
        open_record(torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), SPEC)
    for text in (b"[]", b"3", b"null", b"{", b"\xff\xfe", b'"x"', b"[" * 2000):
        record = written()
        record[8:12] = torch.tensor(list(len(text).to_bytes(4, "little")), dtype=torch.uint8)
        record[12 : 12 + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        with pytest.raises(RecordError):
            open_record(record, SPEC)
    record = written()
    record[8:12] = 255  # a length far beyond the header
    with pytest.raises(RecordError):
        open_record(record, SPEC)


def test_manifest_that_does_not_fit() -> None:
    with pytest.raises(RecordError, match="does not fit the header"):
        written(replace(SPEC, target="x" * HEADER_BYTES))


def test_spec_crosses_the_wire() -> None:
    plain = json.loads(json.dumps(SPEC.to_dict()))
    assert RecordSpec.from_dict(plain) == SPEC
    assert RecordSpec.from_dict({**plain, "later field": 1}) == SPEC


def test_same_bytes_twice() -> None:
    assert torch.equal(written(), written())
