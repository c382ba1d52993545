"""The average of the weights: its numbers, who reads it, and that a resume goes on exactly, also on other numbers of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from tests.defects.fits import fit, module, weights
from tests.distributed.ranks import on_ranks
from tests.models.exports import save_plain_target
from torchspec.callbacks.average import Average
from torchspec.callbacks.export import ExportDraft
from torchspec.errors import UserError
from torchspec.models.export.export import ExportOptions, export_checkpoint
from torchspec.models.optim.muon import MuonAdamW
from torchspec.models.training.averages import KEY
from torchspec.models.training.checkpoint import read_draft_weights
from torchspec.target import Target

NAME = "fc.weight"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


class Seen(Callback):
    """A weight after each optimizer step, and in each validation."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained.append(pl_module.task.draft.fc.weight.detach().clone())

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(pl_module.task.draft.fc.weight.detach().clone())


def mean(values: list[Tensor], horizon: float) -> Tensor:
    average = values[0].clone()
    for n, value in enumerate(values[1:], 2):
        average += (value - average) / min(n, horizon)
    return average


def made(target: Target, **changes: Any) -> Any:
    return module(target, optimizer=lambda given: MuonAdamW(given, lr=1e-2), **changes)


@pytest.mark.parametrize("given", [{"horizon": 0}, {"horizon": math.nan}, {"start": -1}, {"start": math.nan}, {"start": math.inf}])
def test_nonsense_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"callbacks\.Average\.{next(iter(given))}=.* Fix: use"):
        Average(**given)


@pytest.mark.parametrize(("given", "horizon", "start"), [((3.0,), 3.0, 0), ((0.5, 0.25), 4.0, 2), ((100.0,), 100.0, 0)])
def test_is_a_running_mean_and_then_an_exponential_one(target: Target, tmp_path: Path, given: tuple[float, ...], horizon: float, start: int) -> None:
    """Eight steps. Validation reads it, training goes on from its own weights, and the export holds it."""
    seen = Seen()
    draft = made(target)
    runner = fit(tmp_path, draft, steps=8, validate=True, callbacks=[Average(*given), seen, ExportDraft(str(tmp_path / "draft"))])
    expected = mean(seen.trained[start:], horizon)
    plain = made(target)
    fit(tmp_path / "plain", plain, steps=8, validate=True)
    assert torch.equal(weights(draft)[NAME], weights(plain)[NAME]) and torch.equal(weights(draft)[NAME], seen.trained[-1])
    torch.testing.assert_close(seen.validated[-1], expected)
    torch.testing.assert_close(load_file(tmp_path / "draft" / "model.safetensors")[NAME], expected)
    assert (runner.optimizers[0].state[draft.task.draft.fc.weight][KEY].dtype) == torch.float32
    assert "| weights | Average: horizon" in (tmp_path / "draft" / "README.md").read_text()


def test_resumes_exactly_and_export_takes_either(target: Target, tmp_path: Path) -> None:
    whole = fit(tmp_path, made(target), steps=6, callbacks=[Average(4.0)])
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    fit(tmp_path, made(target), steps=3, callbacks=[Average(4.0)]).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, made(target), steps=6, callbacks=[Average(4.0)], ckpt_path=str(tmp_path / "half.ckpt")).save_checkpoint(tmp_path / "again.ckpt")
    for which in ("raw", "average"):
        one, other = (read_draft_weights(tmp_path / name, which) for name in ("whole.ckpt", "again.ckpt"))  # type: ignore[arg-type]
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        export_checkpoint(tmp_path / "whole.ckpt", target, tmp_path / which, options=ExportOptions(weights=which))  # type: ignore[arg-type]
        assert torch.equal(load_file(tmp_path / which / "model.safetensors")[NAME], one[NAME])
    raw, average = (read_draft_weights(tmp_path / "whole.ckpt", which)[NAME] for which in ("raw", None))  # type: ignore[arg-type]
    assert not torch.equal(raw, average) and torch.equal(average, read_draft_weights(tmp_path / "whole.ckpt", "average")[NAME])
    assert torch.equal(raw, weights(whole.lightning_module)[NAME])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds averages of the weights"):
        fit(tmp_path, made(target), steps=6, ckpt_path=str(tmp_path / "half.ckpt"))
    fit(tmp_path, made(target), steps=2).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="weights"):
        read_draft_weights(tmp_path / "plain.ckpt", "average")
    later = fit(tmp_path, made(target), steps=4, callbacks=[Average(4.0)], ckpt_path=str(tmp_path / "plain.ckpt"))  # begins where it is added
    assert any(isinstance(c, Average) and c._began == 2 for c in later.callbacks)  # type: ignore[attr-defined]


