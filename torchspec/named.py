"""What a user names: a word of one of our tables, or ``package.module:NAME`` of a package of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import TypeVar

from torchspec.errors import UserError
from torchspec.reasons import reason_of

T = TypeVar("T")


def find_named(name: str, table: Mapping[str, T], kind: type[T], *, field: str, offered: Collection[str] | None = None) -> T:
    """What is meant by a name.

    Args:
        name: as the user typed it.
        table: what we have, by name.
        kind: of everything in it; what stands under a name of the user's own must be one too.
        field: the option.
        offered: names that an error recommends; None for all of the table.

    Raises:
        UserError: there is nothing of that name, its module does not import, or it is something else.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        words = ", ".join(table if offered is None else offered)
        raise UserError(field, name, "is unknown", f"use one of {words}, or package.module:NAME")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(field, name, "does not name an object of a module", "write package.module:NAME")
    try:
        found = getattr(import_module(module), attribute, None)
    except Exception as error:  # a user's module may raise anything
        fix = "mend it, or install its package (or put its folder on PYTHONPATH) wherever this runs"
        raise UserError(field, name, f"is in a module that does not import ({reason_of(error)})", fix) from error
    if not isinstance(found, kind):
        fix = f"give the name of an object of {kind.__module__}.{kind.__name__}"
        if found is None:
            raise UserError(field, name, f"is not there: {module} has no {attribute}", fix)
        lacking = [member for member in _members(kind) if not hasattr(found, member)]
        raise UserError(
            field, name, f"is a {type(found).__name__} where {kind.__name__} is expected" + (f": it lacks {', '.join(lacking)}" if lacking else ""), fix
        )
    return found


def _members(kind: type) -> list[str]:
    """What an object needs for a protocol; nothing for a class, of which it has to be."""
    if not getattr(kind, "_is_protocol", False):
        return []
    return sorted(name for name in {*kind.__annotations__, *vars(kind)} if not name.startswith("_"))
