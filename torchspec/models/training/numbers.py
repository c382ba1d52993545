"""What ends a run whose numbers are none: the same on all ranks, before a good checkpoint is written over, with the reason by name.

A loss that is NaN is an effect. Its cause is said where it can be seen: target states that are NaN or infinite (a target in float16 overflows) by the
conversations they belong to, weights by their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.ops.not_finite import no_longer_numbers, not_finite
from torchspec.models.training.finite import LAG, Found, unsound

if TYPE_CHECKING:
    from torchspec.models.module import DraftModule

_SHOWN = 3
_ELSEWHERE = "another rank has found NaN or infinity in its part"


def check_start(module: DraftModule) -> None:
    """Refuse what was restored, or started from, where it is not made of numbers; on all ranks.

    Raises:
        UserError: naming the checkpoint, or what the weights started from.
    """
    trainer = module.trainer
    states = [dict(enumerate(optimizer.state.values())) for optimizer in trainer.optimizers]
    problem = unsound({"state_dict": dict(module.named_parameters()), "optimizer_states": states})
    if not trainer.strategy.reduce_boolean_decision(not problem):
        path = getattr(trainer, "resume_path", None)
        said, source = problem or _ELSEWHERE, None if module.start is None else module.start.source
        if path is None and source is None:
            raise UserError("data.target.path", module.target.config.path, f"gives no draft to begin with: {said}", "check the target's files")
        field, value = ("model.start_from", source) if path is None else ("ckpt_path", path)
        raise UserError(field, value, f"cannot be trained on from: {said}", "use an earlier checkpoint")


def check_saved(module: DraftModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to save weights or optimizer states that are no longer numbers; on all ranks, but where a run breaks off: then ranks may be anywhere.

    Raises:
        UserError: what is on the disk is kept.
    """
    trainer, problem = module.trainer, unsound(checkpoint)
    alone = getattr(trainer, "breaks_off", False)
    if problem if alone else not trainer.strategy.reduce_boolean_decision(not problem):
        found = module.watch.look(trainer.global_step + LAG)
        if found is not None and found.samples:
            raise bad_states(module, found.samples, "train", found.step)  # the cause
        fix = "go on from the last one with --ckpt_path last and a lower learning rate, or with model.matmul: bf16 where it is another"
        raise UserError("checkpoint", f"step {trainer.global_step}", f"is not written: {problem or _ELSEWHERE}. What is there is kept", fix)


def no_number(module: DraftModule, field: str, value: float, step: int) -> UserError:
    """The error of a loss that is NaN or infinite."""
    names = [] if module.task is None else not_finite(module.task.draft.named_parameters())
    weights = no_longer_numbers(names) if names else "its gradient would leave no weight a number"
    other = "a lower learning rate" if module.matmul == "bf16" else "model.matmul: bf16"
    problem = f"at step {step} is not a number: {weights}, and training on would be in vain"
    return UserError(field, value, problem, f"begin again, or go on from the last checkpoint with --ckpt_path last, with {other}")


def end_for(module: DraftModule, found: Found) -> None:
    """End the run for what the watch of a step found, where all ranks have found it: the gradient is that of all.

    Raises:
        UserError: on the ranks that know the reason.
        SystemExit: on the others.
    """
    trainer = module.trainer
    if trainer.world_size > 1:
        if found.gradient:
            return  # a rank's own loss alone: the loss of all is looked at where it is logged
        if not trainer.strategy.reduce_boolean_decision(not found.samples) and not found.samples:
            raise SystemExit(2)
    if found.samples:
        raise bad_states(module, found.samples, "train", found.step)
    raise no_number(module, "train/loss", math.nan, found.step)


def end_for_validation(module: DraftModule, loss: float, states: Sequence[tuple[tuple[int, ...], str, Tensor]]) -> None:
    """End the run for a validation loss that is no number, on every rank.

    Args:
        module: of the run.
        loss: over all ranks.
        states: of each batch of this rank its samples, its stage and their :func:`~torchspec.models.training.finite.totals`.

    Raises:
        UserError: on the ranks that know the reason.
        SystemExit: on the others.
    """
    bad = [(stage, i) for ids, stage, sums in states for i, good in zip(ids, torch.isfinite(sums).tolist(), strict=True) if not good]
    if not module.trainer.strategy.reduce_boolean_decision(not bad) and not bad:
        raise SystemExit(2)
    step = module.trainer.global_step
    if bad:
        raise bad_states(module, [i for stage, i in bad if stage == bad[0][0]], bad[0][0], step)
    raise no_number(module, "val/loss", loss, step)


def bad_states(module: DraftModule, samples: Sequence[int], stage: str, step: int) -> UserError:
    """The error of target states that are NaN or infinite."""
    corpus = getattr(getattr(module.trainer, "datamodule", None), "corpus", None)
    places = [f"sample {i}" if corpus is None else corpus.samples(stage).place(i) for i in samples[:_SHOWN]]
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    problem = f"have target states with NaN or infinity (found at step {step}): nothing can be learned from them"
    fix = "run the target in bfloat16 or float32 (data.target.dtype) and extract records on disk again, or take these conversations out"
    return UserError("hidden states", ", ".join(places) + more, problem, fix)
