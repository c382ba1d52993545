"""Loading the target with Transformers, or saying in one line why it is not the model that the checkpoint means.

Transformers initialises what a checkpoint lacks at random and goes on with a table in the log: states of such a model
look like any others. Here every tensor of the text model must have been read. Those of other parts may be missing where
no sample has an image.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.reasons import reason_of
from torchspec.stack import text_stack
from torchspec.stored import spread
from torchspec.target import Target, TargetConfig

log = logging.getLogger(__name__)
_OF_ATTENTION = re.compile(r"attn_implementation|attention|kernels", re.IGNORECASE)
"""What Transformers says where it refuses an attention, among other words."""
OWNED = {
    "dtype": "data.target.dtype sets it",
    "torch_dtype": "data.target.dtype sets it",
    "attn_implementation": "data.engines.attn_implementation sets it",
    "revision": "data.target.revision sets it",
    "trust_remote_code": "data.target.trust_remote_code sets it",
    "config": "the target's own configuration describes it",
    "ignore_mismatched_sizes": "a tensor that does not fit is named",
    "output_loading_info": "a tensor that is missing is named",
}
"""Arguments that are refused in ``data.engines.engine_args``, each with the reason."""
_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 3
"""Names in an error."""


def load_model(config: TargetConfig, *, device: str, attn_implementation: str = "auto", images: bool = False, extra: dict[str, Any] | None = None) -> Any:
    """The target for inference, in its own type (fp32 on a CPU that has no instructions for that one).

    Args:
        config: where it is.
        device: torch device.
        attn_implementation: auto leaves the choice to Transformers, which takes sdpa where each part of the class has
            it.
        images: samples hold images, so that the other parts of the model must be whole too.
        extra: more arguments of ``from_pretrained``.

    Raises:
        UserError: it does not load, or not all of it was read from the checkpoint; an argument that is ours, or that Transformers refuses.
    """
    extra = extra or {}
    if ours := next((name for name in extra if name in OWNED), None):
        raise UserError(f"data.engines.engine_args.{ours}", extra[ours], "is set by TorchSpec", f"leave it out: {OWNED[ours]}")
    target = Target(config)
    options = {"dtype": working_dtype(target.dtype, device), **({} if attn_implementation == "auto" else {"attn_implementation": attn_implementation})}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True} | extra  # what does not fit is named below
    try:
        with _whole_blocks():
            model, info = target.auto_class().from_pretrained(config.path, **target.model_files, **options)
    except UserError:
        raise
    except Exception as error:  # configuration, checkpoint and modelling code are the user's
        log.exception("the target does not load")
        reason = _reason(error)
        if attn_implementation != "auto" and _OF_ATTENTION.search(reason):
            fix = "take auto, or one that this target and this machine have"
            raise UserError("data.engines.attn_implementation", attn_implementation, f"is refused by Transformers ({reason})", fix) from error
        if named := next((name for name, value in extra.items() if _speaks_of(reason, name) or _speaks_of(reason, str(value))), None):
            fix = "leave it out, or check its name and value"
            raise UserError(f"data.engines.engine_args.{named}", extra[named], f"is refused by Transformers ({reason})", fix) from error
        raise UserError("data.target.path", config.path, f"does not load ({reason})", "check the checkpoint and data.engines") from error
    _check_whole(model, info, target, images=images)
    if options["dtype"] == torch.float32:
        _widen(model)
    return model.to(device).eval().requires_grad_(False)


def _speaks_of(reason: str, word: str) -> bool:
    """Whether a word, not a part of another one, is in a reason; short ones could be there for anything."""
    return len(word) > 2 and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reason) is not None


def _check_whole(model: nn.Module, info: dict[str, Any], target: Target, *, images: bool) -> None:
    """Refuse a model of which not every tensor that matters was read."""
    stack = text_stack(model, num_layers=target.num_layers)
    ends = [ask() for name in ("get_input_embeddings", "get_output_embeddings") if (ask := getattr(model, name, None)) is not None]
    parts = [stack.owner_name, *(name for name, module in model.named_modules() if any(module is end for end in ends))]

    def matters(name: str) -> bool:
        return images or any(not part or name.startswith(f"{part}.") for part in parts)

    missing = sorted(name for name in info["missing_keys"] if matters(name))
    other = sorted(f"{entry[0]} of {list(entry[1])} for {list(entry[2])}" for entry in info["mismatched_keys"] if matters(entry[0]))
    what = "the model" if images else "the text model"
    if missing:
        problem = f"lacks {len(missing)} tensors of {what} ({_some(missing)}), which would be random"
        raise UserError("data.target.path", target.config.path, problem, "complete the checkpoint")
    if other:
        problem = f"holds {len(other)} tensors of {what} in another shape ({_some(other)})"
        raise UserError("data.target.path", target.config.path, problem, "check config.json against the weights")


def _widen(model: nn.Module) -> None:
    """Everything in fp32 that can be: what Transformers dequantises comes in bf16 whatever type was asked for."""
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.dtype not in _NUMBERS for tensor in own if tensor.ndim > 1):
            continue  # still packed: its kernel wants its scales as they are
        for tensor in own:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()


def _some(names: list[str]) -> str:
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])


def _reason(error: BaseException) -> str:
    """One line; of a failed conversion the tensors and the last line of the first one's error, which Transformers
    leaves to its log."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        failed: dict[str, str] = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None) or {}
        if failed:
            cause = next((line for line in next(iter(failed.values())).splitlines() if "Error" in line and not line.startswith("Error")), "")
            return f"{len(failed)} tensors cannot be converted: {_some(sorted(failed))}" + (f"; {cause.strip()[:200]}" if cause else "")
    return reason_of(error)


@contextmanager
def _whole_blocks() -> Iterator[None]:
    """FP8 weights whose last block is cut off (DeepSeek-V3's kv_a_proj has 576 rows in blocks of 128) are dequantised
    by the block size that the configuration states. Transformers 5.19 divides the rows by the number of blocks: 576 by
    5 fails, and 192 by 2 would give blocks of 96 without a word."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    own = Fp8Dequantize._dequantize_one

    def dequantize_one(self: Any, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block: list[int] = list(getattr(self.hf_quantizer.quantization_config, "weight_block_size", None) or [])
        rows, columns = quantized.shape[-2:]
        cut = bool(block) and quantized.ndim == 2 and tuple(scales.shape) == (-(-rows // block[0]), -(-columns // block[1]))
        if not cut or quantized.dtype == torch.int8 or not (rows % block[0] or columns % block[1]):
            whole: Tensor = own(self, quantized, scales, output_dtype)
            return whole
        return (quantized.float() * spread(scales.float(), block, rows, columns)).to(output_dtype or torch.bfloat16)

    Fp8Dequantize._dequantize_one = dequantize_one  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = own  # type: ignore[method-assign]
