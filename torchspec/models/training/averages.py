"""Weight averaging in checkpoints.

Of ours (``callbacks/average.py``): the names of the weights whose average the optimizer's state holds, and reading
them.

Of Lightning's: ``state_dict`` is what was validated and is exported, and a resume finds everything again. Its
``WeightAveraging`` (and so ``EMAWeightAveraging``) puts the average into ``state_dict`` and the weights in training
beside it. Two gaps are closed here: an average that has not begun is a copy of the weights at the start, and a
checkpoint of weights alone never asks the callback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from torchspec.errors import UserError

KEY = "average"
"""Of the optimizer's state of a weight: its average, as ``torchspec.callbacks.average.Average`` keeps it."""
_CURRENT = "current_model_state"
"""Lightning's entry of the weights in training, where ``state_dict`` holds their average."""


def averagers(trainer: pl.Trainer) -> list[WeightAveraging]:
    """Lightning's averaging callbacks of a run (not its older StochasticWeightAveraging)."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def swa_of(trainer: pl.Trainer) -> StochasticWeightAveraging | None:
    """Lightning's older averaging callback, if the run has it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging)), None)


def begun(callback: WeightAveraging) -> bool:
    """Whether anything was averaged yet."""
    return callback._average_model is not None and int(callback._average_model.n_averaged) > 0


def settle(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """See to it that a checkpoint's ``state_dict`` is the average once there is one, and the weights in training
    before. After the callbacks' own hooks."""
    optimizers = trainer.optimizers
    held = names_of_averages(trainer.lightning_module, optimizers[0]) if optimizers else []
    if any(held) and "optimizer_states" in checkpoint:
        checkpoint["torchspec"]["averages"] = held
    elif any(held):  # of weights alone: what is served
        group = [p for group in optimizers[0].param_groups for p in group["params"]]
        averages = {name: optimizers[0].state[p][KEY] for name, p in zip(held, group, strict=True) if name}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averages}
    for callback in averagers(trainer):
        if callback._average_model is None:
            continue
        if not begun(callback):
            checkpoint["state_dict"] = checkpoint.get(_CURRENT, checkpoint["state_dict"])
        elif _CURRENT not in checkpoint:  # of weights alone
            average = callback._average_model.state_dict()
            checkpoint["state_dict"] = {name.removeprefix("module."): value for name, value in average.items() if name.startswith("module.")}


def check_averaging(path: Path, entries: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Refuse to go on from averaged weights as if they were those in training.

    Args:
        path: of the checkpoint that a run resumes from.
        entries: of the checkpoint.
        trainer: of the run.

    Raises:
        UserError: the checkpoint holds both, and the run has no callback to take them apart.
    """
    ours = any(getattr(callback, "averages_weights", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if entries["torchspec"].get("averages") and not ours:
        problem = "holds averages of the weights, which this run would carry on unchanged"
        fix = "add torchspec.callbacks.average.Average to trainer.callbacks again, or start a new run with model.start_from"
        raise UserError("ckpt_path", str(path), problem, fix)
    if _CURRENT in entries and not averagers(trainer):
        problem = "holds the average of weights beside the weights in training, and this run does not average"
        fix = "add the averaging callback to trainer.callbacks again, or start a new run from the average with model.start_from"
        raise UserError("ckpt_path", str(path), problem, fix)


def names_of_averages(module: Any, optimizer: Optimizer) -> list[str]:
    """The name in ``state_dict`` of each weight of an optimizer, in its order; empty where it has no average."""
    names = {id(p): name for name, p in module.named_parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    return [names[id(p)] if KEY in optimizer.state.get(p, {}) else "" for p in given]


def averages_in(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Averages in a checkpoint of one file, by the weights' names in ``state_dict``."""
    states = (entries.get("optimizer_states") or [{}])[0].get("state", {})
    named = {name: states.get(name, states.get(number, {})) for number, name in enumerate(entries["torchspec"].get("averages") or []) if name}
    return {name: state[KEY] for name, state in named.items() if KEY in state}


@torch.no_grad()
def put_averages(module: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Put averages in the place of a sharded module's weights, which its strategy has read before anybody is asked.

    Args:
        module: sharded over all ranks.
        averages: whole tensors by the weights' names, the same on every rank.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, p in module.named_parameters():
        if name in averages:
            whole = averages[name].to(p.device, p.dtype)
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else whole)
