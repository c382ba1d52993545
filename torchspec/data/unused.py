"""Keys of rows that nothing here has a use for: counted while rows are read, and told by name in one line a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

METADATA = frozenset(
    "id ids _id uid uuid idx index row_id conversation_id prompt_id question_id message_id source sources dataset dataset_name subset split category "
    "categories task task_type task_name topic domain language lang model model_name generator license url hash timestamp created created_at date version tags "
    "meta metadata __index_level_0__ turn num_turns".split()
)
"""Names that say where a row is from, not what it means; of messages as well."""
NULL = ": null"
"""End of a name for a value that is used, and may be one that was never written: tables fill rows up with null."""
_NAMED = 20
"""Names told in one line."""


class Unused:
    """Counts of rows by source and key.

    Args:
        counts: of an earlier part of the work.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.counts = {source: dict(keys) for source, keys in (counts or {}).items()}

    def add(self, source: str, keys: Iterable[str]) -> None:
        """Count the keys of one row that are not used.

        Args:
            source: as the user named it.
            keys: as a row has them; of messages ``messages[].key``.
        """
        for key in keys:
            counted = self.counts.setdefault(source, {})
            counted[key] = counted.get(key, 0) + 1

    def lines(self, config_key: str) -> list[str]:
        """A line a source that has any."""
        return [f"{config_key}: {source}: {told(_by_number(keys), keys)}" for source, keys in self.counts.items()]


def told(keys: Sequence[str], counts: Mapping[str, int] | None = None) -> str:
    """The clauses on keys that are not used; "" without one.

    Args:
        keys: in the order in which they are named.
        counts: in how many rows each is; None for those of one row.
    """

    def named(chosen: Iterable[str]) -> str:
        rows = {key: "" if counts is None else f" ({counts[key]} row{_s(counts[key])})" for key in chosen}
        return _some([key.removesuffix(NULL) + number for key, number in rows.items()])

    nulls = [key for key in keys if key.endswith(NULL)]
    plain = [key for key in keys if key.rpartition(".")[2] not in METADATA and key not in nulls]
    known = [key for key in keys if key not in plain and key not in nulls]
    parts = []
    if plain:
        parts.append(f"keys that are not used: {named(plain)}")
    if nulls:
        kept = "are kept, and trained (leave out those that only a table of many rows put there)"
        advice = "" if counts is None else f" {kept}"
        parts.append(f"arguments that are null{advice}: {named(nulls)}")
    if known:
        parts.append(f"metadata that is not used: {_some(known)}")
    return "; ".join(parts)


def _by_number(keys: Mapping[str, int]) -> list[str]:
    return sorted(keys, key=lambda key: (-keys[key], key))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _s(count: int) -> str:
    return "" if count == 1 else "s"
