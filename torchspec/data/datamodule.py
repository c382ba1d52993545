"""The data side of a run: tokenised conversations, the plan, the engine group, and the loaders; everything that
Lightning asks a datamodule for.

Order of events (docs/design.md): ``prepare_data`` tokenises on each host and, on global rank 0 and in its main thread,
starts the engine group; ``setup`` makes the plan and takes the group's address from rank 0; the loaders stream;
``teardown`` or ``on_exception`` closes it all.

*Resume.* The position is the number of optimizer steps done, which the trainer restores; the checkpoint only carries
what must still be the same (``state_dict``). Every loader counts a whole epoch as its length, and Lightning's own batch
counter is set to what the position means for this world size (``progress.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.batch import PackedBatch
from torchspec.data.checks import check_engine, check_media, check_sizes, validation_sets
from torchspec.data.corpus import Corpus, default_cache_dir
from torchspec.data.failures import cut_failures
from torchspec.data.loader import LoaderStats, PackLoader
from torchspec.data.prepare import DataOptions
from torchspec.data.progress import batches_in_epoch, check_cursor, check_limit, check_trainer, cursor, drop_schedules, set_progress
from torchspec.data.sources import check_outside
from torchspec.data.stage_loaders import StageLoaders
from torchspec.engines.engine import EngineConfig, OnPolicy
from torchspec.errors import DeviceLost, UserError
from torchspec.network import host_port
from torchspec.supervision import Learner
from torchspec.target import Target, TargetConfig
from torchspec.transfer.record import RecordSpec
from torchspec.transfer.sizes import parse_bytes
from torchspec.transfer.store import StoreConfig

if TYPE_CHECKING:
    from torchspec.engines.client import Endpoint, TrainerClient
    from torchspec.engines.group import EngineGroup

_ENGINES = EngineConfig()
_STORE = StoreConfig()


class DraftDataModule(pl.LightningDataModule):
    """Streams a target's hidden states over conversations.

    Args:
        target: the frozen model.
        train: conversation file (.jsonl, .json, .parquet, .arrow), a folder of them, or a hub dataset id
            (``org/name:split``); or several; or a table of them with how many times an epoch each is trained (0.5: a
            fixed half of it).
        validate: the same for validation; or a table of names with a set each, whose metrics are logged as
            ``val/NAME/...``; none skips it.
        max_length: tokens of a conversation at most; longer ones are cut on the right.
        max_tokens: tokens of a pack (one micro-batch of one rank) at most.
        max_rows: draft rows of a training pack at most, where a draft computes more than its tokens (a block draft: its
            blocks times their slots). A conversation of more is a pack of its own. None means 16384. Refused for a
            draft whose work follows from its tokens, as that of an unroll does. Validation has no such bound.
        packs_per_step: packs of an optimizer step over all ranks; accumulation is this divided by the number of ranks.
        seed: of the order of the data.
        on_policy: the target answers the training prompts anew in the run, instead of the answers in the data. Engines
            vllm and vllm_remote, or any but replay where its ``answer_workers`` is at least 1. Its own options:
            ``--data.on_policy.help``.
        engine: what runs the target: ``transformers``, ``vllm``, ``sglang``, ``vllm_remote``, ``sglang_remote`` (a server that
            somebody else runs), ``replay``, which runs none and trains from records on disk, or one of your own,
            ``package.module:NAME`` (docs/engines.md).
        records: folder of records that ``main.py extract`` or ``tee`` wrote, for engine replay.
        tee: folder to which the records of this run are also written, for replays.
        engines: how its workers run.
        store: where hidden states wait.
        cache_dir: folder of tokenised data; none means ``~/.cache/torchspec`` (``XDG_CACHE_HOME`` is honoured).
        messages_key: column of the messages; none takes ``conversations`` or ``messages``.
        supervise: auto trains every answer that the chat template shows as the target generated it (a reasoning model's
            template drops the thinking of earlier turns: those are left out); last trains the last one alone; all also
            trains the words of answers that the template rewrites.
        media: refuse counts a row with images, video or audio as bad; placeholder keeps the template's placeholder
            tokens (the engine is given none of the media: the states are those of the text alone); engine gives images
            to the engine, and refuses video and audio.
        image_positions: RoPE positions of a draft whose target has multi-axis RoPE, after an image: index counts every
            token, as vLLM's model runner 2 does; temporal is the target's first axis, as its model runner 1 does.
        template_args: variables for the chat template, as ``chat_template_kwargs`` of a server. Whether an answer
            thinks is told to it in any case.
        min_supervised_tokens: conversations with fewer answer tokens within max_length are dropped, and counted.
        max_bad_fraction: share of unusable rows that is tolerated; they are listed beside the cache either way.
        num_proc: processes that tokenise; none takes the cores there are for large inputs.
        prefetch_packs: finished batches that wait in memory for a rank's trainer.
    """

    def __init__(
        self,
        target: TargetConfig,
        train: str | list[str] | dict[str, float],
        validate: str | list[str] | dict[str, str | list[str]] | None = None,
        max_length: int = 2048,
        max_tokens: int = 4096,
        max_rows: int | None = None,
        packs_per_step: int = 8,
        seed: int = 0,
        on_policy: OnPolicy | None = None,
        engine: str = "transformers",
        records: str | None = None,
        tee: str | None = None,
        engines: EngineConfig = _ENGINES,
        store: StoreConfig = _STORE,
        cache_dir: str | None = None,
        messages_key: str | None = None,
        supervise: Literal["auto", "all", "last"] = "auto",
        media: Literal["refuse", "placeholder", "engine"] = "refuse",
        image_positions: Literal["index", "temporal"] = "index",
        template_args: dict[str, Any] | None = None,
        min_supervised_tokens: int = 2,
        max_bad_fraction: float = 0.0,
        num_proc: int | None = None,
        prefetch_packs: int = 4,
    ) -> None:
        super().__init__()
        check_sizes(
            max_length=max_length,
            max_tokens=max_tokens,
            max_rows=max_rows,
            packs_per_step=packs_per_step,
            prefetch_packs=prefetch_packs,
            min_supervised_tokens=min_supervised_tokens,
            num_proc=num_proc,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )
        check_engine(engine=engine, engines=engines, on_policy=on_policy, records=records, tee=tee)
        check_media(media=media, image_positions=image_positions, engine=engine, on_policy=on_policy)
        named = validation_sets(validate)
        self.target = Target(target)
        self.aux_layers: tuple[int, ...] | None = None
        """Hidden-state indices that records hold beside the last one; asked of the module that is fed."""
        self.max_length, self.packs_per_step, self.seed, self.prefetch_packs = max_length, packs_per_step, seed, prefetch_packs
        self.engine: str = engine
        self.engines, self.store = engines, store
        self.budget = parse_bytes(store.budget, field="data.store.budget")
        self.records, self.tee = (None if folder is None else Path(folder).expanduser() for folder in (records, tee))
        self.validation_stages = [name for name, given in named.items() if given is not None]
        self.corpus = Corpus(
            self.target,
            sources={"train": train, **named},
            options=DataOptions(
                max_length=max_length,
                min_supervised_tokens=min_supervised_tokens,
                messages_key=messages_key,
                supervise=supervise,
                media=media,
                image_positions=image_positions,
                template_args=template_args or {},
            ),
            max_tokens=max_tokens,
            packs_per_step=packs_per_step,
            seed=seed,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
            max_rows=max_rows,
            max_bad_fraction=max_bad_fraction,
            num_proc=num_proc,
            on_policy=on_policy,
            say=rank_zero_info,
        )
        self.group: EngineGroup | None = None
        self.endpoint: Endpoint | None = None
        self._loaders = StageLoaders(self, health=self._check_group)
        self._restored: dict[str, Any] | None = None
        self._refusal: Exception | None = None

    # -- what callbacks and the module read

    @property
    def fingerprint(self) -> dict[str, str]:
        """Content hashes of the data, for provenance."""
        return {stage: data.content for stage, data in self.corpus.loaded.items()}

    @property
    def described(self) -> dict[str, Any]:
        """The training data for a checkpoint's facts, as plain values."""
        return self.corpus.described

    def token_counts(self) -> torch.Tensor:
        """[V] int64, supervised occurrences of each token in the training set."""
        return self.corpus.token_counts()

    def special_end_ids(self) -> list[int]:
        """Ids that end what the target generates."""
        return self.corpus.special_end_ids()

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders; empty for a single one without a name."""
        return [stage.partition("/")[2] for stage in self.validation_stages if "/" in stage]

    @property
    def spec(self) -> RecordSpec:
        """What every record of this run must say of itself."""
        assert self.aux_layers is not None, "no module has said yet which hidden states it is fed"
        return self.corpus.spec(self.aux_layers)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.packs_per_step // self._trainer.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch of the trainer."""
        return -(-self.batches_limited // self._trainer.accumulate_grad_batches)

    def loader_stats(self, stage: str) -> LoaderStats:
        """Counters of this rank's loader of a stage."""
        return self._loaders.stats(stage)

    def connect(self, name: str, role: str = "trainer") -> TrainerClient:
        """A connection of this process to the coordinator, as ``trainer`` or ``observer``; the caller closes it."""
        from torchspec.engines.client import TrainerClient

        if self.records is not None:
            from torchspec.engines.replay import ReplayClient

            return cast("TrainerClient", ReplayClient(self.records, self.spec))  # it has the same methods
        assert self.endpoint is not None, "the engine group is not running"
        return TrainerClient(self.endpoint, name, role=role)

    # -- start

    def prepare_data(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            if self._trainer.world_size == 1:
                raise
            self._refusal = error  # the other ranks wait: setup, which all of them run, ends the run for all

    def _prepare(self) -> None:
        trainer = self._trainer
        check_trainer(trainer, packs_per_step=self.packs_per_step)
        self._ask(trainer.lightning_module)
        training = trainer.state.fn == TrainerFn.FITTING
        if self.tee is not None:
            for given in self.corpus.sources.values():
                check_outside(self.tee, given or [], field="data.tee")
        if training:
            self.corpus.samples("train")
            self.corpus.check_rows()
            policy = self.corpus.on_policy
            served = any(getattr(callback, "serves_draft", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            if policy is not None and policy.answer_workers and not served:
                fix = "add torchspec.callbacks.on_policy.ServeDraft to trainer.callbacks"
                raise UserError("data.on_policy.answer_workers", policy.answer_workers, "wait for a draft that nobody hands them", fix)
        for stage in self.validation_stages:
            self.corpus.dataset(stage)
            if training:
                self.corpus.warn_of_overlap(stage)
        stages = ["train"] * training + self.validation_stages
        if self.records is not None:
            self._check_records(self.records, stages)
        elif trainer.is_global_zero:
            self._start_group(stages)

    def _ask(self, module: object) -> None:
        """Take from the module that is fed which hidden states it wants and by which rules it learns.

        Raises:
            UserError: it does not say.
        """
        if not isinstance(module, Learner):
            problem = f"is a {type(module).__name__}, which does not say where it learns"
            fix = "use DraftModule, or give it aux_layers and supervision(stage) (torchspec/supervision.py, Learner)"
            raise UserError("model", None, problem, fix)
        self.aux_layers = module.aux_layers
        self.corpus.supervise(train=module.supervision("train"), validate=module.supervision("validate"))

    def _check_records(self, folder: Path, stages: list[str]) -> None:
        from torchspec.engines.replay import check_records

        keys = np.concatenate([self.corpus.dataset(stage).hashes for stage in stages])
        rank_zero_info(f"replay of {check_records(folder, self.spec, keys):,} records in {folder}")

    def _start_group(self, stages: list[str]) -> None:
        """Start coordinator, store and workers; they load while the trainer builds the model."""
        from torchspec.data.group_start import group_of
        from torchspec.engines.group import EngineGroup

        self.group = EngineGroup(group_of(self, stages), say=rank_zero_info)
        self.endpoint = self.group.start()
        if self.engines.workers == 0:
            address = host_port(self.endpoint.host, self.endpoint.port)
            fix = f"start some: main.py worker --coordinator {address}"
            rank_zero_info(f"no workers of our own (data.engines.workers: 0); {fix}")

    def setup(self, stage: str) -> None:
        trainer = self._trainer
        if not trainer.strategy.reduce_boolean_decision(self._refusal is None, all=True):
            if self._refusal is not None:
                raise self._refusal
            raise SystemExit(2)  # the rank that knows why says it
        self._loaders.forget()
        self._ask(trainer.lightning_module)
        if stage == "fit":
            drop_schedules(trainer)
            trainer.accumulate_grad_batches = self.accumulation
            check_limit(trainer, batches_per_epoch=self.batches_per_epoch)
            if (line := self.corpus.about_work) is not None:
                rank_zero_info(line)
        for validation in self.validation_stages:
            self.corpus.validation_plan(validation, trainer.world_size)
        self.endpoint = trainer.strategy.broadcast(self.endpoint)
        if trainer.strategy.root_device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            from torchspec.data.group_start import cpu_ranks
            from torchspec.engines.group import cpu_share

            torch.set_num_threads(cpu_share((0 if self.records else self.engines.workers) + cpu_ranks(trainer)))

    # -- loaders

    def train_dataloader(self) -> PackLoader:
        trainer = self._trainer
        if self._restored is not None:
            set_progress(
                trainer,
                batches_per_epoch=self.batches_per_epoch,
                packs_per_step=self.packs_per_step,
                saved_world=int(self._restored["world_size"]),
            )
            self._restored = None
        if trainer.is_global_zero:
            epoch, step = divmod(trainer.global_step, self.corpus.any_plan.steps)
            cut_failures(self._loaders.failed_path, epoch=epoch, pack=step * self.packs_per_step)
        return self._loaders.train()

    def val_dataloader(self) -> list[PackLoader]:
        return [self._loaders.validate(number, stage) for number, stage in enumerate(self.validation_stages)]

    def _check_group(self) -> None:
        """Raise when the group is gone."""
        if self.group is not None:
            self.group.check()

    def transfer_batch_to_device(self, batch: PackedBatch, device: torch.device, dataloader_idx: int) -> PackedBatch:
        return batch if device.type == "cpu" else batch.to(device)

    # -- end

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        self.close(loaders=not isinstance(exception, DeviceLost))  # theirs is memory of the device

    def close(self, *, loaders: bool = True) -> None:
        """End loaders and engines. Idempotent."""
        self._loaders.close(loaders=loaders)
        if self.group is not None:
            self.group.close()
            self.group = None
        self.endpoint = None

    # -- position

    def state_dict(self) -> dict[str, Any]:
        """The cursor; the same on every rank."""
        if "train" not in self.corpus.loaded:
            return {}
        trainer = self._trainer
        return cursor(self.corpus.any_plan, steps=trainer.global_step, seed=self.seed, world=trainer.world_size)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._trainer.state.fn == TrainerFn.FITTING:
            check_cursor(state_dict, self.state_dict())
            self._restored = dict(state_dict)

    # -- arithmetic

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None, "the datamodule is used by a trainer"
        return self.trainer

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of a rank in an epoch of the plan."""
        return len(self.corpus.any_plan) // self._trainer.world_size

    @property
    def batches_limited(self) -> int:
        """Micro-batches of a rank in an epoch of the trainer."""
        return batches_in_epoch(self.batches_per_epoch, self._trainer.limit_train_batches)
