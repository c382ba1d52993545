"""A fit of a tiny draft on ready batches, without engines: for what concerns the trainer, the checkpoint and the optimizer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.models.packs import conversation, draft_config, pack
from torchspec.models.module import DraftModule
from torchspec.target import Target
from torchspec.trainer import Trainer

STEPS = 3


def module(target: Target, **changes: Any) -> DraftModule:
    """fp32, K = 3, aux layers 1 to 3."""
    torch.manual_seed(0)
    return DraftModule(target.config, aux_layers=[1, 2, 3], unroll_steps=STEPS, compute_dtype="fp32", **changes)


def batches(count: int) -> Any:
    """The same pack ``count`` times."""
    config = draft_config()
    conversations = [conversation(config, [0] + [1] * n, n) for n in (5, 8)]
    given: Any = [pack(config, conversations, STEPS, dtype=torch.float32)] * count
    return DataLoader(given, batch_size=None)


def fit(folder: Path, made: DraftModule, *, steps: int, ckpt_path: str | None = None, validate: bool = False, **trainer: Any) -> Trainer:
    """Train for optimizer steps, one batch each."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1, **trainer}
    runner = Trainer(default_root_dir=folder, max_steps=steps, num_sanity_val_steps=0, **quiet)
    runner.fit(made, batches(steps), batches(1) if validate else None, ckpt_path=ckpt_path)
    return runner


def weights(made: DraftModule) -> dict[str, Tensor]:
    """Copies of what is trained."""
    assert made.task is not None
    return {name: parameter.detach().clone() for name, parameter in made.task.draft.named_parameters()}
