"""Lightning's batch and epoch counters after a resume, for any number of ranks.

Lightning restores how many micro-batches *a rank of the saved run* had taken. On another number of ranks that is another share of the epoch, and after an
interruption inside an accumulation it counts micro-batches whose gradient was lost. The optimizer steps say what was trained: the counter is set to the
micro-batches that they stand for now. Written against ``lightning.pytorch.loops`` 2.6.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def batches_in_epoch(batches: int, limit: int | float | None) -> int:
    """Micro-batches of an epoch of the trainer, given ``limit_train_batches`` (a number, or a share as float)."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


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
