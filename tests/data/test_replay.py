"""Training from records on disk: the same batches as the run whose records they are, without store or engine; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data import toy
from tests.data.feeder import FedDataModule
from tests.tiny import save_conversations, save_target
from torchspec.data.datamodule import DraftDataModule
from torchspec.errors import UserError
from torchspec.target import TargetConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "folder": folder,
        "target": str(save_target(folder / "target")),
        "train": str(save_conversations(folder / "train.jsonl", 31)),
        "validate": str(save_conversations(folder / "validate.jsonl", 9, seed=1)),
    }


def fit(folder: Path, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, module: type[DraftDataModule], **data: Any) -> None:
    folder.mkdir(parents=True)
    monkeypatch.setattr(toy, "FedDataModule", module)
    given = {"train": world["train"], "validate": world["validate"]}
    toy.fit(str(folder), world["target"], **given, data=data, trainer={"max_epochs": 2}, checkpoint={}, resume=None, die_at=None)


def weights(folder: Path) -> list[float]:
    return [entry["weight"] for entry in toy.notes(folder, "step")]


def test_a_replay_of_teed_records_is_the_same_run(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    fit(tmp_path / "online", world, monkeypatch, FedDataModule, tee=str(records))
    assert json.loads((records / "manifest.json").read_text())["stored"] == "exact"
    fit(tmp_path / "replay", world, monkeypatch, DraftDataModule, engine="replay", records=str(records))
    assert weights(tmp_path / "replay") == weights(tmp_path / "online") and len(weights(tmp_path / "online")) == 4
    for kind in ("train", "validate"):
        assert toy.notes(tmp_path / "replay", kind) == toy.notes(tmp_path / "online", kind)
    assert not (tmp_path / "replay" / "logs").exists()
    # what does not fit is refused before anything is trained
    with pytest.raises(UserError, match=r"holds records whose aux_layers is \[2, 4, 5\], and this run expects \[1, 4, 5\]"):
        fit(tmp_path / "layers", world, monkeypatch, DraftDataModule, engine="replay", records=str(records), aux_layers=[1, 4, 5])
    more = {**world, "train": str(save_conversations(tmp_path / "more.jsonl", 35))}
    with pytest.raises(UserError, match=r"lacks 4 of the run's 44 conversations"):
        fit(tmp_path / "missing", more, monkeypatch, DraftDataModule, engine="replay", records=str(records))


def test_a_damaged_record_ends_the_run_with_its_place(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    fit(tmp_path / "online", world, monkeypatch, FedDataModule, tee=str(records))
    (file,) = records.glob("records-*")
    data = bytearray(file.read_bytes())
    data[-1000] ^= 255
    file.write_bytes(data)
    with pytest.raises(Exception, match="a record in .* cannot be used: .*checksum differs"):
        fit(tmp_path / "replay", world, monkeypatch, DraftDataModule, engine="replay", records=str(records))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "replay"}, r"data\.records=None is missing"),
        ({"records": "x"}, r"data\.records='x' has no meaning for engine transformers"),
        ({"engine": "replay", "records": "x", "tee": "y"}, r"data\.tee='y' keeps records of no use"),
        ({"validate": {"a b": "x"}}, r"data\.validate='a b' is no name"),
    ],
)
def test_settings_that_contradict_each_other(world: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DraftDataModule(TargetConfig(world["target"]), world["train"], **changes)


def test_named_validation_sets(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone through whole, by its own loader; one that shares conversations with the training set is warned of."""
    sets = {"chat": world["validate"], "code": str(save_conversations(tmp_path / "code.jsonl", 5, seed=2)), "known": world["train"]}
    said: list[str] = []
    monkeypatch.setattr("torchspec.data.datamodule.rank_zero_info", said.append)
    fit(tmp_path / "run", {**world, "validate": sets}, monkeypatch, FedDataModule)
    seen = toy.notes(tmp_path / "run", "validate")
    for stage, rows in (("validate/chat", 9), ("validate/code", 5), ("validate/known", 31)):
        per_epoch = [i for e in seen if e["stage"] == stage for i in e["samples"]]
        assert sorted(per_epoch) == sorted(2 * list(range(rows)))
    assert [line for line in said if "warning" in line] == [line for line in said if "31 of the 31 conversations of validate/known" in line] != []


@pytest.mark.slow
def test_metrics_of_named_sets_and_of_all(world: dict[str, Any], tmp_path: Path) -> None:
    """With a real draft: a set's metrics are those of validating on it alone, and ``val/`` is over all of them."""
    import csv

    from tests.e2e.runs import config, run

    code = str(save_conversations(tmp_path / "code.jsonl", 7, seed=2))

    def losses(name: str, validate: Any) -> dict[str, float]:
        folder = tmp_path / name
        file = config(folder, world["target"], world["train"], validate, trainer__limit_train_batches=2)
        done, output = run("fit", "--config", str(file))
        assert done == 0, output
        rows = list(csv.DictReader(next(folder.rglob("metrics.csv")).open()))
        return {key: float(row[key]) for row in rows for key in row if key.startswith("val/") and row[key]}

    both = losses("both", {"chat": world["validate"], "code": code})
    chat = losses("chat", world["validate"])
    for metric in ("loss", "accuracy_0", "acceptance_length"):
        assert both[f"val/chat/{metric}"] == pytest.approx(chat[f"val/{metric}"], rel=1e-4)
        low, high = sorted([both[f"val/chat/{metric}"], both[f"val/code/{metric}"]])
        assert low <= both[f"val/{metric}"] <= high
