"""Every kind of RoPE that a draft may have turns as Transformers' module does, and the others are refused by name; the norm is theirs."""

from __future__ import annotations

import pytest
import torch

from tests.models.packs import draft_config
from tests.models.variants import VARIANTS
from tests.parity.transformers import norm, rotary
from torchspec.errors import UserError
from torchspec.models.ops.rope_parameters import KINDS

REFUSED = {"longrope", "proportional"}
"""Kinds of Transformers that servers of drafts compute otherwise, or only for parts of a head."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotary(variant: str) -> None:
    assert rotary(variant) < 1e-5


def test_every_kind_of_transformers_is_taken_or_refused() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) | {"default"} == set(KINDS) | REFUSED
    assert {VARIANTS[name]["rope_parameters"]["rope_type"] for name in VARIANTS if name.startswith("RoPE")} == set(KINDS)
    for kind in REFUSED:
        with pytest.raises(UserError, match=f"rope_type.*{kind}"):
            draft_config(rope_parameters={"rope_type": kind, "rope_theta": 1e4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype: torch.dtype) -> None:
    assert norm(dtype) == 0.0
