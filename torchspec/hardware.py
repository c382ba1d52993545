"""In which type a device should compute.

A CPU without matrix instructions for a half-precision type emulates it: on an AVX2 machine a bfloat16 product is eight times slower than the fp32 one. There
the target and the draft compute in fp32 from the same weights; what is stored and sent keeps its own type.
"""

from __future__ import annotations

import torch

_NEEDS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}
"""CPU capabilities, by torch's names, any one of which makes a type fast (x86 and Arm)."""


def working_dtype(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type to compute in on a device for tensors of ``dtype``: itself, or fp32 on a CPU that has no instructions for it."""
    if torch.device(device).type != "cpu" or dtype not in _NEEDS:
        return dtype
    has = torch.cpu.get_capabilities()
    return dtype if any(has.get(name) for name in _NEEDS[dtype]) else torch.float32
