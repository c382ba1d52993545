"""What must hold between plan and Lightning's loops: settings that contradict the plan, and the counters after a resume on any number of ranks.

Lightning restores how many micro-batches *a rank of the saved run* had taken. On another number of ranks that is another share of the epoch, and after an
interruption inside an accumulation it counts micro-batches whose gradient was lost. The optimizer steps say what was trained: the counter is set to the
micro-batches that they stand for now. Written against ``lightning.pytorch.loops`` 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from torchspec.data.plan import Plan
from torchspec.errors import UserError


def batches_in_epoch(batches: int, limit: int | float | None) -> int:
    """Micro-batches of an epoch of the trainer, given ``limit_train_batches`` (a number, or a share as float)."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def check_trainer(trainer: Any, *, packs_per_step: int) -> None:
    """Refuse settings of the trainer that the plan cannot follow.

    Raises:
        UserError: by name.
    """
    world = trainer.world_size
    if packs_per_step % world:
        fix = f"use a multiple of {world}, or another number of devices (accumulation is the quotient)"
        raise UserError("data.packs_per_step", packs_per_step, f"is no multiple of the {world} ranks", fix)
    if trainer.accumulate_grad_batches not in (1, packs_per_step // world):
        problem = f"contradicts data.packs_per_step={packs_per_step} on {world} ranks, which means {packs_per_step // world}"
        fix = "leave it out: data.packs_per_step alone sets the size of a step"
        raise UserError("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, problem, fix)
    for schedule in schedules(trainer):
        accumulation = packs_per_step // world
        if not _agrees(schedule, accumulation):
            plan = f"data.packs_per_step={packs_per_step} on {world} ranks, which means {accumulation}"
            fix = "take it out: data.packs_per_step alone sets the size of a step"
            raise UserError("trainer.callbacks", type(schedule).__name__, f"({schedule.scheduling}) contradicts {plan}", fix)
    if trainer.reload_dataloaders_every_n_epochs:
        problem = "is of no use here: the plan orders each epoch anew"
        raise UserError("trainer.reload_dataloaders_every_n_epochs", trainer.reload_dataloaders_every_n_epochs, problem, "leave it out")
    if trainer.overfit_batches:
        fix = "use trainer.limit_train_batches, or a small training file"
        raise UserError("trainer.overfit_batches", trainer.overfit_batches, "needs a loader that Lightning may rearrange", fix)


def schedules(trainer: Any) -> list[GradientAccumulationScheduler]:
    """Callbacks of a run that set its accumulation."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]


def _agrees(schedule: GradientAccumulationScheduler, accumulation: int) -> bool:
    """Whether it would set what the plan means, whatever the epoch; a subclass may do anything."""
    return type(schedule) is GradientAccumulationScheduler and set(schedule.scheduling.values()) == {accumulation}


def drop_schedules(trainer: Any) -> None:
    """Take out those that agree with the plan (:func:`check_trainer` has refused others): Lightning's takes an accumulation that is set already for the
    user's, and ends the run."""
    for schedule in schedules(trainer):
        trainer.callbacks.remove(schedule)


def check_limit(trainer: Any, *, batches_per_epoch: int) -> None:
    """Refuse a limit that would end the trainer's epoch inside an optimizer step (Lightning would step on a part of its packs).

    Raises:
        UserError: when it does.
    """
    limited = batches_in_epoch(batches_per_epoch, trainer.limit_train_batches)
    if limited % trainer.accumulate_grad_batches and not trainer.fast_dev_run:
        problem = f"means {limited} micro-batches of a rank, which is no whole number of steps of {trainer.accumulate_grad_batches}"
        raise UserError("trainer.limit_train_batches", trainer.limit_train_batches, problem, f"use a multiple of {trainer.accumulate_grad_batches}")


def cursor(plan: Plan, *, steps: int, seed: int, world: int) -> dict[str, Any]:
    """The position of a run for its checkpoint, from the optimizer steps done; the same on every rank."""
    epoch, step = divmod(steps, plan.steps)
    return {
        "seed": seed,
        "epoch": epoch,
        "packs_trained": step * plan.packs_per_step,
        "packs_per_step": plan.packs_per_step,
        "max_tokens": plan.max_tokens,
        "max_rows": plan.max_rows,
        "conversations": len(plan.lengths),
        "content": plan.content,
        "plan_fingerprint": plan.fingerprint,
        "world_size": world,
    }


def check_cursor(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a position of another plan.

    Raises:
        UserError: by what differs.
    """
    data = "data (data.train, data.max_length, the target's template)"
    settings = {name: f"data.{name}" for name in ("packs_per_step", "seed", "max_tokens", "max_rows")}
    order = "data and order" if ours.get("max_rows") is None else "data, order and anchors of the draft"
    for name, what in {**settings, "conversations": data, "content": data, "plan_fingerprint": order}.items():
        if saved.get(name) != ours.get(name):
            fix = f"resume with the {what} of the checkpoint, or start a new run"
            raise UserError(f"ckpt_path ({name})", saved.get(name), f"differs from this run's {ours.get(name)}", fix)


def set_progress(trainer: pl.Trainer, *, batches_per_epoch: int, packs_per_step: int, saved_world: int) -> None:
    """Set the counters of batches and epochs from the optimizer steps done. To be called after the loops are restored and before they run.

    Args:
        trainer: restored from a checkpoint.
        batches_per_epoch: micro-batches of a rank in an epoch, on this number of ranks.
        packs_per_step: packs of an optimizer step.
        saved_world: ranks of the saved run.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    steps_in_epoch = max(batches_in_epoch(batches_per_epoch, trainer.limit_train_batches) // trainer.accumulate_grad_batches, 1)
    steps = progress.current.ready // max(packs_per_step // saved_world, 1)
    if steps % steps_in_epoch != trainer.global_step % steps_in_epoch:
        steps = trainer.global_step % steps_in_epoch
    batches = steps * trainer.accumulate_grad_batches
    # a save at the end of a batch comes before that batch counts as completed; Lightning completes it itself
    unfinished = int(progress.total.processed == progress.total.completed + 1 and progress.total.ready == progress.total.processed and batches > 0)
    progress.current.ready = progress.current.started = progress.current.processed = batches
    progress.current.completed = batches - unfinished
    if trainer.global_step % steps_in_epoch:
        # a run that max_steps ended had its epoch counted as whole
        epochs: Any = trainer.fit_loop.epoch_progress
        for counter in (epochs.total, epochs.current):
            counter.ready = counter.started = trainer.global_step // steps_in_epoch + 1
            counter.processed = counter.completed = counter.ready - 1
        trainer.fit_loop.restarting = True
