"""``~`` is the home folder in every option of every command, whoever reads the value; an option that is added is looked at here by itself."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchspec import cli
from torchspec.paths import expand_all, home

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def left(value: Any) -> Iterator[str]:
    """Texts of a parsed value that still begin with ``~``."""
    if isinstance(value, dict) or type(value).__name__ == "Namespace":
        for name, entry in dict(value if isinstance(value, dict) else vars(value)).items():
            yield from left(name)
            yield from left(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from left(entry)
    elif isinstance(value, str | Path) and str(value).startswith("~"):
        yield str(value)


def test_texts_at_home_are_found_in_tables_lists_and_names_and_others_stay(own_home: Path) -> None:
    given = {"~/a": ["~/b", {"c": "~"}], "d": Path("~/d"), "e": "a~b", "f": "~", "g": "~x\n/ text", "template_args": {"system": "~/hello"}, "n": 1, "o": None}
    got = expand_all(given)
    h = str(own_home)
    assert got == {
        f"{h}/a": [f"{h}/b", {"c": h}],
        "d": own_home / "d",
        "e": "a~b",
        "f": h,
        "g": "~x\n/ text",
        "template_args": {"system": "~/hello"},
        "n": 1,
        "o": None,
    }
    assert home("~nobody-of-this-name/x") == "~nobody-of-this-name/x"


FUNCTIONS = {name: import_module(f"torchspec.commands.{name}") for name in cli.COMMANDS if name != "extract"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_of_every_command_is_at_home(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function: Callable[..., Any] = getattr(FUNCTIONS[name], name)
    got: dict[str, Any] = {}

    @wraps(function)
    def recorder(**options: Any) -> None:
        got.update(options)

    monkeypatch.setattr(FUNCTIONS[name], name, recorder)
    words = []
    for option in inspect.signature(function).parameters.values():
        kind = str(option.annotation)
        if "Literal" in kind or "Dtype" in kind:
            continue
        if "str" in kind and option.name != "template_args":
            words.append(f"--{option.name}=" + (json.dumps({"a": "~/x"}) if kind.startswith("dict") else "~/x"))
    cli.main([name, *words])
    assert len([value for value in got.values() if "/home/x" in str(value)]) == len(words) and not list(left(got))


def described(function: Callable[..., Any]) -> dict[str, str]:
    """The words of a docstring on each argument."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(function) or "").split("Args:")[-1].splitlines():
        if match := re.match(r"    (\w[\w, ]*): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name and line.startswith("      "):
            found[name] += " " + line.strip()
    return found


def options_of(kind: type) -> list[str]:
    return [name for name, option in inspect.signature(kind).parameters.items() if "str" in str(option.annotation) and "Literal" not in str(option.annotation)]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_every_option_of_a_run_is_at_home_in_a_file_and_behind_an_equals_sign(command: str, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    seen: list[Any] = []

    def stop(self: Any) -> None:
        seen.append(self.config[command])
        raise SystemExit(0)

    monkeypatch.setattr(LightningCLI, "instantiate_classes", stop)
    callbacks = {
        "torchspec.callbacks.export.ExportDraft": "directory",
        "torchspec.callbacks.acceptance.AcceptanceLength": "serve_prompts",
        "torchspec.callbacks.last.LastCheckpoint": "dirpath",
        "lightning.pytorch.callbacks.ModelCheckpoint": "dirpath",
    }
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "~/x", "name": "m"}}
    described = {
        "trainer": {
            "default_root_dir": "~/x",
            "logger": logger,
            "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {"dirpath": "~/x"}},
            "callbacks": [{"class_path": path, "init_args": {option: "~/x"}} for path, option in callbacks.items()],
        },
        "data": {
            "target": {"path": "~/x"}, "train": {"~/x": 1.0}, "validate": {"a": ["~/x"]}, "records": "~/x", "tee": "~/x", "cache_dir": "~/x",
            "engines": {"engine_args": {"download_dir": "~/x", "nested": ["~/x"]}}, "store": {"shm_dir": "~/x"},
        },
        "model": {"draft": "~/x", "start_from": "~/x"},
        "ckpt_path": "~/x",
    }  # fmt: skip
    (own_home / "run.yaml").write_text(json.dumps(described))
    with pytest.raises(SystemExit):
        cli.main([command, "--config=~/run.yaml"])
    with pytest.raises(SystemExit):
        cli.main(
            [command, "--config", str(own_home / "run.yaml"), "--ckpt_path=~/y", "--data.records=~/y", "--trainer.default_root_dir=~/y", "--data.train=~/y"]
        )
    first, second = (SimpleNamespace(**vars(one)) for one in seen)
    assert not list(left(vars(first))) and not list(left(vars(second)))
    assert str(first.as_dict() if hasattr(first, "as_dict") else first).count(f"{own_home}/x") >= 18
    assert second.ckpt_path == second.data.records == second.data.train == f"{own_home}/y"


