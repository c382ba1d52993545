"""Which family a draft is of: by name, by its architecture file, by its files, by its checkpoint.

A name is one of the table's, or ``package.module:NAME`` of an object that fulfils ``family.Family``: a family of your own needs no line here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from torchspec.errors import UserError
from torchspec.models.family import Family
from torchspec.named import find_named
from torchspec.paths import home

FAMILIES: dict[str, str] = {
    "eagle3": "torchspec.models.eagle3.family:EAGLE3",
    "dflash": "torchspec.models.blocks.family:DFLASH",
    "dspark": "torchspec.models.blocks.family:DSPARK",
    "dflash2": "torchspec.models.blocks.family:DFLASH2",
}
"""Name → where the family is."""
DEFAULT = "eagle3"
"""Of a draft that nothing says otherwise of, and of checkpoints that are older than this table."""


def family_named(name: str, *, field: str = "model.family") -> Family:
    """The family of a name.

    Args:
        name: of the table, or ``package.module:NAME``.
        field: for errors.

    Raises:
        UserError: there is none.
    """
    return find_named(FAMILIES.get(name, name), {}, Family, field=field, offered=FAMILIES)  # type: ignore[type-abstract]


def family_of(described: Mapping[str, Any], *, where: str, given: Family | None = None) -> Family:
    """The family whose drafts have such a ``config.json``.

    Args:
        described: the file's content.
        where: for errors.
        given: the family that it should be; None tries the table's.

    Raises:
        UserError: it is none of them.
    """
    tried = [family_named(name) for name in FAMILIES] if given is None else [given]
    found = next((family for family in tried if family.recognises(described)), None)
    if found is None:
        said = "is a speculators draft of type" if "speculators_model_type" in described else "is of architecture"
        kind = described.get("speculators_model_type") or described.get("architectures") or []
        raise UserError("draft", where, f"{said} {kind}", f"give a draft of {' or '.join(family.title for family in tried)}")
    return found


def files_beside() -> list[str]:
    """What drafts of the table's families may hold beside configuration and tensors."""
    return sorted({name for family in map(family_named, FAMILIES) for name in family.beside})


@dataclass(frozen=True)
class DraftFile:
    """``model.draft``: an architecture as the user wrote it."""

    family: str | None
    """Its ``family``."""
    given: dict[str, Any]
    """All other fields."""
    where: str
    """``model.draft (FILE)``, for errors."""

    @classmethod
    def read(cls, path: str | None) -> DraftFile:
        """A file, or nothing given.

        Raises:
            UserError: it is missing or no JSON object.
        """
        if path is None:
            return cls(None, {}, "model.draft ()")
        file = home(Path(path))
        if not file.is_file():
            raise UserError("model.draft", path, "does not exist", "give a JSON file such as configs/drafts/eagle3.json")
        try:
            given = json.loads(file.read_text())
        except ValueError as error:
            raise UserError("model.draft", path, f"is no JSON ({error})", "correct the file") from error
        if not isinstance(given, dict):
            raise UserError("model.draft", path, "is no JSON object", "give fields of a draft by name, as in configs/drafts/eagle3.json")
        family = given.pop("family", None)
        if family is not None and not isinstance(family, str):
            raise UserError(f"model.draft ({file.name}: family)", family, "is no name", f"use one of {', '.join(FAMILIES)}")
        return cls(family, given, f"model.draft ({file.name})")


def chosen(*, family: str | None, draft: DraftFile, started: str | None = None) -> str:
    """The name of a run's family.

    Args:
        family: ``model.family``.
        draft: ``model.draft``.
        started: the family of ``model.start_from``.

    Raises:
        UserError: they contradict each other.
    """
    named = [(field, name) for field, name in (("model.family", family), (f"{draft.where[:-1]}: family)", draft.family)) if name is not None]
    for field, name in named:
        for other in (started, named[0][1]):
            if other is not None and name != other:
                raise UserError(field, name, f"contradicts {other}" + (" of model.start_from" if other is started else ""), "give one of the two")
    return named[0][1] if named else started or DEFAULT


def options_of(family: Family, given: Mapping[str, Any] | None, **named: Any) -> Any:
    """Training options of a family.

    Args:
        family: whose.
        given: ``model.options``.
        named: options that are options of the module as well, such as ``unroll_steps``; None where they were not given.

    Raises:
        UserError: one that the family does not have, of another type, or given twice.
    """
    from jsonargparse import ArgumentParser

    known = get_type_hints(family.options)
    names = [f.name for f in fields(family.options)]
    for name, value in (given or {}).items():
        if name not in names:
            raise UserError(f"model.options.{name}", value, f"is no option of {family.title}", f"it has {', '.join(names) or 'none'}")
        if named.get(name) is not None:
            raise UserError(f"model.options.{name}", value, f"is given as model.{name} too", "give one of the two")
    for name, value in named.items():
        if value is not None and name not in names:
            raise UserError(
                f"model.{name}", value, f"is no option of {family.title}", "leave it out" + (f"; model.options has {', '.join(names)}" if names else "")
            )
    values = {**(given or {}), **{name: value for name, value in named.items() if value is not None}}
    for name, value in values.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=known[name])
        try:
            values[name] = parser.parse_object({name: value})[name]
        except Exception as error:
            field = f"model.{name}" if named.get(name) is not None else f"model.options.{name}"
            raise UserError(field, value, f"is no {getattr(known[name], '__name__', known[name])}", "correct it") from error
    return family.options(**values)


def with_family(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a checkpoint with ``family`` and ``options``, which older ones lack: those are of the default family, with its options beside."""
    if "family" in facts or "unroll_steps" not in facts or "step_weights" not in facts:
        return dict(facts)
    left = {name: value for name, value in facts.items() if name not in ("unroll_steps", "step_weights")}
    return {**left, "family": DEFAULT, "options": {name: facts[name] for name in ("unroll_steps", "step_weights")}}


def plain(options: Any) -> dict[str, Any]:
    """Options as plain values, for checkpoints."""
    return asdict(options)
