"""A published draft read back, from a directory, a file or a hub id: its ``config.json`` says the family, which reads the rest.

Keys are matched exactly: a missing or unknown one is an error. The exporter's self-check reads its own output with this module.
"""

from __future__ import annotations

from dataclasses import replace

from torchspec.errors import UserError
from torchspec.models.export.draft_files import locate_draft, read_description, read_draft_tensors
from torchspec.models.families import family_named, family_of, files_beside
from torchspec.models.family import Draft, Family
from torchspec.models.ops.not_finite import no_longer_numbers, not_finite
from torchspec.target import Target


def import_draft(source: str, target: Target, *, revision: str | None = None, family: Family | None = None) -> Draft:
    """Read a published draft of a target.

    Args:
        source: a directory, one file of weights with its ``config.json`` beside it, or a hub id.
        target: the model it drafts for; gives what may be left out.
        revision: branch, tag or commit of a hub id.
        family: of the draft; None finds it among the table's.

    Raises:
        UserError: nothing there, another kind of draft, missing or unknown keys, or sizes that do not fit the target.
    """
    folder, file = locate_draft(source, revision=revision, beside=family.beside if family is not None else files_beside())
    described = read_description(folder)
    family = family_of(described, where=str(folder), given=family)
    tensors = read_draft_tensors(folder, file)
    if wrong := not_finite(tensors.items()):
        raise UserError("draft", str(folder), f"is of no use: its {no_longer_numbers(wrong)}", "use another draft, or an earlier checkpoint of it")
    return replace(family.read(described, tensors, target, folder=folder), family=family, described=described)


def family_at(source: str, *, family: str | None = None) -> Family:
    """The family of a published draft, of which nothing but ``config.json`` is read.

    Args:
        source: a directory or a hub id.
        family: its name; None finds it among the table's.

    Raises:
        UserError: nothing there, or another kind of draft.
    """
    given = None if family is None else family_named(family, field="family")
    folder, _ = locate_draft(source, weights=False)
    return family_of(read_description(folder), where=source, given=given)
