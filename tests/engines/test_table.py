"""One table says what an engine can do, and a user's own engine is found like ours."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

import torchspec
from torchspec.data.checks import check_engine, check_media
from torchspec.engines.engine import EngineConfig, OnPolicy
from torchspec.engines.table import ANSWERER, ENGINES, NOT_RUN, EngineKind, capturing, find_engine
from torchspec.errors import UserError

CHOOSY = EngineKind(worker="nowhere:Engine", deterministic=False, versions=("1.2.3",), package="json", unused={"threads": "leave it out"})
NOT_A_KIND = {"worker": "nowhere:Engine"}


def check(engine: str, engines: EngineConfig | None = None, on_policy: OnPolicy | None = None, records: str | None = None, tee: str | None = None) -> None:
    check_engine(engine=engine, engines=engines or EngineConfig(), on_policy=on_policy, records=records, tee=tee)


@pytest.mark.parametrize("name", ENGINES)
def test_every_entry_names_a_class_and_options_that_exist(name: str) -> None:
    kind = ENGINES[name]
    assert kind.captures or kind.answers
    assert kind.unused.keys() <= {option.name for option in fields(EngineConfig)}
    if kind.worker is not None:
        module, _, attribute = kind.worker.partition(":")
        built = getattr(importlib.import_module(module), attribute)
        assert all(callable(getattr(built, method)) for method in ("start", "room", "submit", "cancel", "poll", "stats", "close"))


def test_those_that_only_answer_are_not_offered() -> None:
    assert ANSWERER not in capturing() and capturing(answers=True) == ["vllm", "vllm_remote"]
    with pytest.raises(UserError, match=r"data\.engine='vllm_answers' only answers"):
        find_engine(ANSWERER)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "is unknown. Fix: use one of transformers, vllm, vllm_remote, sglang, sglang_remote, replay, or package.module:NAME"),
        ("no_such_package.engine:KIND", "is in a module that does not import (the package no_such_package is not installed). Fix: "),
        (f"{__name__}:MISSING", f"is not there: {__name__} has no MISSING. Fix: give the name of an object of torchspec.engines.table.EngineKind"),
        (f"{__name__}:NOT_A_KIND", "is a dict where EngineKind is expected"),
        (f"{__name__}:", "does not name an object of a module"),
        ("../engine.py:KIND", "does not name an object of a module"),
    ],
)
def test_a_name_that_is_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        find_engine(name)
    assert caught.value.field == "data.engine" and caught.value.value == name and "\n" not in str(caught.value)


def test_an_engine_of_the_users_own_is_held_to_what_its_kind_says() -> None:
    name = f"{__name__}:CHOOSY"
    assert find_engine(name) is CHOOSY
    check(name)
    check(name, EngineConfig(allow_unknown_version=True))
    for engines, said in (
        (EngineConfig(threads=3), f"data.engines.threads=3 has no meaning for engine {name}. Fix: leave it out."),
        (
            EngineConfig(deterministic=True),
            f"data.engines.deterministic=True has no meaning for engine {name}. Fix: leave it out, "
            "or use transformers or vllm or vllm_remote or sglang or sglang_remote",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check(name, engines)
    with pytest.raises(UserError, match=r"cannot answer prompts .* use vllm or vllm_remote, or data\.on_policy\.answer_workers"):
        check(name, on_policy=OnPolicy())
    check(name, on_policy=OnPolicy(answer_workers=1))
    with pytest.raises(UserError, match=r"is not given images\. Fix: use one of transformers, vllm, replay"):
        check_media(media="engine", image_positions="index", engine=name, on_policy=None)
    CHOOSY.check_version("1.2.3.post1", allow_unknown=False)
    CHOOSY.check_version("2.0", allow_unknown=True)
    for version in ("1.2.30", "1.2"):
        with pytest.raises(UserError, match=r"json='.*' is not among the versions this was run with \(1\.2\.3\.\*\)"):
            CHOOSY.check_version(version, allow_unknown=False)


@pytest.mark.parametrize("name", sorted(NOT_RUN))
def test_an_engine_that_was_not_run_is_refused_with_why(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}' is no engine yet .*docs/engines.md.*use one of transformers, vllm"):
        find_engine(name)


def test_an_option_without_meaning_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.engines\.allow_unknown_version=True has no meaning for engine transformers"):
        check("transformers", EngineConfig(allow_unknown_version=True))
    check("transformers", EngineConfig(allow_unknown_version=True), on_policy=OnPolicy(answer_workers=1))
    check("vllm", EngineConfig(allow_unknown_version=True))


def test_no_other_file_decides_by_an_engines_name() -> None:
    """A new engine is its folder and one entry of the table: nobody else compares or looks up names of engines."""
    package = Path(torchspec.__file__).parent
    asks = re.compile(r"""engine\w*\.startswith\(|\bengine(_name)? (==|!=|in|not in) ["(\[A-Z]|ENGINES\["(?!(vllm|sglang)"\]\.check)""")
    own = {"engines/table.py"}
    regenerate = {"commands/regenerate.py", "data/regenerate.py"}  # its engines answer in this process: another table's
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if asks.search(file.read_text())}
    assert found <= own | regenerate, found
