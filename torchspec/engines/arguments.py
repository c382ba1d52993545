"""What every library's engine asks of ``engine_args`` and of its devices."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torchspec.engines.engine import EngineConfig
from torchspec.errors import UserError


def check_arguments(config: EngineConfig, *, owned: Mapping[str, str], field: str = "data.engines.engine_args") -> None:
    """Refuse arguments that TorchSpec sets itself.

    Args:
        config: of the engines.
        owned: names that are refused, with reasons.
        field: how the user calls the arguments.

    Raises:
        UserError: naming the first; also of one whose value makes another model of the target.
    """
    for name, value in config.engine_args.items():
        if name == "load_format" and value == "dummy":
            raise UserError(f"{field}.load_format", value, "gives the target random weights", "leave it out")
        if name in owned:
            raise UserError(f"{field}.{name}", value, "is set by TorchSpec", f"leave it out: {owned[name]}")


def own_devices(device: str) -> int:
    """GPUs of this worker: those that its CUDA_VISIBLE_DEVICES lists; without it the one of ``device``, which is made the only visible one."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2] or "0"
    return len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