AT_HOME = {
    "TargetConfig": {"path"},
    "StoreConfig": {"shm_dir"},
    "EngineConfig": set(),
    "DraftModule": {"draft", "start_from"},
    "DraftDataModule": {"train", "validate", "records", "tee", "cache_dir"},
    "ExportDraft": {"directory"},
    "AcceptanceLength": {"serve_prompts"},
    "LastCheckpoint": {"dirpath"},
}
"""Options that name a file or a folder, of what may be built from Python. The test below finds them by name and help."""
NO_PATHS = {
    "engine",
    "family",
    "options",
    "walk",
    "messages_key",
    "revision",
    "budget",
    "rdma_devices",
    "master",
    "metadata",
    "host",
    "listen",
    "attn_implementation",
    "target_name",
    "loss",
    "engine_args",
}
NO_PATHS |= {"engine_args", "template_args", "serve_engine_args", "devices"}


def built() -> list[type]:
    from torchspec.callbacks.acceptance import AcceptanceLength
    from torchspec.callbacks.export import ExportDraft
    from torchspec.callbacks.last import LastCheckpoint
    from torchspec.data.datamodule import DraftDataModule
    from torchspec.engines.engine import EngineConfig
    from torchspec.models.module import DraftModule
    from torchspec.target import TargetConfig
    from torchspec.transfer.store import StoreConfig

    return [TargetConfig, StoreConfig, EngineConfig, DraftModule, DraftDataModule, ExportDraft, AcceptanceLength, LastCheckpoint]


def test_every_text_option_of_what_is_built_is_known_as_a_path_or_not() -> None:
    """A new one fails here until it stands in one of the two tables."""
    for kind in built():
        assert set(options_of(kind)) - NO_PATHS <= AT_HOME[kind.__name__], kind


def test_what_is_built_from_python_is_at_home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchspec.callbacks.export import ExportDraft
    from torchspec.callbacks.last import LastCheckpoint
    from torchspec.data.corpus import default_cache_dir
    from torchspec.data.sources import find_sources
    from torchspec.models.export.draft_files import locate_draft
    from torchspec.models.training.checkpoint import standing
    from torchspec.target import TargetConfig
    from torchspec.transfer.store import StoreConfig

    (own_home / "draft").mkdir()
    (own_home / "rows.jsonl").write_text("{}\n")
    assert TargetConfig("~/t").path == f"{own_home}/t" and TargetConfig("org/name").path == "org/name"
    assert StoreConfig(shm_dir="~/s").shm_dir == f"{own_home}/s"
    assert ExportDraft("~/draft").folder(SimpleNamespace(default_root_dir=".")) == own_home / "draft"  # type: ignore[arg-type]
    assert LastCheckpoint(dirpath="~/c").dirpath == f"{own_home}/c"
    assert locate_draft("~/draft")[0] == own_home / "draft" and standing(Path("~/c.ckpt")) == own_home / "c.ckpt"
    assert len(find_sources("~/rows.jsonl", config_key="input")) == 1
    assert default_cache_dir() == own_home / ".cache" / "torchspec" or "XDG_CACHE_HOME" in __import__("os").environ
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert default_cache_dir() == own_home / "elsewhere" / "torchspec"


def test_extract_is_at_home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jsonargparse import ArgumentParser

    seen: list[Any] = []

    def stop(self: Any, given: Any) -> None:
        seen.append(given)
        raise SystemExit(0)

    monkeypatch.setattr(ArgumentParser, "instantiate_classes", stop)
    (own_home / "run.yaml").write_text(json.dumps({"data": {"target": {"path": "~/t"}, "train": ["~/a", "~/b"], "cache_dir": "~/c"}}))
    with pytest.raises(SystemExit):
        cli.main(["extract", "--config=~/run.yaml", "--output=~/records"])
    (given,) = seen
    assert not list(left(vars(given))) and given.output == f"{own_home}/records" and given.data.train == [f"{own_home}/a", f"{own_home}/b"]


@pytest.mark.parametrize("file", [p for p in sorted((ROOT / "benchmarks").glob("*.py")) if "add_argument" in p.read_text()], ids=lambda p: p.name)
def test_programs_beside_the_package_are_at_home(file: Path) -> None:
    text = file.read_text()
    takes_text = re.search(r"add_argument\(\"(--)?(target|data|folder|output|save|states|lines)\"", text)
    assert not takes_text or "expand_all(parser.parse_args())" in text
