"""Numbers with which a run would spin, wait without end or mean nothing: refused by name before anything starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_conversations, save_target
from torchspec.cli import main
from torchspec.data.datamodule import DraftDataModule
from torchspec.data.sources import weighted_sources
from torchspec.engines.engine import EngineConfig, OnPolicy, Sampling
from torchspec.errors import UserError
from torchspec.models.module import DraftModule
from torchspec.target import TargetConfig
from torchspec.transfer.record import RecordSpec


@pytest.mark.parametrize(
    ("kind", "field", "name", "values"),
    [
        (EngineConfig, "data.engines.", "workers", [-1]),
        (EngineConfig, "data.engines.", "batch_tokens", [0, -5]),
        (EngineConfig, "data.engines.", "batch_samples", [0]),
        (EngineConfig, "data.engines.", "threads", [0]),
        (EngineConfig, "data.engines.", "max_attempts", [0]),
        (EngineConfig, "data.engines.", "max_restarts", [-1]),
        (EngineConfig, "data.engines.", "start_timeout", [0.0, -1.0, math.inf, math.nan]),
        (EngineConfig, "data.engines.", "lease_timeout", [0.0, math.nan]),
        (EngineConfig, "data.engines.", "silence_timeout", [0.0]),
        (EngineConfig, "data.engines.", "no_worker_timeout", [0.0, -1.0, math.inf, math.nan]),
        (EngineConfig, "data.engines.", "min_workers", [-1, 2]),
        (EngineConfig, "data.engines.", "max_failed_fraction", [-0.1, 1.5, math.nan]),
        (Sampling, "", "max_new_tokens", [0]),
        (Sampling, "", "temperature", [-1.0, math.nan, math.inf]),
        (Sampling, "", "top_p", [0.0, 7.0, math.nan]),
        (Sampling, "", "seed", [-1]),
        (OnPolicy, "data.on_policy.", "max_new_tokens", [1]),
        (OnPolicy, "data.on_policy.", "temperature", [-1.0]),
        (OnPolicy, "data.on_policy.", "top_p", [0.0]),
        (OnPolicy, "data.on_policy.", "seed", [-1]),
    ],
)
def test_settings_of_engines_and_sampling(kind: Any, field: str, name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            kind(**{name: value})
        assert (caught.value.field, repr(caught.value.value)) == (field + name, repr(value))
    kind()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("world")
    return str(save_target(folder / "target")), str(save_conversations(folder / "in.jsonl", 12))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("min_supervised_tokens", -5, "data.min_supervised_tokens=-5 is below 1"),
        ("num_proc", -3, "data.num_proc=-3 is below 1"),
        ("seed", -1, "data.seed=-1 is negative"),
        ("engine", "lightllm", "data.engine='lightllm' is unknown. Fix: use one of "),
    ],
)
def test_settings_of_the_data(world: tuple[str, str], name: str, value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        DraftDataModule(TargetConfig(world[0]), world[1], **{name: value})
    assert said in str(caught.value)


@pytest.mark.parametrize("engine", ["vllm", "vllm_remote"])
def test_attention_of_transformers_is_not_taken_for_vllms(world: tuple[str, str], engine: Any) -> None:
    eager = EngineConfig(attn_implementation="eager")
    with pytest.raises(UserError, match=f"data.engines.attn_implementation='eager' has no meaning for engine {engine}"):
        DraftDataModule(TargetConfig(world[0]), world[1], engine=engine, engines=eager)
    DraftDataModule(TargetConfig(world[0]), world[1], engine=engine)
    DraftDataModule(TargetConfig(world[0]), world[1], engines=eager)


def test_weights(world: tuple[str, str], tmp_path: Path) -> None:
    for weight in (math.inf, math.nan, 0.0, -1.0):
        with pytest.raises(UserError, match="is no weight"):
            weighted_sources({world[1]: weight}, config_key="data.train")
    data = DraftDataModule(TargetConfig(world[0]), {world[1]: 0.01}, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.train=.* leaves no conversation: so small a part of 12 is none. Fix: raise the weights"):
        data.corpus.dataset("train")


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("regenerate", ["--output", "OUT/a.jsonl", "--batch_size", "0"], "batch_size=0 is below 1"),
        ("regenerate", ["--output", "OUT/a.jsonl", "--limit", "-1"], "limit=-1 is below 1"),
        ("regenerate", ["--output", "OUT/a.jsonl", "--temperature", "-1"], "temperature=-1.0 is no temperature"),
        ("regenerate", ["--output", "OUT/a.jsonl", "--max_new_tokens", "0"], "max_new_tokens=0 is below 1"),
        ("regenerate", ["--output", "OUT/a.jsonl", "--device", "cuda:99"], "device='cuda:99' is not there"),
        ("regenerate", ["--output", "OUT/a.jsonl", "--device", "tpu"], "device='tpu' is no device"),
        ("regenerate", ["--output", "OUT"], "is a folder. Fix: give a file"),
        ("show_data", ["--max_length", "0"], "max_length=0 is below 1"),
        ("show_data", ["--html", "/proc/x/y.html"], "html='/proc/x/y.html' cannot be written"),
        ("vocabulary", ["--output", "/proc/x/v.safetensors"], "output='/proc/x/v.safetensors' cannot be written"),
        ("vocabulary", ["--output", "OUT/v.safetensors", "--size", "0"], "size=0 is below 1"),
        ("vocabulary", ["--plot", "OUT"], "is a folder"),
        ("vocabulary", ["--max_bad_fraction", "2"], "max_bad_fraction=2.0 is no share"),
        ("vocabulary", ["--messages_key", "talk"], "has no talk"),
    ],
)
def test_words_of_the_commands(world: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            [
                command,
                "--target",
                world[0],
                "--input",
                world[1] if command == "regenerate" else f"[{world[1]}]",
                *[w.replace("OUT", str(tmp_path)) for w in words],
            ]
        )
    assert done.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "A", "--config", "OUT/nowhere.yaml"], "nowhere.yaml' is no configuration of a run"),
        (["-c", "A", "-c", "B"], "data.max_lenght=3 is no option"),
        (["--config"], "config=None names no file"),
        (["--config=A", "--config", "C"], "is longer than data.max_tokens=7"),  # A says max_length, C max_tokens
        (["--config", "A"], "part='9/4' is no part"),
    ],
)
def test_configurations_of_extract(world: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    (tmp_path / "A").write_text(f"data: {{target: {{path: {world[0]}}}, train: {world[1]}, max_length: 64}}\nmodel: {{aux_layers: [0, 1]}}\n")
    (tmp_path / "B").write_text("data: {max_lenght: 3}\n")
    (tmp_path / "C").write_text("trainer: {max_steps: 3}\ndata: {max_tokens: 7}\n")
    files = {"--config=A": f"--config={tmp_path}/A", "OUT/nowhere.yaml": str(tmp_path / "nowhere.yaml"), **{n: str(tmp_path / n) for n in "ABC"}}
    more = ["--output", str(tmp_path / "records"), "--part", "9/4"] if len(words) > 1 else []
    with pytest.raises(SystemExit) as done:
        main(["extract", *[files.get(word, word) for word in words], *more])
    assert done.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("model", [{}, {"aux_layers": [0, 2]}, {"family": "dflash"}, {"family": "dflash", "aux_layers": [1]}, "a draft's file"])
@pytest.mark.parametrize("on_the_command_line", [False, True])
def test_extract_captures_what_the_same_configuration_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, on_the_command_line: bool) -> None:
    """Whatever of the model decides it: aux layers, family, the file of the draft."""
    target = str(save_target(tmp_path / "target", layers=8))
    conversations = save_conversations(tmp_path / "in.jsonl", 3)
    if isinstance(model, str):
        (tmp_path / "draft.json").write_text(json.dumps({"family": "dspark"}))
        model = {"draft": str(tmp_path / "draft.json")}
    captured: list[tuple[int, ...]] = []

    def stop(folder: Path, spec: RecordSpec, **rest: Any) -> None:
        captured.append(spec.aux_layers)
        raise UserError("extract", None, "ends here", "nothing")

    monkeypatch.setattr("torchspec.data.extract.ShardWriter", stop)
    run = {"data": {"target": {"path": target}, "train": str(conversations)}, "model": {} if on_the_command_line else model}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    words = [f"--model.{name}={value}" for name, value in model.items()] if on_the_command_line else []
    with pytest.raises(SystemExit):
        main(["extract", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "records"), *words])
    assert captured == [DraftModule(TargetConfig(target), **model).aux_layers]
