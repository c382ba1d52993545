"""What a checkpoint must hold, beside the draft's weights, for a run to resume from it with nothing lost.

Lightning restores what it finds and goes on without the rest: without the datamodule's entry nothing is trained, without moments the optimizer starts
fresh. So a checkpoint says what it holds (:func:`describe`), and a resume compares that with what is there and with what the run has, before the training
state is restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR

from torchspec.errors import UserError
from torchspec.models.training.checkpoint import read_entries, shard_metadata, standing

_MOMENTS = "optimizer_0.state."
"""How keys of the optimizer's state begin in a sharded checkpoint."""
_WEIGHTS = "state_dict."
_SAME = "resume with the configuration of the checkpoint, or start a new run from its weights with model.start_from"
_WHOLE = "use a whole checkpoint, or start a new run from its weights with model.start_from"


def describe(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`check_resume` wants to know of a checkpoint that is being saved; plain values."""
    states = checkpoint.get("optimizer_states") or [{}]
    return {
        "optimizer": [_kind(optimizer) for optimizer in trainer.optimizers],
        "lr_scheduler": [_kind(config.scheduler) for config in trainer.lr_scheduler_configs],
        "moments": _count(states[0]),
    }


def _kind(made: object) -> str:
    return type(made).__qualname__


def _count(optimizer_state: Mapping[str, Any]) -> int:
    return sum(len(entry) for entry in optimizer_state.get("state", {}).values())


def check_weights(checkpoint: Path, expected: Mapping[str, Tensor], *, sharding: bool) -> None:
    """Refuse a checkpoint that holds other tensors than a module takes, or holds them in shards where the strategy reads a single file.

    Args:
        checkpoint: file or sharded folder.
        expected: ``state_dict`` of the module.
        sharding: whether the strategy shards (fsdp2 reads either form).

    Raises:
        UserError: the first tensors that are missing, unknown or of another shape.
    """
    path = standing(checkpoint)
    if path.is_dir():
        if not sharding:
            raise UserError("ckpt_path", str(checkpoint), "is sharded, which fsdp2 alone reads", "add --trainer.strategy fsdp2 (on one device too)")
        known = {name: getattr(entry, "size", None) for name, entry in shard_metadata(path).state_dict_metadata.items()}
        saved = {name.removeprefix(_WEIGHTS): size for name, size in known.items() if name.startswith(_WEIGHTS)}
    else:
        saved = {name: tensor.shape for name, tensor in (read_entries(path).get("state_dict") or {}).items()}
    wrong = sorted(name for name in expected.keys() | saved.keys() if name not in expected or name not in saved or saved[name] != expected[name].shape)
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError("ckpt_path", str(checkpoint), f"has missing, unknown or misshapen tensors: {shown}", "use another checkpoint")


def check_resume(checkpoint: Path, *, datamodule: pl.LightningDataModule | None, optimizer: Optimizer, schedule: Any | None, swa: bool = False) -> None:
    """Refuse a checkpoint from which a run cannot go on as if it had never stopped.

    Args:
        checkpoint: file or sharded folder, of a draft (its ``torchspec`` entry was checked).
        datamodule: of the run, if it has one.
        optimizer: of the run.
        schedule: of the run's learning rate, if it has one.
        swa: whether the run has Lightning's StochasticWeightAveraging, which puts a schedule of its own in that one's place.

    Raises:
        UserError: what is missing, or which other optimizer or schedule it has.
    """
    entries = read_entries(checkpoint)
    sharded = standing(checkpoint).is_dir()
    saved = entries["torchspec"].get("resume")
    needed = ["global_step", "loops", "callbacks", "lr_schedulers"]
    needed += [] if sharded else ["optimizer_states"]
    needed += [] if datamodule is None else [_kind(datamodule)]
    missing = [name for name in needed if entries.get(name) is None]
    if "loops" not in missing and "fit_loop" not in entries["loops"]:
        missing.append("loops.fit_loop")
    if saved is None:
        missing.append("torchspec.resume")
    if missing:
        problem = f"cannot be resumed from: it lacks {', '.join(missing)}"
        raise UserError("ckpt_path", str(checkpoint), problem, _WHOLE)
    assert saved is not None
    for name, ours in {"optimizer": [_kind(optimizer)], "lr_scheduler": [] if schedule is None else [_kind(schedule)]}.items():
        if saved[name] != ours and not (swa and name == "lr_scheduler" and saved[name] == [SWALR.__qualname__]):
            raise UserError(f"ckpt_path ({name})", ", ".join(saved[name]) or None, f"differs from this run's {', '.join(ours) or None}", _SAME)
    if sharded:
        moments = sum(key.startswith(_MOMENTS) for key in shard_metadata(standing(checkpoint)).state_dict_metadata)
    else:
        moments = sum(_count(state) for state in entries["optimizer_states"][:1])
    if moments < saved["moments"]:
        problem = f"cannot be resumed from: it has {moments} of the optimizer's {saved['moments']} moments"
        raise UserError("ckpt_path", str(checkpoint), problem, _WHOLE)
