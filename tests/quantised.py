"""Layouts in which big models are published, and the numbers that they stand for.

Each function gives the stored tensors of one weight and the weight that a right reader makes of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Rows and columns of an FP8 block."""
GROUP = 32
"""Values of an INT4 or MXFP4 group."""
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False},
        }
    },
}
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Packed(NamedTuple):
    """One weight."""

    stored: dict[str, Tensor]
    meant: Tensor


def fp8(name: str, weight: Tensor) -> Packed:
    """e4m3 with an fp32 factor a block, the last blocks cut off where sizes are no multiples (DeepSeek-V3)."""
    rows, columns = weight.shape
    grid = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    factor = grid.abs().amax((1, 3)).clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    wide = factor.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    values = (weight.float() / wide).to(torch.float8_e4m3fn)
    return Packed({name: values, f"{name}_scale_inv": factor}, values.float() * wide)


def int4(name: str, weight: Tensor) -> Packed:
    """compressed-tensors' symmetric groups, eight values an int32 (Kimi)."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    factor = (groups.abs().amax(-1).clamp_min(1e-8) / 7).to(torch.bfloat16)
    values = (groups / factor.float()[..., None]).round().clamp(-8, 7)
    nibbles = (values + 8).to(torch.int64).flatten(1).unflatten(1, (-1, 8))
    whole = sum(nibbles[..., i] * 16**i for i in range(8))
    assert isinstance(whole, Tensor)
    packed = torch.where(whole < 2**31, whole, whole - 2**32).to(torch.int32)
    stem = f"{name}_"
    stored = {f"{stem}packed": packed, f"{stem}scale": factor, f"{stem}shape": torch.tensor(weight.shape)}
    return Packed(stored, (values.to(torch.bfloat16) * factor[..., None]).flatten(1).float())


def mxfp4(name: str, weight: Tensor) -> Packed:
    """e2m1 in groups along the input with e8m0 exponents, experts as [E, out, in / 32, 16] bytes (gpt-oss)."""
    groups = weight.float().mT.contiguous().unflatten(-1, (-1, GROUP))
    exponent = (groups.abs().amax(-1).clamp_min(1e-8) / 6).log2().ceil()
    scaled = groups / exponent.exp2()[..., None]
    code = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
    value = _E2M1[code] * scaled.sign() * exponent.exp2()[..., None]
    code = torch.where(scaled < 0, code + 8, code)
    stored = {f"{name}_blocks": (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8), f"{name}_scales": (exponent + 127).to(torch.uint8)}
    return Packed(stored, value.flatten(-2).mT.contiguous())
