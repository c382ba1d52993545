"""What a draft cannot be is refused by the name of the field, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models.packs import draft_config
from torchspec.errors import UserError


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "4"])
def test_sizes_are_whole_numbers_from_one(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"draft\.{field}={value!r} is no size"):
        draft_config(**{field: value})
