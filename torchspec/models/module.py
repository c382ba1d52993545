"""The LightningModule: builds the draft beside the frozen target head, trains it on packed batches, reports token-weighted metrics.

Order of events (docs/design.md): callbacks may set ``vocabulary`` in their ``setup``; ``configure_model`` builds and shards; the optimizer is made after
that. Everything that a
checkpoint needs beyond weights is in its ``torchspec`` entry as plain values, so that the exporter needs the checkpoint and the target and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from torchspec.batch import PackedBatch
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.models.choice import choose
from torchspec.models.families import options_of, plain, with_family
from torchspec.models.family import Architecture, Build, Init
from torchspec.models.metrics import StepOutput, StepSums, logs_now
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.loss_formulas import LossWeights
from torchspec.models.optim.clipping import clip
from torchspec.models.optim.muon import mark_hidden_matrices
from torchspec.models.optim.schedules import Schedule
from torchspec.models.training.averages import averages_in, check_averaging, put_averages, settle, swa_of
from torchspec.models.training.checkpoint import read_averages, read_entries, read_facts
from torchspec.models.training.finite import StepWatch, totals
from torchspec.models.training.numbers import check_saved, check_start, end_for, end_for_validation, no_number
from torchspec.models.training.parallelize import check_reduced, parallelize, sync_gradients
from torchspec.models.training.recipe import recipe
from torchspec.models.training.resume import check_resume, check_weights, describe
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.supervision import Supervision
from torchspec.target import Target, TargetConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class DraftModule(pl.LightningModule):
    """A draft of a frozen target.

    Example:
        >>> module = DraftModule(TargetConfig("path/to/target"), unroll_steps=4)  # doctest: +SKIP

    Args:
        target: the frozen model; linked from ``data.target`` on the command line.
        draft: JSON file with the draft's architecture; None derives it from the target (one layer of the target's own sizes).
        family: which kind of draft: a name of torchspec/models/families.py, or ``package.module:NAME`` of your own. None takes that of
            ``start_from`` or of the draft's file (``"family"``), else the first of that table.
        options: training options of the family, by name; docs/configuration.md lists them.
        aux_layers: hidden-state indices fed to the draft, in Transformers' counting; None takes those of ``start_from``, else the family's
            default.
        unroll_steps: K, steps trained in a row on the draft's own states; None means 7. Of families that unroll.
        step_weights: weight of each step's loss; None means 0.8^k. Of families that unroll.
        loss: weight of each loss in the sum, for example ``{forward_kl: 1.0, tv: 0.5}``; None means forward KL alone. Known ones: forward_kl, cross_entropy,
            reverse_kl, jsd, tv, lk_alpha, lk_lambda (models/ops/loss_formulas.py has the formulas).
        init: ``target`` starts from the target's head and final norm with fc passing the last aux state on;
            ``target_head`` from noise but for the target's head; ``random`` from noise, and so does any draft whose
            hidden size is not the target's: none of its tensors has the target's shape.
        train_head: false keeps the head as it starts: the target's rows, whatever ``init``, or those of ``start_from``.
            Fewer weights are trained, and a step leaves out a third of the head's products. The hidden size must be the
            target's. Exports carry the head all the same.
        start_from: start from these weights instead: a checkpoint of ours, or a published draft (directory, file or hub id). Architecture and vocabulary are
            its own; optimizer, schedule and data begin anew. ``--ckpt_path`` is what resumes a run.
        compute_dtype: type of matrix products; auto is bf16 where the device has instructions for it, else fp32. Masters, gradients' reduction and
            norms are fp32 in either case. On a GPU attention has a fast kernel for bf16 and heads of a multiple of 8, at most 256; others (and fp32) take a
            plain torch path that waits for the device at each call.
        recompute: make the MLP's inner activations again in the backward instead of keeping them; for very long sequences.
        matmul: ``fp8`` makes the forward products of MLP, head and ordinary attention and their input gradients 8-bit ones on a Hopper or later GPU; weight
            gradients, fc and the embedding's part stay as compute_dtype has them, and of the target's logits those of the draft vocabulary. ``fp8_all`` makes
            their weight gradients 8-bit products too. Both want hidden, intermediate and draft vocabulary size to be multiples of 16.
        optimizer: made from the trainable parameters.
        lr_scheduler: made from the optimizer, stepped every optimizer step.
    """

    def __init__(
        self,
        target: TargetConfig,
        draft: str | None = None,
        family: str | None = None,
        options: dict[str, Any] | None = None,
        aux_layers: list[int] | None = None,
        unroll_steps: int | None = None,
        step_weights: list[float] | None = None,
        loss: dict[str, float] | None = None,
        init: Literal["target", "target_head", "random"] = "target",
        train_head: bool = True,
        start_from: str | None = None,
        compute_dtype: Literal["auto", "bf16", "fp32"] = "auto",
        recompute: bool = False,
        matmul: Literal["bf16", "fp8", "fp8_all"] = "bf16",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.target = Target(target)
        self.choice = choose(self.target, family=family, draft=draft, start_from=start_from, aux_layers=aux_layers)
        self.family = self.choice.family
        self.options = options_of(self.family, options, unroll_steps=unroll_steps, step_weights=step_weights)
        self.aux_layers = self.choice.aux_layers
        self.loss = LossWeights.of(loss)
        self.init: Init = init
        self.train_head = train_head
        self.start = self.choice.start
        self.compute_dtype = compute_dtype
        self.recompute = recompute
        self.matmul = matmul
        self.optimizer_callable = optimizer
        self.lr_scheduler_callable = lr_scheduler
        self.vocabulary: VocabularyMapping | None = None if self.start is None else self.start.draft.vocabulary
        self.task: Any = None
        """:class:`~torchspec.models.family.Task`, once it is built."""
        self.last_accepted: Tensor | None = None
        """[R_0] leading right steps of each supervised row of the last batch that was trained, on the device."""
        self._sums: StepSums | None = None
        self._val_sums: dict[int, StepSums] = {}
        self._val_totals: list[tuple[tuple[int, ...], str, Tensor]] = []
        self.watch = StepWatch()
        self._alpha: Tensor | None = None
        self._saved_alpha: list[float] | None = None
        self.strict_loading = True

    # -- construction

    @property
    def draft_config(self) -> Architecture:
        """Architecture of the draft, with the vocabulary as it is now."""
        config = self.choice.config
        return config.with_draft_vocabulary(self.vocabulary.size if self.vocabulary is not None else config.vocab_size)

    @property
    def horizon(self) -> int:
        """K: draft tokens of one proposal that are trained."""
        return self.supervision("train").horizon

    def setup(self, stage: str) -> None:
        path = getattr(self.trainer, "resume_path", None)
        if path is not None:
            self._check_facts(read_facts(Path(path)))

    def _choose_vocabulary(self) -> None:
        """Callbacks that prune say so before the draft is built, whoever has it built and whatever their order."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            choose = getattr(callback, "choose_vocabulary", None)
            if choose is not None:
                choose(self.trainer, self)

    def configure_model(self) -> None:
        if self.task is not None:
            return
        self._choose_vocabulary()
        self.setup(self.trainer.state.fn or "fit")  # the checkpoint's draft is this one
        device = self.trainer.strategy.root_device
        dtype = _DTYPES.get(self.compute_dtype) or working_dtype(torch.bfloat16, device)
        config = self.draft_config
        if self.start is None:
            for line in self.family.notes(config, self.target):
                rank_zero_info(line)
        build = Build(
            target=self.target,
            vocabulary=self.vocabulary,
            loss=self.loss,
            compute_dtype=dtype,
            device=device,
            init=self.init,
            train_head=self.train_head,
            recompute=self.recompute,
            fp8=Fp8.of(self.matmul),
        )
        with torch.device(device):  # whatever the strategy: random weights come from the same generator
            self.task = self.family.task(config, self.options, build)
            if self.start is not None:
                self.start.load(self.task.draft, self.vocabulary)
                self.start = self.start.loaded()
        if self._saved_alpha is not None:
            self.task.mean_alpha.copy_(torch.tensor(self._saved_alpha))
        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        if mesh is not None:
            self.task.to(device)
        parallelize(self.task, mesh=mesh, compute_dtype=dtype)
        path = getattr(self.trainer, "resume_path", None)
        if path is not None:
            check_weights(Path(path), self.state_dict(), sharding=mesh is not None)

    def configure_optimizers(self) -> Any:
        mark_hidden_matrices(self)
        optimizer = self.optimizer_callable(p for p in self.parameters() if p.requires_grad)
        if isinstance(optimizer, LBFGS):
            problem = "evaluates a step many times over, of which a micro-batch is only a part"
            raise UserError("model.optimizer", "LBFGS", problem, "use another, such as torch.optim.AdamW")
        scheduler = None if self.lr_scheduler_callable is None else self.lr_scheduler_callable(optimizer)
        path = getattr(self.trainer, "resume_path", None)
        if path is not None:
            datamodule, averaged = getattr(self.trainer, "datamodule", None), swa_of(self.trainer) is not None
            check_resume(Path(path), datamodule=datamodule, optimizer=optimizer, schedule=scheduler, swa=averaged)
            check_averaging(Path(path), read_entries(Path(path)), self.trainer)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, Schedule) and scheduler.total_steps is None:
            scheduler.set_total_steps(self.planned_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None) -> None:
        """By norm inside the optimizer's own pass where it can (``clipping.py``), else as Lightning does."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and clip(optimizer, float(gradient_clip_val)) is not None:
            return
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def planned_steps(self) -> int:
        """Optimizer steps of the run, from the plan where there is one."""
        trainer = self.trainer
        steps = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if steps is not None and trainer.max_epochs is not None and trainer.max_epochs > 0:
            limits.append(steps * trainer.max_epochs)
        if limits:
            return min(limits)
        if steps is None:
            return int(trainer.estimated_stepping_batches)
        raise UserError(
            "trainer.max_steps",
            trainer.max_steps,
            "leaves the run without an end, so the schedule has no length",
            "set trainer.max_steps or trainer.max_epochs",
        )

    def supervision(self, stage: Literal["train", "validate"]) -> Supervision:
        """Where the draft learns. Validation goes as deep as a callback measures (``validation_horizon``) if that is more."""
        callbacks: list[Any] = [] if self._trainer is None else self._trainer.callbacks  # type: ignore[attr-defined]
        measured = max([0, *(getattr(callback, "validation_horizon", 0) for callback in callbacks)])
        return self.family.supervision(self.choice.config, self.options, stage=stage, horizon=measured)

    def refuse_proposals(self, k: int, *, field: str) -> None:
        """Raise UserError where the draft cannot propose ``k`` tokens at a time, as ``field`` asks."""
        most = self.family.supervision(self.choice.config, self.options, stage="validate", horizon=k).horizon
        if k > most:
            raise UserError(field, k, f"is more than the {most} draft tokens that this draft proposes", f"use {most} or less")

    # -- steps

    def forward(self, batch: PackedBatch, measure: bool = False) -> StepOutput:
        """Loss and metric sums of a pack of this rank; ``measure`` adds alpha and what was accepted."""
        assert self.task is not None
        output: StepOutput = self.task(batch, measure=measure)
        return output

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Scalar: this pack's share of the step's loss, scaled so that its mean over ranks and micro-batches has the gradient of the whole."""
        output = self.forward(batch)
        self.watch.add(output.loss, batch)
        self.last_accepted = output.accepted
        self._sums = StepSums.of(output, batch) if self._sums is None else self._sums.add(output, batch)
        if self.loss.lk_lambda:
            alpha = torch.stack([output.sums["alpha"], output.sums["rows"]])
            self._alpha = alpha if self._alpha is None else self._alpha + alpha
        # DDP and FSDP average gradients over ranks and Lightning divides the loss by the accumulation; counts already cover both.
        return output.loss * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        check_start(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        planned = getattr(getattr(self.trainer, "datamodule", None), "accumulation", None)
        if planned is not None and self.trainer.accumulate_grad_batches != planned:
            problem = f"was set by a callback while training, and data.packs_per_step means {planned}"
            fix = "take out the callback that sets it: data.packs_per_step alone is the size of a step"
            raise UserError("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, problem, fix)
        if self.device_mesh is not None and self.task is not None:
            last = batch_idx + 1 == self.trainer.num_training_batches  # Lightning steps there, in the middle of a step with fast_dev_run
            sync_gradients(self.task, last or (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.device_mesh is not None:
            check_reduced(optimizer)
        assert self.task is not None
        self.watch.end(self.trainer.global_step + 1, self.task.watched.grad)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if stepped and (found := self.watch.look(self.trainer.global_step)) is not None:
            end_for(self, found)
        if stepped and self._alpha is not None and self.task is not None:
            alpha, rows = self.trainer.strategy.reduce(self._alpha, reduce_op="sum")
            self.task.mean_alpha.copy_(alpha / rows.clamp(min=1.0))
            self._alpha = None
        if not stepped or self._sums is None or not logs_now(self.trainer):
            return
        values = self._train_metrics(self._sums)
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        self.log("loss", values["loss"], prog_bar=True, logger=False)
        self.log("acceptance", values["expected_acceptance_greedy"], prog_bar=True, logger=False)

    def _train_metrics(self, sums: StepSums) -> dict[str, float]:
        """Of the steps since the last time, over all ranks. Raises UserError for a loss that is no number."""
        values = sums.reduce(self.trainer.strategy).metrics(self.horizon)
        self._sums = None
        if not math.isfinite(values["loss"]):  # the same on every rank
            raise no_number(self, "train/loss", values["loss"], self.trainer.global_step)
        return values

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``accepted`` and ``followed`` [rows]: leading right steps of each supervised row, in order (``StepOutput``)."""
        with torch.no_grad():
            output = self.forward(batch, measure=True)
        self._val_totals.append((batch.sample_ids, batch.stage, totals(batch)))
        sums = self._val_sums.get(dataloader_idx)
        self._val_sums[dataloader_idx] = StepSums.of(output, batch) if sums is None else sums.add(output, batch)
        return {"accepted": output.accepted, "followed": output.followed}

    def on_validation_epoch_end(self) -> None:
        """``val/...`` over all validation data, and ``val/NAME/...`` of each set that has a name."""
        found, self._val_sums = self._val_sums, {}
        states, self._val_totals = self._val_totals, []
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", [])
        whole = StepSums.zeros(self.horizon, self.device)
        for number in range(max(len(names), 1)):  # every rank the same, whatever it saw
            sums = found.get(number, StepSums.zeros(self.horizon, self.device)).reduce(self.trainer.strategy)
            whole = whole.plus(sums)
            if names:
                self._log_validation(f"val/{names[number]}", sums)
        loss = whole.metrics(self.horizon)["loss"]
        if not math.isfinite(loss):  # the same on every rank
            end_for_validation(self, loss, states)
        self._log_validation("val", whole)

    def _log_validation(self, prefix: str, sums: StepSums) -> None:
        self.log_dict({f"{prefix}/{name}": value for name, value in sums.metrics(self.horizon).items()}, rank_zero_only=False)

    # -- checkpoints

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the draft beside its weights; plain values and tensors."""
        return {
            "format": 1,
            "draft_config": self.draft_config.to_dict(),
            "target": self.target.describe(),
            "family": self.choice.name,
            "options": plain(self.options),
            "draft_ids": None if self.vocabulary is None else self.vocabulary.draft_ids.clone(),
            "train_head": self.train_head,
            "recipe": recipe(
                loss=self.loss,
                init=self.init,
                start_from=None if self.start is None else self.start.source,
                train_head=self.train_head,
                trainer=self._trainer,
            ),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["torchspec"] = self.facts()
        if "optimizer_states" in checkpoint:
            checkpoint["torchspec"]["resume"] = describe(self.trainer, checkpoint)
        if self.loss.lk_lambda and self.task is not None:
            checkpoint["torchspec"]["mean_alpha"] = self.task.mean_alpha.tolist()
        settle(self.trainer, checkpoint)
        check_saved(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        facts = checkpoint.get("torchspec")
        facts = None if facts is None else with_family(facts)
        self._check_facts(facts)
        if self.trainer.state.fn != TrainerFn.FITTING:  # what is served
            if self.device_mesh is None:
                checkpoint["state_dict"] = {**checkpoint.get("state_dict", {}), **averages_in(checkpoint)}
            elif (facts or {}).get("averages"):
                put_averages(self, read_averages(Path(self.trainer.resume_path)))  # type: ignore[attr-defined]
        self._saved_alpha = (facts or {}).get("mean_alpha")
        if self._saved_alpha is not None and self.task is not None:
            self.task.mean_alpha.copy_(torch.tensor(self._saved_alpha))

    def _check_facts(self, facts: dict[str, Any] | None) -> None:
        """Refuse a checkpoint of another draft, target or vocabulary, by the name of what differs."""
        if facts is None:
            raise UserError(
                "ckpt_path", getattr(self.trainer, "resume_path", None), "holds no torchspec entry: it is no checkpoint of a draft", "give one that fit wrote"
            )
        ours = self.facts()
        _same("target fingerprint", facts["target"]["fingerprint"], ours["target"]["fingerprint"])
        _same("family", facts["family"], ours["family"])
        for name in self.family.fixed_options:
            _same(name, facts["options"].get(name), ours["options"][name])
        _same("model.train_head", facts.get("train_head", True), self.train_head)  # older ones trained it
        for name, value in ours["draft_config"].items():
            _same(f"draft_config.{name}", facts["draft_config"].get(name), value)
        _same("draft vocabulary", _as_list(facts["draft_ids"]), _as_list(ours["draft_ids"]))


def _as_list(ids: Tensor | None) -> list[int] | None:
    return None if ids is None else ids.tolist()


def _same(name: str, saved: Any, now: Any) -> None:
    if isinstance(saved, Sequence) and not isinstance(saved, str) and isinstance(now, Sequence):
        saved, now = list(saved), list(now)
    if saved != now:
        raise UserError(
            f"ckpt_path ({name})",
            _short(saved),
            f"differs from this run's {_short(now)}",
            "resume with the configuration of the checkpoint, or start a new run without --ckpt_path",
        )


def _short(value: Any) -> Any:
    return f"list of {len(value)}" if isinstance(value, list) and len(value) > 16 else value
