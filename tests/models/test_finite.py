"""NaN and infinity are called by their name wherever they show, end a run at once, and never take the place of a good checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from tests.defects.fits import batches, fit, module
from tests.models.exports import export_variant, export_weights, random_draft, save_plain_target
from tests.models.packs import draft_config
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.last import LastCheckpoint
from torchspec.errors import UserError
from torchspec.models.export.export import ExportOptions, export_checkpoint
from torchspec.models.export.import_draft import import_draft
from torchspec.models.ops.not_finite import not_finite
from torchspec.models.training.finite import LAG, Found, StepWatch, unsound
from torchspec.models.training.numbers import end_for
from torchspec.models.training.start import read_start
from torchspec.target import Target, TargetConfig
from torchspec.trainer import Trainer
from torchspec.transfer.record import Record, is_finite

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def adamw(lr: float = 0.002) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def test_what_is_not_finite_is_named() -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, NAN]), "c": torch.tensor([INF]), "ids": torch.tensor([1]), "none": torch.zeros(0)}
    assert not_finite(tensors.items()) == ["b", "c"]
    assert unsound({"state_dict": {"task.draft.fc.weight": torch.tensor([NAN])}}) == "weights are no longer numbers (NaN or infinity in fc.weight)"
    states = [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.tensor([INF])}}, "param_groups": [{"lr": 0.1}]}]
    assert "optimizer's states are no longer numbers (NaN or infinity in optimizer.0.state.0.exp_avg)" in unsound({"optimizer_states": states})
    assert unsound({"state_dict": {"a": torch.ones(1)}, "optimizer_states": []}) == ""


@pytest.mark.parametrize("export", [True, False])
def test_a_learning_rate_that_is_too_high_ends_the_run_by_name_at_once(target: Target, tmp_path: Path, export: bool) -> None:
    """Not the export's self-check, long after."""
    callbacks: list[Any] = [ExportDraft()] if export else []
    with pytest.raises(UserError, match=r"step [23] is not a number: weights are no longer numbers"):
        fit(tmp_path, module(target, optimizer=adamw(1e30)), steps=9, log_every_n_steps=100, callbacks=callbacks)
    assert not (tmp_path / "draft").exists()


