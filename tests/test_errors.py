"""Errors cross processes: each of ours is pickled and comes back as it was."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from pathlib import Path

import pytest

from torchspec.errors import Shown, UserError

PACKAGE = Path(__file__).resolve().parents[1] / "torchspec"


def exceptions_of_the_package() -> list[tuple[str, str]]:
    """(module, class) of every class that ends up below Exception, by its bases' names."""
    known, found = {"Exception", "BaseException"}, []
    bases: dict[tuple[str, str], set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[module, node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    builtin = {name for name, kind in vars(__import__("builtins")).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    known |= builtin
    while new := [key for key, names in bases.items() if key not in found and names & known]:
        found += new
        known |= {name for _, name in new}
    return sorted(found)


def test_the_search_finds_them() -> None:
    names = {name for _, name in exceptions_of_the_package()}
    assert {"UserError", "GroupStopped", "StoreError", "RowError", "Refused"} <= names


@pytest.mark.parametrize(("module", "name"), exceptions_of_the_package())
def test_every_error_of_ours_unpickles(module: str, name: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    own = "__init__" in vars(kind)  # Exception's own takes anything
    needed = [p.name for p in list(inspect.signature(kind.__init__).parameters.values())[1:] if p.default is p.empty] if own else ["words"]
    error = kind(*(f"the {name}" for name in needed))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.args == error.args and vars(again) == vars(error)


def test_a_user_error_of_a_pool_arrives_as_it_was() -> None:
    error = UserError("data.max_length", [9000, None], "is longer than data.max_tokens=8192", "lower it")
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.value, again.problem, again.fix) == ("data.max_length", [9000, None], error.problem, "lower it")
    assert str(UserError.of(error.words)) == str(error) and str(UserError.of(UserError.of(error.words).words)) == str(error)


class Local:
    def __reduce__(self) -> str:
        raise TypeError("stays here")

    def __repr__(self) -> str:
        return "<of this process>"


@pytest.mark.parametrize("value", [Local(), {"a": [Local()]}, "x" * 1000])
def test_a_value_that_cannot_travel_is_shown(value: object) -> None:
    error = UserError("f", value, "is wrong", "mend it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and len(error.shown) <= 200
    assert again.value == value or again.value == Shown(error.shown)