def test_a_run_that_breaks_off_in_validation_keeps_the_weights_in_training(target: Target, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("validation breaks off")

    draft, seen = made(target), Seen()
    with pytest.raises(RuntimeError, match="breaks off"):
        fit(tmp_path, draft, steps=4, validate=True, callbacks=[Average(4.0), seen, Broken()])
    assert torch.equal(weights(draft)[NAME], seen.trained[-1])


def test_wrong_lengths_are_refused() -> None:
    for wrong in ({"horizon": 0.0}, {"start": -1.0}):
        with pytest.raises(UserError, match=f"callbacks.Average.{next(iter(wrong))}"):
            Average(**wrong)


def _sharded(rank: int, folder: Path) -> None:
    """Four steps on two ranks; two there and two more on one, from the sharded checkpoint."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    from tests.models.differences import PRUNED, STEPS, made_for
    from tests.models.packs import pack
    from torchspec.models.training.parallelize import parallelize

    def build(mesh: Any) -> tuple[Any, Any, Any]:
        task, conversations = made_for("plain", PRUNED)
        task.draft.compute_dtype = torch.float32
        task.float()
        parallelize(task, mesh=mesh, compute_dtype=torch.float32)
        return task, torch.optim.AdamW(task.parameters(), lr=1e-2, fused=True), pack(task.draft.config, conversations, STEPS, dtype=torch.float32)

    class Clock:
        global_step = 0
        optimizers: list[Any]
        sanity_checking = False

    def run(task: Any, optimizer: Any, batch: Any, callback: Average, first: int, last: int) -> None:
        clock = Clock()
        clock.optimizers = [optimizer]
        clock.global_step = first
        callback.on_train_start(clock, None)  # type: ignore[arg-type]
        optimizer.register_step_post_hook(lambda given, *_: callback._after_step(clock, None, given))  # type: ignore[arg-type]
        holder = type("Holder", (), {"task": task})()
        for step in range(first, last):
            clock.global_step = step
            optimizer.zero_grad()
            task(batch).loss.backward()
            optimizer.step()
            before = [p.full_tensor() for p in task.parameters()]
            loss = task(batch).loss.detach()
            callback._exchange(clock, holder)  # type: ignore[arg-type]
            with torch.no_grad():
                averaged = task(batch).loss
            callback._exchange(clock, holder)  # type: ignore[arg-type]
            assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, task.parameters(), strict=True))
            assert torch.equal(task(batch).loss.detach(), loss) and (step == first or not torch.equal(averaged, loss))

    mesh = init_device_mesh("cpu", (2,))
    task, optimizer, batch = build(mesh)
    callback = Average(3.0)
    run(task, optimizer, batch, callback, 0, 4)
    task.reshard()
    state = get_optimizer_state_dict(task, optimizer)
    averages = {name: entry[KEY].full_tensor() for name, entry in state["state"].items()}  # type: ignore[union-attr]
    again, other, _ = build(mesh)
    fresh = Average(3.0)
    fresh.load_state_dict(callback.state_dict())
    fresh._saved = True
    clock = Clock()
    other.register_step_post_hook(lambda given, *_: fresh._after_step(clock, None, given))  # type: ignore[arg-type]
    template = get_optimizer_state_dict(again, other)  # torch steps once to make room
    assert all(KEY in entry for entry in template["state"].values())  # type: ignore[union-attr]
    set_optimizer_state_dict(again, other, state)
    for name, p in again.named_parameters():
        assert torch.equal(other.state[p][KEY].full_tensor(), averages[name]), name


@pytest.mark.slow
def test_sharded_averages_are_restored_and_exchanged(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _sharded, tmp_path)
