"""What the Trainer puts before every other callback, so that none needs to know which others there are, or in which
order.

*Start.* The draft is built before any callback's ``setup``: some build it there themselves (Lightning's
WeightAveraging), some copy or freeze what is there (StochasticWeightAveraging, BaseFinetuning). The vocabulary is
chosen inside that building (``DraftModule.configure_model``).

*Averages.* Lightning's WeightAveraging averages buffers too, which here are the target's frozen tables; it would
validate and export the untrained start until its average begins, and a run broken off in a validation would save the
two sets of weights in each other's place.

*Checkpoints.* ``last.ckpt`` is this run's from its first save on, whatever an earlier run left there; the one of the
end is saved before other callbacks put averages into the weights, so that a resume goes on from the weights in
training. Which weights are frozen is part of it.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from torchspec.errors import DeviceLost, UserError
from torchspec.models.training.averages import averagers, begun, swa_of

log = logging.getLogger(__name__)


class First(pl.Callback):
    """See the module. ``Trainer`` adds it; it needs no place in a configuration."""

    def __init__(self) -> None:
        self._guarded: set[WeightAveraging] = set()
        self._exchanged: dict[WeightAveraging, Callable[[Any], None]] = {}
        """Averages that stand in the draft's place now (validation), with what changes them back."""
        self._max_epochs: int | None = None
        self._frozen: list[str] | None = None
        """Weights that were not trained where the checkpoint was saved (Lightning's BaseFinetuning frees them where an
        epoch begins)."""
        self._module: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        for callback in averagers(trainer):
            self._guard(callback)
        self._module = pl_module
        self._max_epochs = trainer.max_epochs if swa_of(trainer) is not None else None
        pl_module.configure_model()

    def _guard(self, callback: WeightAveraging) -> None:
        if callback in self._guarded:
            return
        self._guarded.add(callback)
        callback._use_buffers = False
        swap, copy = callback._swap_models, callback._copy_average_to_current

        def swap_once_begun(pl_module: Any) -> None:
            if begun(callback):
                swap(pl_module)
                if self._exchanged.pop(callback, None) is None:
                    self._exchanged[callback] = swap

        def copy_once_begun(pl_module: Any) -> None:
            if begun(callback):
                copy(pl_module)
            else:
                log.warning("%s averaged nothing in this run: the weights stay as they were trained", type(callback).__name__)

        callback._swap_models, callback._copy_average_to_current = swap_once_begun, copy_once_begun  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for each in callbacks:
            _check_state(each)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last and "{" not in callback.CHECKPOINT_NAME_LAST:
                callback.last_model_path = callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)  # its own: replaced, not numbered
        if self._frozen is not None:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(name not in self._frozen)
        swa = swa_of(trainer)
        if swa is not None and trainer.fit_loop.restarted_mid_epoch:
            swa.on_train_epoch_start(trainer, pl_module)  # Lightning leaves the hook out; the schedule of the average is restored in it

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        swa = swa_of(trainer)
        if swa is None:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.on_train_end(trainer, pl_module)
        elif trainer.current_epoch - 1 != swa.swa_end:
            log.warning("StochasticWeightAveraging: the run ended before its last epoch; the weights are those in training, not the average")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, DeviceLost):
            return
        for change_back in self._exchanged.values():
            change_back(pl_module)
        self._exchanged.clear()

    def state_dict(self) -> dict[str, Any]:
        frozen = [name for name, parameter in self._module.named_parameters() if not parameter.requires_grad]
        return {"max_epochs": self._max_epochs, "frozen": frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._frozen = state_dict.get("frozen")
        if self._max_epochs is not None and state_dict.get("max_epochs") != self._max_epochs:
            problem = f"differs from the {state_dict.get('max_epochs')} of the checkpoint: when StochasticWeightAveraging begins and ends follows from it"
            raise UserError("trainer.max_epochs", self._max_epochs, problem, "use the same, or average with lightning.pytorch.callbacks.EMAWeightAveraging")


def _check_state(callback: pl.Callback) -> None:
    """Refuse a callback whose state a checkpoint could not be read back with: a resume would find out, after the
    training.

    Raises:
        UserError: it keeps something else than plain values and tensors (a path, an object).
    """
    state = _without_tensors(callback.state_dict())
    held = io.BytesIO()
    try:
        torch.save(state, held)
        held.seek(0)
        torch.load(held, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        problem = f"returns from state_dict() what no checkpoint is read back with ({(str(error).splitlines() or [''])[0][:100]})"
        raise UserError("trainer.callbacks", type(callback).__name__, problem, "return plain values and tensors alone") from error


def _without_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_tensors(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry) for entry in value]
    return None if isinstance(value, torch.Tensor) else value
