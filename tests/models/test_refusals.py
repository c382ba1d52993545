"""What a user can ask of a draft that cannot be: refused by the field's name before anything is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.packs import draft_config
from torchspec.errors import UserError
from torchspec.models import fp8


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "4"])
def test_sizes_are_whole_numbers_from_one(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"draft\.{field}={value!r} is no size"):
        draft_config(**{field: value})


@pytest.mark.parametrize(("field", "size"), [("hidden_size", 24), ("intermediate_size", 40), ("draft_vocab_size", 31)])
def test_fp8_refuses_sizes_that_its_products_do_not_take(field: str, size: int) -> None:
    fine = {"hidden_size": 32, "intermediate_size": 64, "draft_vocab_size": 32}
    with pytest.raises(UserError, match=rf"model\.matmul='?fp8.*draft\.{field} is {size}"):
        fp8.check(torch.device("cuda"), draft_config(**{**fine, field: size}))
    with pytest.raises(UserError, match="needs a GPU"):
        fp8.check(torch.device("cpu"), draft_config(**fine))
