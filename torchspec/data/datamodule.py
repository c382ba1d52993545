"""The data side of a run: tokenised conversations, the plan, the engine group, and the loaders; everything that Lightning asks a datamodule for.

Order of events (docs/design.md): ``prepare_data`` tokenises on each host and, on global rank 0 and in its main thread, starts the engine group; ``setup``
makes the plan and takes the group's address from rank 0; the loaders stream; ``teardown`` or ``on_exception`` closes it all.

*Resume.* The position is the number of optimizer steps done, which the trainer restores; the checkpoint only carries what must still be the same
(``state_dict``). Every loader counts a whole epoch as its length, and Lightning's own batch counter is set to what the position means for this world size
(``progress.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.batch import PackedBatch
from torchspec.data.dataset import TokenizedDataset
from torchspec.data.failures import cut_failures
from torchspec.data.loader import LoaderConfig, LoaderStats, PackLoader, Pass
from torchspec.data.plan import Plan
from torchspec.data.prepare import DataOptions, prepare
from torchspec.data.progress import batches_in_epoch, set_progress
from torchspec.engines.engine import EngineConfig
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig
from torchspec.transfer.record import RecordSpec
from torchspec.transfer.sizes import parse_bytes, show_bytes
from torchspec.transfer.store import StoreConfig

if TYPE_CHECKING:
    from torchspec.engines.client import TrainerClient
    from torchspec.engines.group import Endpoint, EngineGroup

_ENGINES = EngineConfig()
_STORE = StoreConfig()
_LONG_START = 5.0
"""Seconds without a first batch before the log says what is waited for."""


class DraftDataModule(pl.LightningDataModule):
    """Streams a target's hidden states over conversations.

    Args:
        target: the frozen model.
        train: conversation file (.jsonl, .json, .parquet, .arrow), a folder of them, or a hub dataset id (``org/name:split``); or several.
        validate: the same for validation; none skips it.
        unroll_steps: K, linked from the model.
        aux_layers: hidden-state indices fed to the draft, linked from the model.
        max_length: tokens of a conversation at most; longer ones are cut on the right.
        max_tokens: tokens of a pack (one micro-batch of one rank) at most.
        packs_per_step: packs of an optimizer step over all ranks; accumulation is this divided by the number of ranks.
        seed: of the order of the data.
        engine: which engine runs the target.
        engines: how its workers run.
        store: where hidden states wait.
        cache_dir: folder of tokenised data; none means ``~/.cache/torchspec`` (``XDG_CACHE_HOME`` is honoured).
        messages_key: column of the messages; none takes ``conversations`` or ``messages``.
        min_supervised_tokens: conversations with fewer answer tokens within max_length are dropped, and counted.
        max_bad_fraction: share of unusable rows that is tolerated; they are listed beside the cache either way.
        num_proc: processes that tokenise; none takes the cores there are for large inputs.
        prefetch_packs: finished batches that wait in memory for a rank's trainer.
    """

    def __init__(
        self,
        target: TargetConfig,
        train: str | list[str],
        validate: str | list[str] | None = None,
        unroll_steps: int = 7,
        aux_layers: list[int] | None = None,
        max_length: int = 2048,
        max_tokens: int = 4096,
        packs_per_step: int = 8,
        seed: int = 0,
        engine: str = "transformers",
        engines: EngineConfig = _ENGINES,
        store: StoreConfig = _STORE,
        cache_dir: str | None = None,
        messages_key: str | None = None,
        min_supervised_tokens: int = 2,
        max_bad_fraction: float = 0.0,
        num_proc: int | None = None,
        prefetch_packs: int = 4,
    ) -> None:
        super().__init__()
        for name, value in {"max_length": max_length, "packs_per_step": packs_per_step, "prefetch_packs": prefetch_packs, "unroll_steps": unroll_steps}.items():
            if value < 1:
                raise UserError(f"data.{name}", value, "is below 1", "use 1 or more")
        if max_length > max_tokens:
            raise UserError(
                "data.max_length",
                max_length,
                f"is longer than data.max_tokens={max_tokens}: a conversation must fit into a pack",
                "lower it or raise data.max_tokens",
            )
        if not 0.0 <= max_bad_fraction < 1.0:
            raise UserError("data.max_bad_fraction", max_bad_fraction, "is no share", "use a number from 0 up to, but not including, 1")
        self.target = Target(target)
        self.train_source, self.validate_source = train, validate
        self.unroll_steps = unroll_steps
        self.aux_layers = self.target.aux_layers(aux_layers)
        self.max_tokens, self.packs_per_step, self.seed = max_tokens, packs_per_step, seed
        self.engine, self.engines, self.store = engine, engines, store
        self.budget = parse_bytes(store.budget, field="data.store.budget")
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchspec"
        self.options = DataOptions(max_length=max_length, min_supervised_tokens=min_supervised_tokens, messages_key=messages_key)
        self.max_bad_fraction, self.num_proc, self.prefetch_packs = max_bad_fraction, num_proc, prefetch_packs
        self.group: EngineGroup | None = None
        self.endpoint: Endpoint | None = None
        self._data: dict[str, TokenizedDataset] = {}
        self._plans: dict[str, Plan] = {}
        self._counts: np.ndarray | None = None
        self._validations = 0
        self._loaders: dict[str, PackLoader] = {}
        self._restored: dict[str, Any] | None = None
        self._refusal: Exception | None = None
        self._started = 0.0
        self._said_waiting = False

    # -- data sets and plans

    def dataset(self, stage: str) -> TokenizedDataset:
        """The tokenised data of ``train`` or ``validate``; built on first use."""
        if stage not in self._data:
            source = self.train_source if stage == "train" else self.validate_source
            assert source is not None
            tokenizer = self.target.tokenizer() if self._has_tokenizer() else None
            self._data[stage] = prepare(
                source,
                options=self.options,
                tokenizer=tokenizer,
                vocab_size=self.target.vocab_size,
                cache_dir=self.cache_dir,
                target_name=self.target.config.path,
                config_key=f"data.{stage}",
                max_bad_fraction=self.max_bad_fraction,
                num_proc=self.num_proc,
            )
            rank_zero_info(f"{stage}: {self._data[stage].summary}")
        return self._data[stage]

    def plan(self, epoch: int) -> Plan:
        """The plan of a training epoch."""
        known = self._plans.get("train")
        if known is None or known.epoch != epoch:
            data = self.dataset("train")
            if self._counts is None:
                self._counts = data.supervised_counts(self.unroll_steps)
            known = self._plans["train"] = Plan(
                data.lengths,
                seed=self.seed,
                epoch=epoch,
                max_tokens=self.max_tokens,
                packs_per_step=self.packs_per_step,
                counts=self._counts,
                content=data.content,
                num_packs=None if known is None else len(known),
            )
        return known

    def validation_plan(self, world: int) -> Plan:
        """Validation data in its own order, padded so that every rank has as many packs."""
        if "validate" not in self._plans:
            data = self.dataset("validate")
            self._plans["validate"] = Plan(
                data.lengths,
                seed=0,
                epoch=0,
                max_tokens=self.max_tokens,
                packs_per_step=world,
                counts=data.supervised_counts(self.unroll_steps),
                shuffle=False,
                content=data.content,
            )
        return self._plans["validate"]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Content hashes of the data, for provenance."""
        return {stage: data.content for stage, data in self._data.items()}

    def token_counts(self) -> torch.Tensor:
        """[V] int64, supervised occurrences of each token in the training set."""
        return torch.from_numpy(self.dataset("train").token_counts(self.target.vocab_size))

    def special_end_ids(self) -> list[int]:
        """Ids that end what the target generates: by its generation config, its tokenizer, and the data."""
        ids = set(self.dataset("train").end_ids)
        for given in (
            self._generation_config().get("eos_token_id"),
            self.target.hf_config.eos_token_id,
            self.target.tokenizer().eos_token_id if self._has_tokenizer() else None,
        ):
            ids.update([given] if isinstance(given, int) else given or [])
        return sorted(i for i in ids if 0 <= i < self.target.vocab_size)

    def _generation_config(self) -> dict[str, Any]:
        from transformers import GenerationConfig

        try:
            described: dict[str, Any] = GenerationConfig.from_pretrained(self.target.config.path, revision=self.target.config.revision or "main").to_dict()
        except (OSError, ValueError):
            return {}
        return described

    def _has_tokenizer(self) -> bool:
        try:
            self.target.tokenizer()
        except UserError:
            return False
        return True

    @property
    def spec(self) -> RecordSpec:
        """What every record of this run must say of itself."""
        data = self._data.get("train") or self._data["validate"]
        return RecordSpec(
            target=self.target.fingerprint,
            tokenizer=data.tokenizer,
            aux_layers=self.aux_layers,
            hidden_size=self.target.hidden_size,
            dtype=str(self.target.dtype).removeprefix("torch."),
        )

    # -- Lightning's hooks

    def prepare_data(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            if self._trainer.world_size == 1:
                raise
            self._refusal = error  # the other ranks wait: setup, which all of them run, ends the run for all

    def _prepare(self) -> None:
        self._check()
        trainer = self._trainer
        training = trainer.state.fn == TrainerFn.FITTING
        for stage, source in (("train", self.train_source), ("validate", self.validate_source)):
            if source is not None and (training or stage == "validate"):
                self.dataset(stage)
        if trainer.is_global_zero:
            self._start_group(training)

    def setup(self, stage: str) -> None:
        trainer = self._trainer
        if not trainer.strategy.reduce_boolean_decision(self._refusal is None, all=True):
            if self._refusal is not None:
                raise self._refusal
            raise SystemExit(2)  # the rank that knows why says it
        if stage == "fit":
            trainer.accumulate_grad_batches = self.packs_per_step // trainer.world_size
            self.plan(0)
        if self.validate_source is not None:
            self.validation_plan(trainer.world_size)
        self.endpoint = trainer.strategy.broadcast(self.endpoint)

    def train_dataloader(self) -> PackLoader:
        if self._restored is not None:
            set_progress(self._trainer, batches_per_epoch=self._batches, packs_per_step=self.packs_per_step, saved_world=int(self._restored["world_size"]))
            self._restored = None
        if self._trainer.is_global_zero:
            epoch, step = divmod(self._trainer.global_step, self.plan(0).steps)
            cut_failures(self._failed_path, epoch=epoch, pack=step * self.packs_per_step)
        return self._loader("train", self._begin_train, lambda: self._batches)

    def val_dataloader(self) -> PackLoader | list[Any]:
        if self.validate_source is None:
            return []
        plan = self.validation_plan(self._trainer.world_size)
        return self._loader("validate", self._begin_validation, lambda: len(plan) // self._trainer.world_size)

    def transfer_batch_to_device(self, batch: PackedBatch, device: torch.device, dataloader_idx: int) -> PackedBatch:
        return batch if device.type == "cpu" else batch.to(device)

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """End loaders and engines. Idempotent."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()
        if self.group is not None:
            self.group.close()
            self.group = None
        self.endpoint = None

    def state_dict(self) -> dict[str, Any]:
        """The cursor; the same on every rank."""
        if "train" not in self._data:
            return {}
        epoch, step = divmod(self._trainer.global_step, self.plan(0).steps if not self._plans.get("train") else self._plans["train"].steps)
        return {
            "seed": self.seed,
            "epoch": epoch,
            "packs_trained": step * self.packs_per_step,
            "packs_per_step": self.packs_per_step,
            "plan_fingerprint": self._plans["train"].fingerprint,
            "world_size": self._trainer.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._trainer.state.fn != TrainerFn.FITTING:
            return
        ours = self.state_dict()
        for name in ("packs_per_step", "seed", "plan_fingerprint"):
            if state.get(name) != ours[name]:
                what = "data (content, max_length, max_tokens or order)" if name == "plan_fingerprint" else f"data.{name}"
                raise UserError(
                    f"ckpt_path ({name})",
                    state.get(name),
                    f"differs from this run's {ours[name]}",
                    f"resume with the {what} of the checkpoint, or start a new run",
                )
        self._restored = dict(state)

    # -- for callbacks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch of the trainer."""
        accumulation = self._trainer.accumulate_grad_batches
        return -(-self._batches_limited // accumulation)

    def loader_stats(self, stage: str) -> LoaderStats:
        """Counters of this rank's loader of a stage."""
        loader = self._loaders.get(stage)
        return loader.stats if loader is not None else LoaderStats()

    def connect(self, name: str, role: str = "trainer") -> TrainerClient:
        """A connection of this process to the coordinator, as ``trainer`` or ``observer``; the caller closes it."""
        from torchspec.engines.client import TrainerClient

        assert self.endpoint is not None, "the engine group is not running"
        return TrainerClient(self.endpoint, name, role=role)

    # -- inside

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "the datamodule is used by a trainer"
        return self.trainer

    @property
    def _batches(self) -> int:
        """Micro-batches of a rank in an epoch."""
        return len(self.plan(0) if "train" not in self._plans else self._plans["train"]) // self._trainer.world_size

    @property
    def _batches_limited(self) -> int:
        return batches_in_epoch(self._batches, self._trainer.limit_train_batches)

    @property
    def _failed_path(self) -> Path:
        return Path(self._trainer.default_root_dir) / "failed_samples.jsonl"

    def _check(self) -> None:
        trainer: Any = self._trainer
        world = trainer.world_size
        if self.packs_per_step % world:
            raise UserError(
                "data.packs_per_step",
                self.packs_per_step,
                f"is no multiple of the {world} ranks",
                f"use a multiple of {world}, or another number of devices (accumulation is the quotient)",
            )
        if trainer.accumulate_grad_batches not in (1, self.packs_per_step // world):
            raise UserError(
                "trainer.accumulate_grad_batches",
                trainer.accumulate_grad_batches,
                f"contradicts data.packs_per_step={self.packs_per_step} on {world} ranks, which means {self.packs_per_step // world}",
                "leave it out: data.packs_per_step alone sets the size of a step",
            )
        if trainer.reload_dataloaders_every_n_epochs:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs",
                trainer.reload_dataloaders_every_n_epochs,
                "is of no use here: the plan orders each epoch anew",
                "leave it out",
            )
        if trainer.overfit_batches:
            raise UserError(
                "trainer.overfit_batches",
                trainer.overfit_batches,
                "needs a loader that Lightning may rearrange",
                "use trainer.limit_train_batches, or a small training file",
            )

    def _start_group(self, training: bool) -> None:
        from torchspec.engines.group import EngineGroup, GroupConfig

        world = self._trainer.world_size
        spec = self.spec
        largest = {}
        if training:
            largest["train"] = int(self._pack_bytes("train", self.plan(0)).max())
        if self.validate_source is not None:
            largest["validate"] = int(self._pack_bytes("validate", self.validation_plan(world)).max())
        need = world * sum(largest.values())
        if self.budget < need:
            raise UserError(
                "data.store.budget",
                self.store.budget,
                f"is less than the {show_bytes(need)} that one pack of each of the {world} ranks needs (training and validation)",
                "raise it or lower data.max_tokens",
            )
        self.group = EngineGroup(
            GroupConfig(
                target=self.target.config,
                spec=spec,
                store=self.store,
                engine=self.engine,
                engines=self.engines,
                budget=self.budget,
                reserve=world * largest.get("validate", 0),
                max_length=self.options.max_length,
                log_dir=Path(self._trainer.default_root_dir) / "logs",
            )
        )
        self._started = time.monotonic()
        self.endpoint = self.group.start()

    def _pack_bytes(self, stage: str, plan: Plan) -> np.ndarray:
        """[packs] bytes of the records of each pack."""
        lengths = self.dataset(stage).lengths
        spec = self.spec
        of_length = {int(length): spec.nbytes(int(length)) for length in np.unique(lengths)}
        return plan.sums(np.array([of_length[int(length)] for length in lengths], dtype=np.int64))

    def _loader(self, stage: str, begin: Any, length: Any) -> PackLoader:
        trainer = self._trainer
        if stage not in self._loaders:
            config = LoaderConfig(
                stage=stage,
                rank=trainer.global_rank,
                world=trainer.world_size,
                dataset=self.dataset(stage),
                spec=self.spec,
                window_bytes=self.budget,
                prefetch_packs=self.prefetch_packs,
                failed_path=self._failed_path,
                pin=trainer.strategy.root_device.type == "cuda",
                health=self._check_group,
                interrupted=lambda: bool(trainer.received_sigterm),
                chained=stage == "train",
            )
            self._loaders[stage] = PackLoader(config, connect=self.connect, begin=begin, length=length)
        return self._loaders[stage]

    def _check_group(self) -> None:
        """Raise when the group is gone; says once what a long start is waiting for."""
        if self.group is None:
            return
        self.group.check()
        if (
            not self._said_waiting
            and self.loader_stats("train").packs + self.loader_stats("validate").packs == 0
            and time.monotonic() - self._started > _LONG_START
        ):
            self._said_waiting = True
            rank_zero_info(f"waiting for the first states: engine workers are loading the target (logs in {self.group.config.log_dir})")

    def _begin_train(self) -> Pass:
        """From where the optimizer stands to the end of the trainer's epoch."""
        trainer = self._trainer
        world = trainer.world_size
        steps = self._plans["train"].steps
        epoch, step = divmod(trainer.global_step, steps)
        plan = self.plan(epoch)
        first = step * self.packs_per_step
        left = [len(plan) - first, (self._batches_limited - trainer.fit_loop.epoch_loop.batch_progress.current.ready) * world]
        if trainer.max_steps > 0:
            left.append((trainer.max_steps - trainer.global_step) * self.packs_per_step)
        return Pass(plan, epoch, first, first + max(min(left), 0))

    def _begin_validation(self) -> Pass:
        """The first batches that Lightning will take, or all."""
        trainer = self._trainer
        loop = trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop.val_loop
        plan = self.validation_plan(trainer.world_size)
        self._validations += 1
        return Pass(plan, self._validations, 0, min(len(plan), int(min(loop.max_batches[0], len(plan))) * trainer.world_size))
