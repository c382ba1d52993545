"""Compute types by device."""

import pytest
import torch

from torchspec.hardware import working_dtype


@pytest.mark.parametrize(
    ("has", "dtype", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True}, torch.float16, torch.float32),
        ({}, torch.float32, torch.float32),
        ({}, torch.float64, torch.float64),
    ],
)
def test_a_cpu_computes_in_what_it_has_instructions_for(monkeypatch, has, dtype, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert working_dtype(dtype, "cpu") == expected
    assert working_dtype(dtype, "cuda:0") == dtype
