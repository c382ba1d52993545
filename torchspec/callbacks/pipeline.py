"""How well engines and trainers keep each other busy: rates, waits, bytes in flight, and the bottleneck by name.

Logged every ``trainer.log_every_n_steps`` steps under ``pipeline/`` and summed up in ``pipeline.json`` in the run's folder. Capacity is tokens over *busy*
time: what a side would make if it never waited, so the smaller of the two is the bottleneck whatever the buffers hide. Time spent on validation is in
neither. What the trainer waits is time in which its device stands still (``clock.py``), counted from the second optimizer step on: the first one compiles
kernels, and before it engines start. It is rank 0's: where another rank lacks data, this one stands in a collective and counts as busy.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.callbacks.clock import Clocked
from torchspec.files import dumps, json_with, spare_name, write
from torchspec.models.metrics import logs_now
from torchspec.run_record import or_without

_NAMES = {"engines_alive": "engines/alive"}
"""Of metrics that are not called as in ``pipeline.json``."""


class PipelineMetrics(Clocked):
    """Log the pipeline's rates and name its bottleneck."""

    def __init__(self) -> None:
        super().__init__(skip=1)
        self._trained_s = 0.0
        self._since: float | None = None
        self._tokens = 0
        self._all_tokens: int | None = None
        self._last: dict[str, float] = {}
        self._observer: Any | None = None
        self._drafted = (0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._since = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self._pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.training or (trainer.validating and self._first_step != trainer.global_step):
            self._since = time.monotonic()

    def _pause(self) -> None:
        if self._since is not None:
            self._trained_s += time.monotonic() - self._since
            self._since = None

    def _seconds(self) -> float:
        return self._trained_s + (0.0 if self._since is None else time.monotonic() - self._since)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._tokens += batch.num_tokens
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or not logs_now(trainer):
            return
        self._last = self.measure(trainer)
        pl_module.log_dict({_NAMES.get(name, f"pipeline/{name}"): value for name, value in self._last.items()}, rank_zero_only=True)
        pl_module.log("tokens/s", self._last["tokens_per_s"], prog_bar=True, logger=False, rank_zero_only=True)

    def measure(self, trainer: pl.Trainer) -> dict[str, float]:
        """The state of the pipeline now; token rates are over all ranks, which train as many packs each: until the end all count as this one."""
        seconds = max(self._seconds(), 1e-9)
        trained = self._tokens * trainer.world_size if self._all_tokens is None else self._all_tokens
        times = self.clock.settle(wait=self._all_tokens is not None)
        values = {
            "tokens_per_s": trained / seconds,
            "data_wait_s": times.starved_s,
            "data_wait_fraction": times.starved_s / max(times.busy_s + times.between_s, 1e-9),
        }
        if times.tokens:  # else there was a single step, or the device is not done with the second one
            values["trainer_capacity_tokens_per_s"] = times.tokens / times.busy_s * trained / self._tokens
        state = self._group(trainer)
        if state is not None:
            workers = state["workers"].values()
            values["engine_capacity_tokens_per_s"] = sum(w["tokens"] / w["busy_s"] for w in workers if w["busy_s"] > 0)
            values["engine_write_fraction"] = sum(w["write_s"] for w in workers) / max(sum(w["busy_s"] for w in workers), 1e-9)
            values["engine_idle_for_credit_s"] = sum(w["idle_for_credit_s"] for w in workers)
            values["bytes_in_flight"] = state["bytes_alive"]
            values["bytes_budget"] = state["budget"]
            values["engines_alive"] = sum(w["alive"] and not w["answers"] for w in workers)
            values["worker_restarts"] = state["restarts"]
            values["samples_failed"] = state["failed"]
            drafts, accepted = (sum(w[what] for w in workers) for what in ("drafts", "accepted"))
            before, self._drafted = self._drafted, (drafts, accepted)
            if drafts > before[0]:  # since the last look; a worker that was restarted counts from 0 again
                values["answer_acceptance_length"] = 1.0 + max(accepted - before[1], 0) / (drafts - before[0])
        return {name: float(value) for name, value in values.items()}

    def _group(self, trainer: pl.Trainer) -> dict[str, Any] | None:
        if not trainer.is_global_zero:
            return None
        if self._observer is None:
            self._observer = trainer.datamodule.connect("pipeline-metrics", role="observer")  # type: ignore[attr-defined]
        state: dict[str, Any] = self._observer.ask()
        return state

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._pause()
        counted = trainer.strategy.reduce(torch.tensor(self._tokens, dtype=torch.float64, device=pl_module.device), reduce_op="sum")
        self._all_tokens = int(counted)
        if trainer.is_global_zero and self._tokens:
            summary = self.summary(trainer)
            path = spare_name(Path(trainer.default_root_dir) / "pipeline.json", json_with("tokens_per_s", "train_seconds", "bottleneck"))
            with or_without(path):
                write(path, dumps(summary, indent=2) + "\n")
            rank_zero_info(
                f"{summary['steps']} steps, {summary['tokens']} tokens in {summary['train_seconds']:.1f} s: {summary['tokens_per_s']:.0f} tokens/s; "
                f"waited {summary['data_wait_fraction']:.0%} for data; bottleneck: {summary['bottleneck']}"
            )
        self._close()

    def summary(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Rates of the whole run, and the bottleneck: ``engines`` or ``trainers``; ``unknown`` after a single step."""
        values = self.measure(trainer)
        seconds = self._seconds()
        engines, trainers = (values.get(f"{side}_capacity_tokens_per_s", 0.0) for side in ("engine", "trainer"))
        return {
            **values,
            "tokens": self._all_tokens,
            "train_seconds": seconds,
            "steps": trainer.global_step - self._first_step,
            "bottleneck": "unknown" if not trainers else "engines" if 0.0 < engines < trainers else "trainers",
            "store": self._observer.welcome.store["kind"] if self._observer is not None else None,
            "engine": trainer.datamodule.engine,  # type: ignore[attr-defined]
        }

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None
