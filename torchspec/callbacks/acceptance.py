"""Acceptance length in validation: the serving walk, and real vLLM when asked.

The walk follows each validation answer as a server would: start at its first token, count how many drafts in a row are right, jump over them and the bonus
token, repeat.
Run it on answers that the target gave greedily (``regenerate`` with temperature 0), and it is what vLLM reports at temperature 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from torchspec.callbacks.export import ExportDraft
from torchspec.errors import UserError
from torchspec.files import dumps, lines_with, spare_name
from torchspec.models.metrics import serving_walk
from torchspec.paths import home
from torchspec.run_record import or_without

if TYPE_CHECKING:
    from torchspec.data.datamodule import DraftDataModule

_WALKS = lines_with("step", "acceptance_length", "rates")


class AcceptanceLength(pl.Callback):
    """Log ``val/acceptance_length`` (and ``val/NAME/acceptance_length`` of named sets) and the rate of each draft
    position, and append them to ``acceptance.jsonl`` in the run's folder.

    With ``trainer.num_sanity_val_steps: -1`` the untrained draft is measured first (step 0).

    Args:
        num_speculative_tokens: drafts proposed at a time, k; at most the unroll steps.
        serve_prompts: conversation file to serve in real vLLM with the exported draft after training; None skips it.
        serve_limit: prompts of that file to serve.
        serve_max_new_tokens: length limit of an answer.
        serve_engine_args: further engine arguments of that vLLM.
    """

    def __init__(
        self,
        num_speculative_tokens: int = 3,
        serve_prompts: str | None = None,
        serve_limit: int = 100,
        serve_max_new_tokens: int = 256,
        serve_engine_args: dict[str, Any] | None = None,
    ) -> None:
        self.k = num_speculative_tokens
        self.serve_prompts = serve_prompts
        self.serve_limit = serve_limit
        self.serve_max_new_tokens = serve_max_new_tokens
        self.serve_engine_args = serve_engine_args
        self._tables: dict[int, torch.Tensor] = {}
        self._fresh = False
        """Whether rows of an earlier run in the folder are to go."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._fresh = trainer.state.fn == TrainerFn.FITTING and getattr(trainer, "resume_path", None) is None
        if not 1 <= self.k <= pl_module.unroll_steps:
            raise UserError(
                "callbacks.AcceptanceLength.num_speculative_tokens", self.k, f"is not in 1..{pl_module.unroll_steps}", "use at most model.unroll_steps"
            )
        if self.serve_prompts is not None and not Path(home(self.serve_prompts)).is_file():
            raise UserError("callbacks.AcceptanceLength.serve_prompts", self.serve_prompts, "does not exist", "give a conversation file")
        if self.serve_prompts is not None and self._exporter(trainer) is None:
            fix = "put ExportDraft before AcceptanceLength in trainer.callbacks"
            raise UserError("callbacks.AcceptanceLength.serve_prompts", self.serve_prompts, "needs the draft exported first", fix)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._tables = {}

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        turns = batch.turn[batch.rows.base + 1]
        stops, accepted, positions = serving_walk(outputs["accepted"].tolist(), turns.tolist(), self.k)
        row = torch.tensor([stops, accepted, *positions], dtype=torch.float64)
        self._tables[dataloader_idx] = row + self._tables.get(dataloader_idx, torch.zeros_like(row))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = getattr(getattr(trainer, "datamodule", None), "validation_names", [])
        whole = torch.zeros(2 + self.k, dtype=torch.float64, device=pl_module.device)
        lengths: dict[str, float] = {}
        for number in range(max(len(names), 1)):
            table = self._tables.get(number, torch.zeros(2 + self.k, dtype=torch.float64)).to(pl_module.device)
            table = trainer.strategy.reduce(table, reduce_op="sum")  # type: ignore[assignment]
            whole += table
            if names:
                lengths[names[number]] = self._log(pl_module, f"val/{names[number]}", table)
        length = self._log(pl_module, "val", whole, prog_bar=True)
        if trainer.is_global_zero:
            stops, _, *positions = whole.tolist()
            rates = [count / max(stops, 1.0) for count in positions]
            row = {"step": trainer.global_step, "acceptance_length": length, "rates": rates, "drafts": int(stops), "loss": None}
            self._append(trainer, row | ({"sets": lengths} if lengths else {}))

    @staticmethod
    def _log(pl_module: Any, prefix: str, table: torch.Tensor, prog_bar: bool = False) -> float:
        """Log length and rates of one set, or of all; returns the length."""
        stops, accepted, *positions = table.tolist()
        length = 1.0 + float(accepted) / max(stops, 1.0)
        pl_module.log(f"{prefix}/acceptance_length", length, prog_bar=prog_bar)
        pl_module.log_dict({f"{prefix}/acceptance_rate_{i}": count / max(stops, 1.0) for i, count in enumerate(positions)})
        return length

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Fill in the loss, which the module logs after this callback's own hook."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.is_global_zero and loss is not None:
            self._last["loss"] = float(loss)
            self._flush(trainer)

    def _append(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        self._last = row
        rank_zero_info(f"step {row['step']}: acceptance length {row['acceptance_length']:.3f} (serving walk, k={self.k}, {row['drafts']} drafts)")

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
        from torchspec.acceptance import REPORT, measure

        exporter = self._exporter(trainer)
        assert exporter is not None
        data: DraftDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.close()  # the engines' memory is needed now
        target, options = data.target.config, data.corpus.options
        report = measure(
            target.path,
            str(exporter.folder(trainer)),
            prompts=home(self.serve_prompts),
            num_speculative_tokens=self.k,
            limit=self.serve_limit,
            max_new_tokens=self.serve_max_new_tokens,
            engine_args=self.serve_engine_args,
            revision=target.revision,
            dtype=target.dtype,
            trust_remote_code=target.trust_remote_code,
            messages_key=options.messages_key,
            template_args=options.template_args,
            output=str(spare_name(Path(trainer.default_root_dir) / "vllm_acceptance.json", REPORT)),
        )
        for logger in trainer.loggers:
            logger.log_metrics({"vllm/acceptance_length": report["acceptance_length"]}, step=trainer.global_step)

    def _exporter(self, trainer: pl.Trainer) -> ExportDraft | None:
        """The callback that exports, if it comes before this one."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks[: callbacks.index(self)] if isinstance(callback, ExportDraft)), None)
