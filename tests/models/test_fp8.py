"""8-bit rows in plain torch, the twin of the kernel; products with them need a GPU (``test_cuda.py``)."""

from __future__ import annotations

import pytest
import torch

from tests.models.packs import draft_config
from torchspec.errors import UserError
from torchspec.models import fp8


@pytest.mark.parametrize("factor", [False, True])
def test_rows_are_rounded_by_half_a_step_and_use_their_range(factor: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator) * 10.0 ** torch.arange(-2, 3)[:, None]
    x[2] = 0.0
    by = torch.randn(48, generator=generator) if factor else None
    y, scale = fp8.quantise(x, by)
    exact = x.double() if by is None else x.double() * by.double()
    assert y.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    step = exact.abs() / 16 + scale.double() / 512  # half a step of three mantissa bits, or of the smallest number
    assert ((y.double() * scale.double() - exact).abs() <= step * 1.01).all()
    assert y.float().abs().amax(dim=1).tolist() == [448.0, 448.0, 0.0, 448.0, 448.0]


@pytest.mark.parametrize(("field", "size"), [("hidden_size", 24), ("intermediate_size", 40), ("draft_vocab_size", 31)])
def test_sizes_that_the_products_do_not_take_are_refused(field: str, size: int) -> None:
    fine = {"hidden_size": 32, "intermediate_size": 64, "draft_vocab_size": 32}
    with pytest.raises(UserError, match=rf"model\.matmul='?fp8.*draft\.{field} is {size}"):
        fp8.check(torch.device("cuda"), draft_config(**{**fine, field: size}))
    with pytest.raises(UserError, match="needs a GPU"):
        fp8.check(torch.device("cpu"), draft_config(**fine))
