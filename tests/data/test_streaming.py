"""The loader against the real thing: coordinator, engine worker, store and trainer in their own processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.data.toy import Toy, notes
from tests.tiny import save_conversations, save_target
from torchspec.batch import PackedBatch
from torchspec.data.datamodule import DraftDataModule
from torchspec.engines.engine import EngineConfig
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer.store import StoreConfig

ROWS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "target": str(save_target(folder / "target")),
        "train": str(save_conversations(folder / "train.jsonl", ROWS, turns=2)),
        "validate": str(save_conversations(folder / "validate.jsonl", 9, seed=1)),
        "cache": str(folder / "cache"),
    }


class Kept(Toy):
    """Keeps every batch."""

    def __init__(self, notes: Path) -> None:
        super().__init__(notes)
        self.batches: list[PackedBatch] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def run(folder: Path, world: dict[str, str], *, data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None) -> tuple[Kept, DraftDataModule]:
    folder.mkdir(parents=True, exist_ok=True)
    engines = EngineConfig(deterministic=True, threads=1)
    settings = {
        "max_length": 128,
        "max_tokens": 256,
        "packs_per_step": 2,
        "store": store(folder),
        "engines": engines,
    }
    datamodule = DraftDataModule(TargetConfig(world["target"]), world["train"], world["validate"], cache_dir=world["cache"], **{**settings, **(data or {})})
    module = Kept(folder / "notes")
    options = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 1,
    }
    pl.Trainer(default_root_dir=folder, **{**options, **(trainer or {})}).fit(module, datamodule=datamodule)  # type: ignore[arg-type]
    return module, datamodule


def store(folder: Path, budget: str | int = "4MiB") -> StoreConfig:
    """Shared memory of this test's own, so that what it leaves can be told from what others use."""
    (folder / "shm").mkdir(parents=True, exist_ok=True)
    return StoreConfig(kind="shm", budget=str(budget), shm_dir=str(folder / "shm"))


def nothing_left(folder: Path) -> bool:
    return not any((folder / "shm").iterdir())


@pytest.mark.slow
def test_states_of_the_target_arrive_once_each(world: dict[str, str], tmp_path: Path) -> None:
    module, datamodule = run(tmp_path / "run", world)
    for epoch in (0, 1):
        trained = [e for e in notes(tmp_path / "run", "train") if e["epoch"] == epoch]
        assert Counter(i for e in trained for i in e["samples"]) == Counter(range(ROWS))
    seen = Counter(i for e in notes(tmp_path / "run", "validate") if not e["sanity"] for i in e["samples"])
    assert seen == Counter({i: 2 for i in range(9)})
    assert nothing_left(tmp_path / "run") and datamodule.group is None and (tmp_path / "run" / "logs" / "coordinator.log").is_file()
    target = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    norm = target.model.norm
    batch = max(module.batches[:4], key=lambda b: b.num_tokens)
    assert len(batch.sample_ids) >= 2
    for low, high in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        with torch.no_grad():
            states = target(batch.input_ids[low:high][None], output_hidden_states=True).hidden_states
        aux = torch.cat([states[i][0] for i in datamodule.aux_layers], dim=-1)
        torch.testing.assert_close(batch.aux[low : high - 1], aux[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm(batch.last[low : high - 1]), states[-1][0, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_small_budget_still_delivers_everything(world: dict[str, str], tmp_path: Path) -> None:
    probe = DraftDataModule(
        TargetConfig(world["target"]),
        world["train"],
        world["validate"],
        cache_dir=world["cache"],
        max_length=128,
        max_tokens=256,
        packs_per_step=2,
    )
    probe.aux_layers = (2, 4, 5)
    largest = [probe.corpus.largest_pack(stage, probe.spec) for stage in ("train", "validate")]
    with pytest.raises(UserError, match=r"data\.store\.budget=.* is less than the"):
        run(tmp_path / "refused", world, data={"store": store(tmp_path, sum(largest) - 1)})
    run(tmp_path / "run", world, data={"store": store(tmp_path, sum(largest))}, trainer={"max_epochs": 1})
    assert nothing_left(tmp_path)
    assert Counter(i for e in notes(tmp_path / "run", "train") for i in e["samples"]) == Counter(range(ROWS))


@pytest.mark.slow
def test_an_error_in_the_module_closes_everything(world: dict[str, str], tmp_path: Path) -> None:
    import psutil

    class Failing(Kept):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("out of luck")

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    datamodule = DraftDataModule(
        TargetConfig(world["target"]),
        world["train"],
        None,
        cache_dir=world["cache"],
        max_length=128,
        max_tokens=256,
        packs_per_step=2,
        store=store(tmp_path),
    )
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
    )
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(Failing(tmp_path / "notes"), datamodule=datamodule)
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before
    assert nothing_left(tmp_path) and datamodule.group is None
