"""A tiny target, its true hidden states on disk, and runs of the Trainer on them, all in this process: what Lightning's
own tools meet in a training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from tests.data.feeder import FedDataModule, Feeder
from tests.tiny import save_conversations, save_target
from torchspec.data.datamodule import DraftDataModule
from torchspec.engines.messages import RecordRef
from torchspec.models.module import DraftModule
from torchspec.models.optim.schedules import Cosine
from torchspec.target import TargetConfig
from torchspec.trainer import Trainer
from torchspec.transfer.record import seal, views

ROWS, VALIDATION_ROWS = 24, 7
SIZES: dict[str, Any] = {"max_length": 64, "max_tokens": 96, "packs_per_step": 2}


class TrueFeeder(Feeder):
    """Records of the target itself, run here."""

    model: Any = None

    @torch.no_grad()
    def write(self, key: str, index: int, ids: np.ndarray) -> RecordRef:
        tokens = ids.shape[0]
        buffer = torch.zeros(self.spec.nbytes(tokens), dtype=torch.uint8)
        view_ids, aux, last = views(buffer, self.spec, tokens, tokens)
        view_ids.copy_(torch.from_numpy(ids.copy()))
        before_norm: list[torch.Tensor] = []
        hook = self.model.model.layers[-1].register_forward_hook(lambda *parts: before_norm.append(parts[2] if torch.is_tensor(parts[2]) else parts[2][0]))
        states = self.model(view_ids[None].long(), output_hidden_states=True).hidden_states
        hook.remove()
        aux.copy_(torch.cat([states[layer][0] for layer in self.spec.aux_layers], dim=-1))
        last.copy_(before_norm[0].view(tokens, -1))
        self.store.put([key], [seal(buffer, self.spec, tokens, tokens, producer="feeder")])
        return RecordRef(index, key, buffer.numel(), tokens, tokens)


class TrueDataModule(FedDataModule):
    """With such feeders."""

    def connect(self, name: str, role: str = "trainer") -> Any:
        made = super().connect(name, role)
        made.__class__ = TrueFeeder
        return made


def make_world(folder: Path) -> dict[str, str]:
    """Target, conversations and the records of all of them."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    target = save_target(folder / "target")
    world = {
        "folder": str(folder),
        "target": str(target),
        "train": str(save_conversations(folder / "train.jsonl", ROWS)),
        "validate": str(save_conversations(folder / "validate.jsonl", VALIDATION_ROWS, seed=1)),
        "records": str(folder / "records"),
    }
    TrueFeeder.model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    data = TrueDataModule(TargetConfig(world["target"]), world["train"], world["validate"], tee=world["records"], cache_dir=str(folder / "cache"), **SIZES)
    trainer(folder / "first", callbacks=[]).fit(module(world, lr=0.0), datamodule=data)
    TrueFeeder.model = None
    return world


def module(world: dict[str, str], *, lr: float = 1e-2, schedule: bool = False, **changes: Any) -> DraftModule:
    """A fresh draft, the same one each time."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return DraftModule(
        TargetConfig(world["target"]),
        unroll_steps=2,
        compute_dtype="fp32",
        optimizer=optimizer,
        lr_scheduler=partial(Cosine, total_steps=40) if schedule else None,
        **changes,
    )


def data(world: dict[str, str], **changes: Any) -> DraftDataModule:
    """Replayed records."""
    arguments = {**SIZES, "engine": "replay", "records": world["records"], "cache_dir": str(Path(world["folder"]) / "cache"), **changes}
    validate = arguments.pop("validate", world["validate"])
    return DraftDataModule(TargetConfig(world["target"]), world["train"], validate, **arguments)


def trainer(folder: Path, *, callbacks: list[Callback], **changes: Any) -> Trainer:
    """Of one epoch, without a word on the terminal."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    barebones = {"barebones": True} if changes.pop("barebones", False) else quiet
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(folder), **barebones, **changes}
    if not callbacks and "barebones" not in barebones:
        settings.setdefault("enable_checkpointing", False)
    return Trainer(callbacks=callbacks, **settings)


def fit(world: dict[str, str], folder: Path, *callbacks: Callback, resume: str | None = None, **changes: Any) -> Trainer:
    """One run; ``draft__...`` and ``data__...`` go to the module and the datamodule, the rest to the Trainer."""
    draft = {name.removeprefix("draft__"): changes.pop(name) for name in list(changes) if name.startswith("draft__")}
    given = {name.removeprefix("data__"): changes.pop(name) for name in list(changes) if name.startswith("data__")}
    made = trainer(folder, callbacks=list(callbacks), **changes)
    made.fit(module(world, **draft), datamodule=data(world, **given), ckpt_path=resume)
    return made


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    """Of the draft, copied."""
    return {name: value.detach().clone() for name, value in made.lightning_module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
