"""Acceptance length in validation: the serving walk, and real vLLM when asked.

The walk follows each validation answer as a server would: start at its first token, count how many drafts in a row are
right, jump over them and the bonus token, repeat. Two of them: *greedy* counts a draft as right that the target finds
likeliest. On answers that the target gave greedily (``regenerate`` with temperature 0) it is what vLLM reports at
temperature 0. *sampled* counts a draft as right that is the token which stands there. On answers sampled at the
temperature of serving that happens with the probability the target gives it, as a server accepts greedy drafts.

Answers that repeat themselves flatter every draft: their share stands beside each figure, and from a tenth on also what
the walk is without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.walks import SHOWN_FROM, Parting, Walk, Walks, looping_share, walks_of
from torchspec.errors import UserError
from torchspec.files import dumps, lines_with, spare_name
from torchspec.models.metrics import logs_now
from torchspec.paths import home
from torchspec.run_record import or_without

if TYPE_CHECKING:
    from torchspec.data.datamodule import DraftDataModule

_WALKS = lines_with("step", "acceptance_length", "rates")


Rule = Literal["greedy", "sampled"]


class AcceptanceLength(pl.Callback):
    """Log ``val/acceptance_length`` (and ``val/NAME/acceptance_length`` of named sets) and the rate of each draft
    position, and append them to ``acceptance.jsonl`` in the run's folder; beside them ``train/acceptance_length``, the
    walk over batches that were just trained, and a warning when the two part.

    With ``trainer.num_sanity_val_steps: -1`` the untrained draft is measured first (step 0).

    Args:
        num_speculative_tokens: drafts proposed at a time, k, or several: ``[3, 7]`` logs ``val/acceptance_length_k3``
            and ``_k7``, and the last one's also without its k. Of a family that unrolls, more than the steps that are
            trained is allowed: validation unrolls as far.
        walk: ``greedy``, for answers that the target gave greedily, or ``sampled``, for answers sampled at the
            temperature of serving; or a table of named validation sets with the walk of each, the others being greedy.
            ``val/acceptance_length`` is over the greedy ones, or over all where none is.
        serve_prompts: conversation file to serve in real vLLM with the exported draft after training; None skips it.
        serve_limit: prompts of that file to serve.
        serve_max_new_tokens: length limit of an answer.
        serve_engine_args: further engine arguments of that vLLM.
    """

    def __init__(
        self,
        num_speculative_tokens: int | list[int] = 3,
        walk: Rule | dict[str, Rule] = "greedy",
        serve_prompts: str | None = None,
        serve_limit: int = 100,
        serve_max_new_tokens: int = 256,
        serve_engine_args: dict[str, Any] | None = None,
    ) -> None:
        several = isinstance(num_speculative_tokens, list)
        given = num_speculative_tokens if isinstance(num_speculative_tokens, list) else [num_speculative_tokens]
        if not given or any(k < 1 for k in given):
            raise UserError(
                "callbacks.AcceptanceLength.num_speculative_tokens", num_speculative_tokens, "is below 1", "use 1 or more, or a list such as [3, 7]"
            )
        self.ks: tuple[int, ...] = tuple(sorted(set(given)))
        self.names = {k: f"_k{k}" if several else "" for k in self.ks}
        """What each k adds to the names of metrics."""
        self.walk = walk
        self.serve_prompts = serve_prompts
        self.serve_limit = serve_limit
        self.serve_max_new_tokens = serve_max_new_tokens
        self.serve_engine_args = serve_engine_args
        self._walked = self.ks
        self._compared = self.ks[0]
        self._sets: dict[int, Walks] = {}
        self._trained: Walks | None = None
        self._parting = Parting()
        self._fresh = False
        """Whether rows of an earlier run in the folder are to go."""

    @property
    def validation_horizon(self) -> int:
        """Draft tokens that validation is unrolled to, where fewer are trained (``DraftModule.supervision``)."""
        return self.ks[-1]

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._fresh = trainer.state.fn == TrainerFn.FITTING and getattr(trainer, "resume_path", None) is None
        trained = int(pl_module.horizon)
        pl_module.refuse_proposals(self.ks[-1], field="callbacks.AcceptanceLength.num_speculative_tokens")
        self._compared = min(self.ks[0], trained)  # a batch that trains is unrolled no further
        self._walked = tuple(sorted({*self.ks, self._compared}))
        self._sets, self._trained = {}, Walks((self._compared,), looping=False)
        if self.ks[-1] > trained:
            rank_zero_warn(
                f"callbacks.AcceptanceLength.num_speculative_tokens: {self.ks[-1]} tokens are proposed of a draft that is trained for {trained}: "
                "later ones are accepted less than a draft trained for them would have it"
            )
        named = self._set_names(trainer)
        unknown = sorted(set(self.walk) - set(named)) if isinstance(self.walk, dict) else []
        if unknown:
            raise UserError("callbacks.AcceptanceLength.walk", unknown, "are no validation sets", f"data.validate has {', '.join(named) or 'no named ones'}")
        if self.serve_prompts is not None and not Path(home(self.serve_prompts)).is_file():
            raise UserError("callbacks.AcceptanceLength.serve_prompts", self.serve_prompts, "does not exist", "give a conversation file")
        if self.serve_prompts is not None and self._exporter(trainer) is None:
            fix = "put ExportDraft before AcceptanceLength in trainer.callbacks"
            raise UserError("callbacks.AcceptanceLength.serve_prompts", self.serve_prompts, "needs the draft exported first", fix)

    @staticmethod
    def _set_names(trainer: pl.Trainer) -> list[str]:
        return list(getattr(getattr(trainer, "datamodule", None), "validation_names", []))

    def _rule(self, trainer: pl.Trainer, number: int) -> Rule:
        """Which walk a validation set has."""
        if not isinstance(self.walk, dict):
            return self.walk
        return self.walk.get(self._set_names(trainer)[number], "greedy")

    # -- training

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where the module logs, and so waits for the device anyway."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and self._trained is not None and logs_now(trainer):
            self._trained.add(pl_module.last_accepted, batch)

    def _training(self, trainer: pl.Trainer, pl_module: Any, whole: torch.Tensor) -> float | None:
        """Log the walk over what was trained since the last validation, and compare. Every rank calls it."""
        assert self._trained is not None
        table = trainer.strategy.reduce(self._trained.table.to(pl_module.device), reduce_op="sum")
        self._trained.clear()
        ours = walks_of(table, (self._compared,))[self._compared]  # type: ignore[arg-type]
        if not ours.drafts:
            return None
        pl_module.log("train/acceptance_length", ours.length)
        theirs = walks_of(whole, self._walked)[self._compared]
        warning = self._parting.look(train=ours, validate=theirs, epoch=trainer.current_epoch, step=trainer.global_step)
        if warning is not None:
            rank_zero_warn(warning)
        return ours.length

    def state_dict(self) -> dict[str, Any]:
        return self._parting.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._parting.load_state_dict(state_dict)

    # -- validation

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for walks in self._sets.values():
            walks.clear()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        right = outputs["followed"] if self._rule(trainer, dataloader_idx) == "sampled" else outputs["accepted"]
        self._sets.setdefault(dataloader_idx, Walks(self._walked)).add(right, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = self._set_names(trainer)
        tables: list[torch.Tensor] = []
        for number in range(max(len(names), 1)):
            table = self._sets.get(number, Walks(self._walked)).table.to(pl_module.device)
            tables.append(trainer.strategy.reduce(table, reduce_op="sum"))  # type: ignore[arg-type]
        greedy = [table for number, table in enumerate(tables) if self._rule(trainer, number) == "greedy"] if names else []
        whole = torch.stack(greedy or tables).sum(0)
        sets: dict[str, Any] = {}
        for name, table in zip(names, tables, strict=False):
            found = self._log(pl_module, f"val/{name}", table)
            sets[name] = {f"k{k}": walk.length for k, walk in found.items()} if self._several else found[self.ks[-1]].length
        found = self._log(pl_module, "val", whole, prog_bar=True)
        fitting = trainer.state.fn == TrainerFn.FITTING
        train = self._training(trainer, pl_module, whole) if fitting and not trainer.sanity_checking else None
        if trainer.is_global_zero:
            self._last = self._row(trainer.global_step, found, whole)
            self._last |= {"train": train} if train is not None else {}
            self._last |= {"sets": sets} if sets else {}

    @property
    def _several(self) -> bool:
        return self.names[self.ks[-1]] != ""

    def _log(self, pl_module: Any, prefix: str, table: torch.Tensor, prog_bar: bool = False) -> dict[int, Walk]:
        """Log lengths and rates of one set, or of all; returns them."""
        every, steady = walks_of(table, self._walked), walks_of(table, self._walked, looping=False)
        share = looping_share(table)
        for k in self.ks:
            name, rate = f"{prefix}/acceptance_length{self.names[k]}", f"{prefix}/acceptance_rate{self.names[k]}"
            pl_module.log(name, every[k].length, prog_bar=prog_bar and not self._several)
            pl_module.log_dict({f"{rate}_{i}": value for i, value in enumerate(every[k].rates)})
            if share > SHOWN_FROM:
                pl_module.log(f"{name}_without_loops", steady[k].length)
        if self._several:
            pl_module.log(f"{prefix}/acceptance_length", every[self.ks[-1]].length, prog_bar=prog_bar)
        pl_module.log(f"{prefix}/looping_share", share)
        return {k: every[k] for k in self.ks}

    def _row(self, step: int, found: dict[int, Walk], table: torch.Tensor) -> dict[str, Any]:
        """The line of ``acceptance.jsonl``, told as well."""
        last, share = found[self.ks[-1]], looping_share(table)
        row = {"step": step, "acceptance_length": last.length, "rates": list(last.rates), "drafts": last.drafts, "loss": None, "looping_share": share}
        if self._several:
            row["each_k"] = {f"k{k}": {"acceptance_length": walk.length, "rates": list(walk.rates), "drafts": walk.drafts} for k, walk in found.items()}
        said = ", ".join(f"{walk.length:.3f} (serving walk, k={k}, {walk.drafts} drafts)" for k, walk in found.items())
        if share > SHOWN_FROM:
            steady = walks_of(table, self._walked, looping=False)
            row["without_loops"] = {f"k{k}": steady[k].length for k in self.ks}
            without = ", ".join(f"{steady[k].length:.3f} (k={k}, {steady[k].drafts} drafts)" for k in self.ks)
            said += f"; {share:.0%} of the answers' text repeats itself, without the conversations that loop {without}"
        rank_zero_info(f"step {step}: acceptance length {said}")
        return row

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fill in the loss, which the module logs after this callback's own hook."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.is_global_zero and loss is not None:
            self._last["loss"] = float(loss)
            self._flush(trainer)

    def _flush(self, trainer: pl.Trainer) -> None:
        path = spare_name(Path(trainer.default_root_dir) / "acceptance.jsonl", _WALKS)
        with or_without(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w" if self._fresh else "a") as handle:
                handle.write(dumps(self._last) + "\n")
        self._fresh = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.serve_prompts is None or not trainer.is_global_zero:
            return
        from torchspec.acceptance import REPORT, acceptance

        exporter = self._exporter(trainer)
        assert exporter is not None
        data: DraftDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.close()  # the engines' memory is needed now
        target, options = data.target.config, data.corpus.options
        for k in self.ks:
            report = acceptance(
                target.path,
                str(exporter.folder(trainer)),
                prompts=home(self.serve_prompts),
                num_speculative_tokens=k,
                limit=self.serve_limit,
                max_new_tokens=self.serve_max_new_tokens,
                engine_args=self.serve_engine_args,
                revision=target.revision,
                dtype=target.dtype,
                trust_remote_code=target.trust_remote_code,
                messages_key=options.messages_key,
                template_args=dict(options.template_args) if options.template_args is not None else None,
                family=pl_module.choice.name,
                output=str(spare_name(Path(trainer.default_root_dir) / f"vllm_acceptance{self.names[k]}.json", REPORT)),
            )
            for logger in trainer.loggers:
                logger.log_metrics({f"vllm/acceptance_length{self.names[k]}": report["acceptance_length"]}, step=trainer.global_step)

    def _exporter(self, trainer: pl.Trainer) -> ExportDraft | None:
        """The callback that exports, if it comes before this one."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks[: callbacks.index(self)] if isinstance(callback, ExportDraft)), None)
