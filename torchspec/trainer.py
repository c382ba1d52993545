"""Lightning's Trainer with the two things a run of ours needs around it: what it resumes from, and how it ends.

*Resume.* ``resume_path`` is the checkpoint chosen by ``--ckpt_path``, known before ``setup``: the vocabulary mapping is read from it before the model
exists. ``last`` with no
checkpoint is an error, never a fresh start.

*End.* Before training, SIGINT and SIGTERM raise SystemExit, so that engines close. During training SIGTERM is Lightning's (it stops at the end of the
batch, which all ranks agree on: ``agreement.py``); a first Ctrl-C
is turned into it, so that a step is never cut in half and the checkpoint saved on the way out is whole; a second one breaks. The exit code is 128 + signal;
ranks beside the first exit with 0, since launchers take anything else for a crash and kill the first while it closes the engines.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec import ranks
from torchspec.agreement import Agreement, Vote
from torchspec.callbacks.first import First
from torchspec.callbacks.last import LastCheckpoint
from torchspec.device_lost import device_failure
from torchspec.errors import DeviceLost, UserError
from torchspec.lightning_rules import check_arguments, check_trainer
from torchspec.models.training.checkpoint import beside_shards, is_failed_write, is_ours, partial_of, publish, read_entries, recover, remove, unwrapped
from torchspec.models.training.parallelize import register_strategies
from torchspec.paths import expand_all
from torchspec.reasons import reason_of

_GRACE = 15.0
"""Seconds for other ranks to end after an error or a signal, before they are killed."""


def _continue_wandb_run(trainer: pl.Trainer, checkpoint: str) -> None:
    """Give W&B loggers the run id of the checkpoint (``Provenance`` keeps it there), before they start; an id given by the user stays."""
    loggers: list[Any] = [logger for logger in trainer.loggers if type(logger).__name__ == "WandbLogger"]
    if not loggers or trainer.state.fn != TrainerFn.FITTING:
        return
    record = read_entries(Path(checkpoint)).get("callbacks", {}).get("Provenance", {}).get("record", {})
    run_id = record.get("wandb_run_id")
    for logger in loggers:
        if run_id is not None and not logger._wandb_init.get("id"):
            logger._wandb_init.update(id=run_id, resume="allow")
            logger._id = run_id


def _lost_behind(error: BaseException | None) -> DeviceLost | None:
    """The end of the device that an error came after."""
    while error is not None and not isinstance(error, DeviceLost):
        error = error.__context__
    return error


def _keep_end(logger: Any) -> None:
    """Have a logger that fails when it is closed say so, and not end a run whose training is done."""
    finalize = logger.finalize

    def closing(status: str) -> None:
        try:
            finalize(status)
        except Exception as error:
            logging.getLogger(__name__).warning("%s failed while closing, the run itself has not: %s", type(logger).__name__, reason_of(error))

    if getattr(finalize, "__name__", "") != closing.__name__:
        logger.finalize = closing


def _refuse_foreign_metrics(logger: Any) -> None:
    """Raises UserError where Lightning's CSVLogger, which removes an earlier ``metrics.csv`` of its folder, would remove somebody else's."""
    if type(logger).__name__ != "CSVLogger":
        return
    place = Path(logger.log_dir) / "metrics.csv"
    if place.is_file() and "step" not in place.read_bytes().partition(b"\n")[0].decode(errors="replace").strip().split(","):
        problem = "is there and no list of metrics: the logger would remove it"
        raise UserError("trainer.logger", str(place), problem, "move it away, or give the logger another save_dir, name or version")


def _refuse_foreign_checkpoint(callback: ModelCheckpoint) -> None:
    """Raises UserError where a checkpoint whose name is always the same would take the place of something that is none of ours."""
    numbered = callback._enable_version_counter  # which takes another name instead; ``last`` is replaced all the same (``callbacks/first.py``)
    names = [callback.CHECKPOINT_NAME_LAST] * bool(callback.save_last) + [callback.filename] * (callback.save_top_k != 0 and not numbered)
    for name in names:
        place = Path(str(callback.dirpath)) / f"{name}{callback.FILE_EXTENSION}"
        if name is None or "{" in name or not place.exists() or (place.is_file() and place.stat().st_size == 0):
            continue
        fix = "move it away, or set dirpath of that callback"
        if not is_ours(place):
            raise UserError("trainer.callbacks", str(place), "is there and no checkpoint of a draft: it is left as it is", fix)
        if callback.save_last == "link" and not place.is_symlink() and (others := beside_shards(place)):
            raise UserError("trainer.callbacks", str(place), f"would become a link, and holds what no run wrote: {', '.join(others)}", fix)


class Trainer(pl.Trainer):
    """Lightning's Trainer; see the module's head for what differs."""

    resume_path: str | None = None
    """Checkpoint this run resumes from; None for a fresh start. Known from ``prepare_data`` on."""
    exit_signal: int | None = None
    """Signal that ended the run."""
    agreement: Agreement = Agreement()
    """What ranks say to each other of every batch."""
    _began_at: int = 0
    """Optimizer steps when training began."""
    breaks_off: bool = False
    """True once an error or a signal ends training: ranks may be anywhere then."""
    torn: bool = False
    """True once this rank leaves alone."""

    def __init__(self, **kwargs: Any) -> None:
        register_strategies()
        names = inspect.signature(check_arguments).parameters
        check_arguments(**{name: kwargs.get(name) for name in names})
        super().__init__(**kwargs)

    @property
    def received_sigterm(self) -> bool:
        """True once the run is to end: with several ranks, when they have agreed on it, so that none leaves a loop before the others."""
        return ranks.told_to_end(self) if self.world_size == 1 else self.agreement.reached is Vote.STOP

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a draft: start engines, stream hidden states, train, validate, save, export."""
        check_trainer(self)
        ranks.bind_to_launcher()
        self._place_checkpoints(mend=True)
        with self._rank_log(), self._end_with_signal_code():
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, expand_all(ckpt_path), weights_only)
            self._say_if_nothing_was_trained()

    def _run_stage(self) -> Any:
        self._began_at = self.global_step  # restored by now
        return super()._run_stage()

    def _say_if_nothing_was_trained(self) -> None:
        if self.state.finished and self.global_step == self._began_at:
            why = "a callback stopped it before the first batch, or its limits leave none"
            if self.resume_path is not None:
                why = f"{self.resume_path} is at its end: raise trainer.max_epochs, max_steps or limit_train_batches to go on"
            rank_zero_info(f"this run trained no step: {why}")

    def validate(
        self, model: Any = None, dataloaders: Any = None, ckpt_path: Any = None, verbose: bool = True, datamodule: Any = None, weights_only: bool | None = None
    ) -> Any:
        """Measure a draft on the validation data."""
        check_trainer(self)
        ranks.bind_to_launcher()
        self._place_checkpoints()
        with self._rank_log(), self._end_with_signal_code():
            return super().validate(model, dataloaders, expand_all(ckpt_path), verbose, datamodule, weights_only)

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Lightning's own, beside the final name and then renamed: a crash while saving leaves the checkpoint that was there. Errors are one line."""
        final = Path(filepath)
        local = "://" not in str(filepath)
        partial = partial_of(final)
        try:
            if not local:
                super().save_checkpoint(filepath, weights_only, storage_options)
                return
            if self.is_global_zero:
                remove(partial)
            self.strategy.barrier("checkpoint begins")
            super().save_checkpoint(partial, weights_only, storage_options)
            self.strategy.barrier("checkpoint is whole")
            if self.is_global_zero:
                publish(partial, final)
            self.strategy.barrier("checkpoint is in place")
        except BaseException as error:
            cause = unwrapped(error)
            if cause is error and not isinstance(error, OSError | RuntimeError):
                raise
            if local:
                remove(partial)
            if not is_failed_write(cause):
                raise cause from error
            said = (getattr(cause, "strerror", None) or str(cause)).splitlines()[0]
            fix = "free space or set trainer.default_root_dir elsewhere, then resume with --ckpt_path last; earlier checkpoints are whole"
            raise UserError("checkpoint", str(filepath), f"cannot be written ({said})", fix) from error

    @contextmanager
    def _rank_log(self) -> Iterator[None]:
        """What this rank logs, and the traceback of what ends it, in ``logs/rank-N.log`` of the run's folder."""
        path = Path(self.default_root_dir) / "logs" / f"rank-{self.global_rank}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path)
        except OSError as error:
            raise UserError("trainer.default_root_dir", str(self.default_root_dir), f"cannot be written ({error.strerror})", "choose another folder") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        loggers = [logging.getLogger(name) for name in ("torchspec", "lightning.pytorch", "py.warnings")]
        for logger in loggers:
            logger.addHandler(handler)
        handler.handle(logging.LogRecord("torchspec", logging.INFO, "", 0, f"rank {self.global_rank} of {self.world_size}, pid {os.getpid()}", None, None))
        try:
            yield
        except BaseException as error:
            told = logging.LogRecord("torchspec", logging.ERROR, "", 0, "ended by %s", (type(error).__name__,), (type(error), error, error.__traceback__))
            handler.handle(told)
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()

    def _place_checkpoints(self, *, mend: bool = False) -> None:
        """A ModelCheckpoint without a folder saves under the run's; what a crash left half-way there is put right by the run that writes there."""
        for logger in self.loggers if self.is_global_zero else ():
            _refuse_foreign_metrics(logger)
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.dirpath is None:
                    callback.dirpath = str(Path(self.default_root_dir) / "checkpoints")
                if callback.filename is not None and "{" not in callback.filename and callback.save_top_k == 1:
                    callback._enable_version_counter = False  # one name is one file: that of the newest run
                if mend and self.is_global_zero and "://" not in str(callback.dirpath):
                    folder = Path(callback.dirpath)
                    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
                        raise UserError("trainer.callbacks", str(folder), "is no folder, so no checkpoint could be saved there", "set dirpath of that callback")
                    recover(folder)
                    if not self.fast_dev_run:  # type: ignore[attr-defined]
                        _refuse_foreign_checkpoint(callback)

    def _run(self, model: Any, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        self.resume_path = None if ckpt_path is None else str(ckpt_path)
        if self._asked_for_last and self.resume_path is None:
            folder = getattr(self.checkpoint_callback, "dirpath", None) or self.default_root_dir
            problem = f"was asked for, but no last*.ckpt is under {folder}"
            fix = "name a checkpoint, or drop --ckpt_path; the callback torchspec.callbacks.last.LastCheckpoint writes one in the next run"
            raise UserError("ckpt_path", "last", problem, fix)
        if self.resume_path is not None:
            _continue_wandb_run(self, self.resume_path)
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, First) for callback in callbacks):
            callbacks.insert(0, First())
        for logger in self.loggers:
            _keep_end(logger)
        ranks.take_over(self)
        self.agreement = Agreement(self.world_size, getattr(self.strategy, "_timeout", None))
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)

    def _fit_impl(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self._asked_for_last = "last" in (kwargs.get("ckpt_path"), *(a for a in args if isinstance(a, str)))
        with self._leaving_together():
            return super()._fit_impl(model, *args, **kwargs)

    def _validate_impl(self, *args: Any, **kwargs: Any) -> Any:
        with self._leaving_together():
            return super()._validate_impl(*args, **kwargs)

    @contextmanager
    def _leaving_together(self) -> Iterator[None]:
        """A rank that fails while others go on does not wait for them to save a checkpoint with it: they will not."""
        try:
            yield
        except BaseException as error:
            self.breaks_off = True
            gone = device_failure(error)
            if gone is not None:
                raise self._lost(gone) from error  # which keeps the frames, and so the tensors: freeing them would fail
            if self.world_size > 1:
                ranks.leave_children_alone(self)
                self.torn = not self.agreement.all_leave()
                if self.torn:
                    self._give_up_saving("the other ranks are not leaving")
                elif not self.agreement.alike(self._moment()):
                    self._give_up_saving("the ranks stopped at different moments of a step")
            raise

    def _lost(self, reason: str) -> DeviceLost:
        """Leave without another call on the device."""
        ranks.leave_children_alone(self)
        self.torn = True
        self._give_up_saving("the device is gone")
        saved = [c.last_model_path for c in self.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.last_model_path]
        left = f"{saved[0]} is whole: go on with --ckpt_path last" if saved else "nothing was saved yet"
        return DeviceLost(f"the device failed after {self.global_step} optimizer steps ({reason}); {left}")

    def _moment(self) -> int:
        """Optimizer steps that this rank's state stands for; -1 inside a step, and before training."""
        whole = all(callback.whole for callback in self.checkpoint_callbacks if isinstance(callback, LastCheckpoint))
        return self.global_step if whole else -1

    def _teardown(self) -> None:
        if not self.torn:  # it waits for the device
            super()._teardown()

    def _give_up_saving(self, reason: str) -> None:
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception and self.global_step:
                callback.save_on_exception = False
                logging.getLogger(__name__).warning("%s: no checkpoint of this moment; the last one saved is whole", reason)

    _asked_for_last = False

    @contextmanager
    def _end_with_signal_code(self) -> Iterator[None]:
        """Signals raise SystemExit until Lightning has its own handlers; whatever a signal ended exits with 128 + its number."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        except (SystemExit, KeyboardInterrupt) as stopped:
            if self.exit_signal is None and isinstance(stopped, KeyboardInterrupt):
                self.exit_signal = signal.SIGINT
            if self.exit_signal is None and isinstance(stopped, SIGTERMException):
                self.exit_signal = signal.SIGTERM  # another rank's
            self._end_ranks()
            if self.exit_signal is None:
                raise
            raise SystemExit(128 + self.exit_signal if self.global_rank == 0 else 0) from None
        except BaseException as error:
            self._end_ranks()
            lost = _lost_behind(error)
            if lost is not None and lost is not error:
                raise lost from None  # what a callback met on its way out is not what ended the run
            if self.torn and self.exit_signal is not None and isinstance(error, RuntimeError):  # of a collective that the signal made others leave
                raise SystemExit(128 + self.exit_signal if self.global_rank == 0 else 0) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_ranks(self) -> None:
        if self.torn:
            ranks.wait_for_children(self, seconds=0.0)
            ranks.leave_at_once = True
            return
        ranks.part()
        ranks.wait_for_children(self, seconds=_GRACE)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.exit_signal is not None
        if not again:
            self.exit_signal = number
        training = signal.getsignal(signal.SIGTERM) != self._on_signal  # Lightning's handlers are in place
        if number == signal.SIGTERM and training:
            return  # Lightning's own handler, which calls this one, takes note of it
        if number == signal.SIGINT and training and not again:
            if self.global_rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if again and number == signal.SIGTERM:
            return  # already on the way out
        if number == signal.SIGTERM:
            ranks.tell_launcher(number)
        raise SystemExit(128 + number) if not training else KeyboardInterrupt
