"""A trainer run of the datamodule with a small module that notes what it trains. ``python -m tests.data.toy JSON`` starts it on several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.data.feeder import FedDataModule
from torchspec.supervision import Unroll
from torchspec.target import TargetConfig


class Toy(pl.LightningModule):
    """One linear layer on the last states; writes a line for each micro-batch and each optimizer step."""

    def __init__(self, notes: Path, die_at: int | None = None, aux_layers: Sequence[int] = (2, 4, 5)) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(128, 1)
        torch.nn.init.constant_(self.layer.weight, 0.01)
        torch.nn.init.zeros_(self.layer.bias)
        self.notes = notes
        self.aux_layers = tuple(aux_layers)
        self.die_at = die_at
        self.seen = 0

    def supervision(self, stage: Literal["train", "validate"]) -> Unroll:
        return Unroll(2)

    def note(self, **what: Any) -> None:
        with (self.notes.parent / f"{self.notes.name}.{self.global_rank}").open("a") as handle:
            handle.write(json.dumps(what) + "\n")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.die_at is not None and self.seen == self.die_at:
            raise RuntimeError("died here")
        self.seen += 1
        self.note(kind="train", epoch=self.current_epoch, pack=batch.pack_index, samples=batch.sample_ids, step=self.trainer.global_step, batch=batch_idx)
        loss = self.layer(batch.last.float()).sum() / batch.counts[0] + 0.0 * self.layer.weight.sum()
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note(
            kind="validate",
            stage=batch.stage,
            sanity=self.trainer.sanity_checking,
            pack=batch.pack_index,
            samples=batch.sample_ids,
            step=self.trainer.global_step,
        )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note(kind="step", step=self.trainer.global_step, weight=float(self.layer.weight[0, 0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(
    folder: str,
    target: str,
    train: str,
    validate: str | None,
    *,
    data: dict[str, Any],
    trainer: dict[str, Any],
    checkpoint: dict[str, Any],
    resume: str | None,
    die_at: int | None,
) -> Toy:
    """One run; checkpoints and notes go to ``folder``."""
    data = dict(data)
    module = Toy(Path(folder) / "notes", die_at, data.pop("aux_layers", (2, 4, 5)))
    datamodule = FedDataModule(
        TargetConfig(target),
        train,
        validate,
        cache_dir=str(Path(folder).parent / "cache"),
        **{"max_length": 128, "max_tokens": 160, "packs_per_step": 4, **data},
    )
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **trainer,
    }
    callbacks: list[pl.Callback] = [ModelCheckpoint(**{"dirpath": folder, "save_last": True, "save_top_k": -1, "filename": "{step}", **checkpoint})]
    pl.Trainer(default_root_dir=folder, callbacks=callbacks, **settings).fit(module, datamodule=datamodule, ckpt_path=resume)
    return module


def notes(folder: Path, kind: str, rank: int | None = None) -> list[dict[str, Any]]:
    """What ranks noted, rank by rank."""
    files = sorted(folder.glob("notes.*")) if rank is None else [folder / f"notes.{rank}"]
    return [entry for file in files for line in file.read_text().splitlines() if (entry := json.loads(line))["kind"] == kind]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(**json.loads(sys.argv[1]))
