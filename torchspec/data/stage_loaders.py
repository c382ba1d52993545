"""This rank's loaders, one a stage: what each is made of, and where its passes through the plan begin and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from torchspec.agreement import alone
from torchspec.data.device_prefetch import CudaPrefetch
from torchspec.data.loader import LoaderConfig, LoaderStats, PackLoader, Pass
from torchspec.ranks import told_to_end
from torchspec.transfer.record import Record

if TYPE_CHECKING:
    from torchspec.data.datamodule import DraftDataModule
    from torchspec.transfer.shards import ShardWriter


class StageLoaders:
    """Makes loaders when they are asked for, and keeps them.

    Args:
        data: whose they are; used by a trainer.
        health: raises when the engine group is gone.
    """

    def __init__(self, data: DraftDataModule, *, health: Callable[[], None]) -> None:
        self._data = data
        self._health = health
        self._made: dict[str, PackLoader] = {}
        self._writer: ShardWriter | None = None
        self._validations = 0

    def train(self) -> PackLoader:
        """Of the training stage."""
        return self._loader("train", self._begin_train, lambda: self._data.batches_per_epoch)

    def validate(self, number: int, stage: str) -> PackLoader:
        """Of one validation set.

        Args:
            number: of the set, from 0 on.
            stage: its name.
        """
        corpus, world = self._data.corpus, self._trainer.world_size

        def length() -> int:
            return len(corpus.validation_plan(stage, world)) // world

        return self._loader(stage, lambda: self._begin_validation(number, stage), length)

    def stats(self, stage: str) -> LoaderStats:
        """Counters of a stage's loader, zeros where there is none yet."""
        loader = self._made.get(stage)
        return loader.stats if loader is not None else LoaderStats()

    def forget(self) -> None:
        """Make them anew when they are asked for again."""
        self._made.clear()

    def close(self, *, loaders: bool = True) -> None:
        """End them and what was teed. Idempotent."""
        for loader in self._made.values() if loaders else ():
            loader.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def failed_path(self) -> Path:
        """Where samples are named that were given up."""
        return Path(self._trainer.default_root_dir) / "failed_samples.jsonl"

    @property
    def _trainer(self) -> pl.Trainer:
        trainer = self._data.trainer
        assert trainer is not None
        return trainer

    def _loader(self, stage: str, begin: Callable[[], Pass], length: Callable[[], int]) -> PackLoader:
        trainer, data = self._trainer, self._data
        if stage not in self._made:
            device = trainer.strategy.root_device
            config = LoaderConfig(
                stage=stage,
                rank=trainer.global_rank,
                world=trainer.world_size,
                dataset=data.corpus.samples(stage),
                spec=data.spec,
                supervision=data.corpus.rule(stage),
                window_bytes=data.budget,
                prefetch_packs=data.prefetch_packs,
                failed_path=self.failed_path,
                pin=device.type == "cuda",
                health=self._health,
                interrupted=lambda: told_to_end(trainer),
                agree=lambda vote: getattr(trainer, "agreement", alone)(vote),
                chained=stage == "train",
                prefetch_to=CudaPrefetch(device) if device.type == "cuda" else None,
                tee=self._tee(),
                on_policy=stage == "train" and data.corpus.on_policy is not None,
            )
            self._made[stage] = PackLoader(config, connect=data.connect, begin=begin, length=length)
        return self._made[stage]

    def _tee(self) -> Callable[[Record, int], None] | None:
        """Where records of this rank are also written."""
        data = self._data
        if data.tee is None:
            return None
        if self._writer is None:
            from torchspec.transfer.shards import ShardWriter

            self._writer = ShardWriter(data.tee, data.spec, part=f"rank{self._trainer.global_rank}")
        return self._writer.add

    def _begin_train(self) -> Pass:
        """From where the optimizer stands to the end of the plan's epoch, the trainer's epoch or the run, whichever is
        first.
        """
        trainer, data = self._trainer, self._data
        epoch, step = divmod(trainer.global_step, data.corpus.any_plan.steps)
        plan = data.corpus.plan(epoch)
        first = step * data.packs_per_step
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left = [len(plan) - first, (data.batches_limited - ready) * trainer.world_size]
        if trainer.max_steps > 0:
            left.append((trainer.max_steps - trainer.global_step) * data.packs_per_step)
        return Pass(plan, epoch, first, first + max(min(left), 0))

    def _begin_validation(self, number: int, stage: str) -> Pass:
        """The batches that Lightning will take, from the first on."""
        trainer = self._trainer
        validating = trainer.state.fn == TrainerFn.VALIDATING
        loop = trainer.validate_loop if validating else trainer.fit_loop.epoch_loop.val_loop
        plan = self._data.corpus.validation_plan(stage, trainer.world_size)
        self._validations += 1
        end = int(min(loop.max_batches[number] * trainer.world_size, len(plan)))
        return Pass(plan, self._validations, 0, end)
