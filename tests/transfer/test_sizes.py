from __future__ import annotations

import pytest

from torchspec.errors import UserError
from torchspec.transfer import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("500MB", 500_000_000), ("65536", 65536), (4096, 4096), ("1.5 GiB", 3 << 29), (" 2kib ", 2048), ("1TB", 10**12), ("7b", 7)],
)
def test_parse(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1 apple", "-1GiB", "0", "0.0001B", "1e9", "1GiB 2", "inf", "nan", None, 1.5e300])
def test_refused(text: object) -> None:
    with pytest.raises(UserError, match=r"^data\.store\.budget="):
        parse_bytes(text)  # type: ignore[arg-type]


def test_names_the_field() -> None:
    with pytest.raises(UserError, match=r"^data\.reserve='x'"):
        parse_bytes("x", field="data.reserve")


def test_show() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1024, 64 << 20, 3 << 29, 1 << 45)] == ["0 B", "1023 B", "1.0 KiB", "64.0 MiB", "1.5 GiB", "32.0 TiB"]
