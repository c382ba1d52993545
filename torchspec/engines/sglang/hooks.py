"""The hooks that SGLang registers in its scheduler (argument ``forward_hooks``), one process of each tensor-parallel rank.

Each factory is called once with the ``config`` of its entry, which :func:`hook_entries` made, and returns a forward hook of PyTorch. All of a process
feed the one collector. Rank 0 alone has hooks: every rank holds the same states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchspec.engines.sglang.collector import Collector
from torchspec.engines.sglang.families import modules_of

log = logging.getLogger("sglang.torchspec")
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]
_collector: Collector | None = None


def hook_entries(layer_ids: tuple[int, ...], **facts: Any) -> list[dict[str, Any]]:
    """SGLang's ``forward_hooks`` that capture these states.

    Args:
        layer_ids: Transformers' indices, increasing; the last is the number of blocks.
        facts: JSON values for the collector: ``target``, the fingerprint that this SGLang is to run, and ``allow_unknown_version``.
    """
    config = {"layer_ids": list(layer_ids), **facts}
    here = "torchspec.engines.sglang.hooks"
    entries = [
        {"name": f"torchspec-state-{i}", "target_modules": modules_of(i, last=layer_ids[-1]), "hook_factory": f"{here}:state", "config": {**config, "index": i}}
        for i in layer_ids
    ]
    # the last to be called in a forward: it has the batch, and closes it
    entries.append({"name": "torchspec-batch", "target_modules": ["*logits_processor"], "hook_factory": f"{here}:batch", "config": config})
    return entries


def state(config: dict[str, Any]) -> Hook | None:
    """Hook on the norm before a block, or the final norm: what enters it is hidden state ``index``."""
    collector, index = _shared(config), int(config["index"])
    if collector is None:
        return None

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows = output[1] if isinstance(output, tuple) and len(output) > 1 else (args[0] if args and index == 0 else None)
        if isinstance(rows, Tensor):
            collector.entered(index, rows)

    return hook


def batch(config: dict[str, Any]) -> Hook | None:
    """Hook on the module that makes logits: it is given the batch."""
    collector = _shared(config)
    if collector is None:
        return None

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        collector.forward_done(args[3] if len(args) > 3 else None, args[0] if args else None, args[4] if len(args) > 4 else None)

    return hook


def _shared(config: dict[str, Any]) -> Collector | None:
    """This process's collector; None on all ranks but the first.

    Raises:
        UserError: this SGLang is not one that it can serve, or its states would be wrong.
    """
    global _collector
    from torchspec.engines.sglang.checks import tensor_parallel_rank

    if tensor_parallel_rank() != 0:
        return None
    if _collector is None:
        from torchspec.engines.sglang.checks import check_running

        _collector = Collector(check_running(config))
        log.info("capturing hidden states %s", list(config["layer_ids"]))
    return _collector
