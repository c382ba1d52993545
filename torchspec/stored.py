"""What a target's safetensors hold: names, types and single tensors, read without loading anything else.

The file is the one that Transformers would take: ``transformers_weights`` of the configuration, ``model.safetensors``,
then the index. Tensors that a checkpoint keeps in 8 bits with scales, or packed to 4 bits by compressed-tensors, are
given back as numbers; other packings are refused by name.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.errors import UserError
from torchspec.files import FETCH, is_pointer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from torchspec.target import TargetConfig

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that weights are computed in, by safetensors' names."""
PACKED = ("weight_packed", "qweight", "weight_blocks", "weight.qdata", "weight.absmax", "blocks")
"""Last parts of names under which quantised checkpoints keep a weight that is not stored as itself."""


def _opened(file: Path) -> Any:
    """One file, its header read.

    Raises:
        UserError: it is cut short, or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        if is_pointer(file):
            raise UserError("data.target.path", str(file), "is a pointer of Git LFS, not the weights", FETCH) from error
        raise UserError("data.target.path", str(file), f"is no whole file of safetensors ({error})", "copy it from the target's publisher anew") from error


class StoredTensors:
    """The safetensors of a model directory or hub id.

    Args:
        config: where the target is.
        explicit: ``transformers_weights`` of its configuration, the name of another file.
        quantization: ``quantization_config`` of its configuration, wherever it stands.

    Raises:
        UserError: no safetensors, or an adapter beside them.
    """

    def __init__(self, config: TargetConfig, *, explicit: str | None = None, quantization: dict[str, Any] | None = None) -> None:
        self.config = config
        self.explicit = explicit
        self.quantization = quantization or {}

    @cached_property
    def shards(self) -> dict[str, str]:
        """Name → file name."""
        if self._file("adapter_config.json") is not None:
            problem = "holds adapter_config.json: Transformers would load the adapter over the weights where peft is installed, servers would not"
            raise UserError("data.target.path", self.config.path, problem, "merge the adapter into the weights, or remove its files")
        for name in [self.explicit] if self.explicit else ["model.safetensors", "model.safetensors.index.json"]:
            found = self._file(name)
            if found is None:
                continue
            if name.endswith(".index.json"):
                try:
                    shards: dict[str, str] = dict(json.loads(found.read_text())["weight_map"])
                except (ValueError, KeyError, TypeError) as error:
                    problem = f"is no index of safetensors ({type(error).__name__}: {error})"
                    raise UserError("data.target.path", str(found), problem, "copy it from the target's publisher anew") from error
                return shards
            with _opened(found) as handle:
                return dict.fromkeys(handle.keys(), name)
        raise UserError(
            "data.target.path", self.config.path, "holds no safetensors weights", "convert the checkpoint: load it with Transformers and save_pretrained it"
        )

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            UserError: a shard that is not there, or lacks what the index says.
        """
        from safetensors import SafetensorError

        shard = self.shards[name]
        file = self._file(shard)
        if file is None:
            raise UserError("data.target.path", self.config.path, f"lacks the shard {shard}", "complete the checkpoint")
        try:
            with _opened(file) as handle:
                tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise UserError("data.target.path", self.config.path, f"lacks {name} in {shard} ({error})", "complete the checkpoint") from error
        return tensor

    def floating_type(self, name: str) -> str | None:
        """float32, bfloat16 or float16 if a tensor is stored so; nothing of it is read."""
        file = self._file(self.shards[name])
        if file is None:
            return None
        with _opened(file) as handle:
            return FLOATS.get(handle.get_slice(name).get_dtype())

    def common_type(self) -> str | None:
        """The first type that the checkpoint's first file stores numbers in; Transformers takes it where the
        configuration says none."""
        first = min(self.shards.values())
        names = sorted(name for name, shard in self.shards.items() if shard == first)
        return next((kind for name in names if (kind := self.floating_type(name)) is not None), None)

    def dequantise(self, weight: Tensor, scale: Tensor | None, *, name: str) -> Tensor:
        """[rows, columns] fp32 of a weight in 8 bits and its scales: one, one a row, or one a block (DeepSeek-V3
        report, arXiv 2412.19437, section 3.3).

        Raises:
            UserError: the scale is missing, or does not fit.
        """
        rows, columns = weight.shape
        if scale is None:
            raise UserError("data.target.path", self.config.path, f"holds {name} as {weight.dtype} without a scale", "complete the checkpoint")
        factor = _as_fp32(scale)
        if factor.numel() == 1:
            return weight.float() * factor.reshape(())
        if factor.numel() == rows:
            return weight.float() * factor.reshape(rows, 1)
        block = self.quantization.get("weight_block_size") or [-(-rows // factor.shape[0]), -(-columns // factor.shape[-1])]
        if factor.ndim != 2 or tuple(factor.shape) != (-(-rows // block[0]), -(-columns // block[1])):
            problem = f"holds {name} of {list(weight.shape)} with scales of {list(scale.shape)}, which are no blocks of {block}"
            raise UserError("data.target.path", self.config.path, problem, "check quantization_config")
        return weight.float() * spread(factor, block, rows, columns)

    def unpack(self, packed: Tensor, scale: Tensor, shape: Tensor, *, name: str) -> Tensor:
        """[rows, columns] fp32 of compressed-tensors' symmetric ``pack-quantized`` integers: values with an offset, the
        first in an int32's lowest bits.

        Raises:
            UserError: another number of bits than 4 or 8, or values with zero points.
        """
        import torch

        rows, columns = (int(x) for x in shape)
        bits = packed.shape[1] * 32 // columns if columns else 0
        if bits not in (4, 8) or scale.shape[0] != rows or columns % scale.shape[1]:
            raise UserError(
                "data.target.path", self.config.path, f"holds {name} packed in a way that is not read here", "give a checkpoint with it unquantised"
            )
        shifts = torch.arange(32 // bits, dtype=torch.int64) * bits
        values = (packed.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
        whole = values.reshape(rows, -1)[:, :columns].float() - 2 ** (bits - 1)
        return whole * _as_fp32(scale).repeat_interleave(columns // scale.shape[1], 1)

    def _file(self, name: str) -> Path | None:
        folder = Path(self.config.path)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        from transformers.utils import cached_file

        found: Any = cached_file(self.config.path, name, revision=self.config.revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)


def spread(scale: Tensor, block: list[int], rows: int, columns: int) -> Tensor:
    """[rows, columns] of one scale a block; the last blocks of a row or column may be cut off."""
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _as_fp32(scale: Tensor) -> Tensor:
    """Scales as numbers: bytes are exponents of 2 with an offset of 127 (OCP microscaling formats 1.0, E8M0)."""
    import torch

    return (scale.float() - 127.0).exp2() if scale.dtype == torch.uint8 else scale.float()


def is_number(kind: torch.dtype) -> bool:
    """Whether a tensor of this type holds its weights as they are."""
    import torch

    return kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