class At(pl.Callback):
    """Does something to the module before a step."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.what(trainer, pl_module)


def poison_weights(trainer: Any, made: Any) -> None:
    next(p for p in made.parameters() if p.requires_grad).data.view(-1)[:1] = NAN


def poison_moments(trainer: Any, made: Any) -> None:
    next(iter(trainer.optimizers[0].state.values()))["exp_avg"].view(-1)[:1] = INF


@pytest.mark.parametrize(("poison", "words"), [(poison_weights, "weights are no longer numbers"), (poison_moments, "optimizer's states are no longer numbers")])
@pytest.mark.parametrize("kind", ["last", "best", "all"])
def test_no_checkpoint_is_written_of_what_is_no_number(target: Target, tmp_path: Path, kind: str, poison: Any, words: str) -> None:
    """Whoever saves: the newest, the best by a metric, every one."""
    saver = {
        "last": lambda: LastCheckpoint(every_n_train_steps=2),
        "best": lambda: ModelCheckpoint(monitor="train/loss", save_top_k=2, every_n_train_steps=2),
        "all": lambda: ModelCheckpoint(save_top_k=-1, every_n_train_steps=2),
    }[kind]()
    with pytest.raises(UserError, match=rf"checkpoint='step 4' is not written: .*{words}.*What is there is kept"):
        fit(tmp_path, module(target, optimizer=adamw()), steps=9, enable_checkpointing=True, callbacks=[At(4, poison), saver])
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert len(saved) == 1 and not unsound(torch.load(saved[0], weights_only=True))


def test_a_resume_from_what_is_no_number_is_refused(target: Target, tmp_path: Path) -> None:
    fit(tmp_path, module(target, optimizer=adamw()), steps=2, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    good = torch.load(last, weights_only=True)
    weight, moment = (lambda c: c["state_dict"]["task.draft.norm.weight"]), (lambda c: c["optimizer_states"][0]["state"][0]["exp_avg"])
    for spoil, words in ((weight, "norm.weight"), (moment, "exp_avg")):
        broken = torch.load(last, weights_only=True)
        spoil(broken).view(-1)[0] = NAN
        torch.save(broken, tmp_path / "broken.ckpt")
        with pytest.raises(UserError, match=f"ckpt_path=.*cannot be trained on from: .*no longer numbers .*{words}"):
            fit(tmp_path, module(target, optimizer=adamw()), steps=4, ckpt_path=str(tmp_path / "broken.ckpt"))
    assert good["global_step"] == 2


def test_a_draft_that_begins_as_no_number_is_the_targets(target: Target, tmp_path: Path) -> None:
    """Where nothing was restored or started from, no checkpoint is named."""

    class Spoiled(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.task.draft.norm.weight.data[0] = NAN

    with pytest.raises(UserError, match=r"data\.target\.path=.* gives no draft to begin with: .*norm\.weight"):
        fit(tmp_path, module(target, optimizer=adamw()), steps=1, callbacks=[Spoiled()])


def test_drafts_and_checkpoints_with_nan_are_refused_wherever_they_are_read(target: Target, tmp_path: Path) -> None:
    fit(tmp_path, module(target, optimizer=adamw()), steps=1, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    broken = torch.load(last, weights_only=True)
    broken["state_dict"]["task.draft.fc.weight"][0, 0] = NAN
    torch.save(broken, tmp_path / "broken.ckpt")
    for read in (lambda path: export_checkpoint(path, target, tmp_path / "out"), lambda path: read_start(str(path), target)):
        with pytest.raises(UserError, match=r"weights are no longer numbers \(NaN or infinity in fc.weight\)"):
            read(tmp_path / "broken.ckpt")
    draft = export_variant("plain", target, tmp_path / "draft").folder
    tensors = load_file(draft / "model.safetensors")
    tensors["fc.weight"][0, 0] = INF
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no longer numbers \(NaN or infinity in fc.weight\)"):
        import_draft(str(draft), target)
    assert not (tmp_path / "out").exists()


def test_an_export_says_nan_and_overflow_and_blames_no_disk(target: Target, tmp_path: Path) -> None:
    draft = random_draft(draft_config(), target)
    weights = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    weights["fc.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"dtype='float16' cannot hold these weights: they overflow \(NaN or infinity in fc.weight\)"):
        export_weights(draft.config, weights, None, target, tmp_path / "draft", options=ExportOptions(dtype="float16"))
    weights["fc.weight"][0, 0] = NAN
    with pytest.raises(UserError, match="weights are no longer numbers"):
        export_weights(draft.config, weights, None, target, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_target_that_is_not_made_of_numbers_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_plain_target(tmp_path / "target").config.path
    tensors = load_file(Path(folder) / "model.safetensors")
    tensors[name].view(-1)[0] = NAN
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"data.target.path=.* has a head, norm or embedding that is not made of numbers"):
        fit(tmp_path, module(Target(TargetConfig(folder, dtype="float32")), optimizer=adamw()), steps=1)


def spoiled(count: int, at: int, where: str) -> list[Any]:
    """Batches of which one has a state that is no number, in its second conversation."""
    given = list(batches(count))
    batch = given[at]
    states = getattr(batch, where).clone()
    states[int(batch.cu_seqlens[1]) + 2, 0] = INF
    given[at] = replace(batch, **{where: states})
    return given


@pytest.mark.parametrize("where", ["aux", "last"])
def test_hidden_states_with_nan_are_named_by_their_conversation(target: Target, tmp_path: Path, where: str) -> None:
    given = spoiled(6, 2, where)
    one: dict[str, Any] = {"batch_size": None}
    culprit = given[2].sample_ids[1]
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, max_steps=6, num_sanity_val_steps=0, log_every_n_steps=50, callbacks=[LastCheckpoint(1)], **quiet)
    with pytest.raises(UserError, match=rf"hidden states='sample {culprit}' have target states with NaN or infinity \(found at step 3\)"):
        trainer.fit(module(target, optimizer=adamw()), DataLoader(given, **one))
    assert not unsound(torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True))
    with pytest.raises(UserError, match=rf"hidden states='sample {culprit}' have target states with NaN or infinity"):
        trainer = Trainer(default_root_dir=tmp_path, max_steps=2, num_sanity_val_steps=0, enable_checkpointing=False, **quiet)
        trainer.fit(module(target, optimizer=adamw()), batches(2), DataLoader([spoiled(3, 2, where)[2]], **one))


def test_a_validation_loss_that_is_nan_says_so(target: Target, tmp_path: Path) -> None:
    made = module(target, optimizer=adamw())
    with pytest.raises(UserError, match=r"val/loss=nan at step 1 is not a number: weights are no longer numbers"):
        fit(tmp_path, made, steps=1, validate=True, callbacks=[At(1, poison_weights)])


def test_a_gpus_steps_are_looked_at_later_and_none_is_left_out() -> None:
    """The same step on every rank, whatever its device is doing."""
    watch = StepWatch()
    batch = next(iter(batches(1)))
    looked = []

    class Done:
        def synchronize(self) -> None:
            looked.append(True)

    for step in range(1, 20):
        watch.add(torch.tensor(NAN if step == 7 else 1.0), batch)
        watch.end(step, torch.ones(3))
        watch._noted[-1] = replace(watch._noted[-1], done=Done())
        found = watch.look(step)
        if found is not None:
            assert (step, found.step, found.loss, found.gradient, found.samples) == (7 + LAG, 7, False, True, ())
            break
    assert len(looked) == 7


class Rank:
    """As much of a module as the end of a run asks for; ``agreed`` is what the ranks say together."""

    def __init__(self, agreed: bool) -> None:
        strategy = SimpleNamespace(reduce_boolean_decision=lambda mine: agreed and mine)
        self.trainer = SimpleNamespace(world_size=2, strategy=strategy, global_step=9, datamodule=None)
        self.task, self.matmul = None, "bf16"


def test_ranks_end_together_and_those_that_know_why_say_it() -> None:
    found = Found(step=9, loss=False, gradient=False, samples=())
    end_for(Rank(agreed=True), replace(found, gradient=True))  # type: ignore[arg-type]  # this rank's loss alone: the others go on
    with pytest.raises(UserError, match="train/loss=nan at step 9"):
        end_for(Rank(agreed=True), found)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        end_for(Rank(agreed=False), found)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="hidden states='sample 4'"):
        end_for(Rank(agreed=False), replace(found, samples=(4,)))  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [[1.0, NAN, 1.0], [1.0, INF, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]])
def test_weights_of_steps_are_numbers(target: Target, weights: list[float]) -> None:
    with pytest.raises(UserError, match="model.step_weights"):
        module(target, step_weights=weights)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_records_that_are_kept_are_looked_at(kind: torch.dtype) -> None:
    def record(value: float) -> Record:
        aux = torch.randn(5, 6).to(kind)
        aux[2, 3] = value
        return Record(torch.zeros(5, dtype=torch.int32), aux, torch.randn(5, 2).to(kind), {})

    assert all(is_finite(record(value)) for value in (0.0, torch.finfo(kind).max, -torch.finfo(kind).max, torch.finfo(kind).tiny))
    assert not any(is_finite(record(value)) for value in (NAN, INF, -INF))
