"""What a user's data settings may not be, beyond their types: each said by key, value and fix before anything is read or started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

from torchspec.engines.engine import EngineConfig, OnPolicy
from torchspec.engines.table import ANSWERER, ENGINES, EngineKind, capturing, find_engine
from torchspec.errors import UserError

Validate = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


def check_sizes(
    *,
    max_length: int,
    max_tokens: int,
    max_rows: int | None,
    packs_per_step: int,
    prefetch_packs: int,
    min_supervised_tokens: int,
    num_proc: int | None,
    seed: int,
    max_bad_fraction: float,
) -> None:
    """Numbers that contradict themselves or each other.

    Raises:
        UserError: the first one.
    """
    positive = {
        "max_length": max_length,
        "packs_per_step": packs_per_step,
        "prefetch_packs": prefetch_packs,
        "min_supervised_tokens": min_supervised_tokens,
        "max_rows": 1 if max_rows is None else max_rows,
        "num_proc": 1 if num_proc is None else num_proc,
    }
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"data.{name}", value, "is below 1", "use 1 or more")
    if seed < 0:
        raise UserError("data.seed", seed, "is negative", "use 0 or more")
    if max_length > max_tokens:
        problem = f"is longer than data.max_tokens={max_tokens}: a conversation must fit into a pack"
        raise UserError("data.max_length", max_length, problem, "lower it or raise data.max_tokens")
    if not 0.0 <= max_bad_fraction < 1.0:
        raise UserError("data.max_bad_fraction", max_bad_fraction, "is no share", "use a number from 0 up to, but not including, 1")


def check_engine(*, engine: str, engines: EngineConfig, on_policy: OnPolicy | None, records: str | None, tee: str | None) -> None:
    """Where records come from, and what becomes of them.

    Raises:
        UserError: there is no such engine, or settings exclude each other.
    """
    kind = find_engine(engine)
    answered_apart = on_policy is not None and on_policy.answer_workers > 0
    _check_options(engine, kind, engines, answered_apart=answered_apart)
    if on_policy is not None and kind.worker is None:
        raise UserError("data.engine", engine, "cannot answer prompts (data.on_policy)", "use an engine that runs the target")
    if on_policy is not None and not answered_apart and not kind.answers:
        fix = f"use {' or '.join(capturing(answers=True))}, or data.on_policy.answer_workers"
        raise UserError("data.engine", engine, "cannot answer prompts (data.on_policy)", fix)
    if kind.worker is None and records is None:
        raise UserError("data.records", records, f"is missing: engine {engine} reads records", "give the folder that main.py extract wrote")
    if kind.worker is not None and records is not None:
        raise UserError("data.records", records, f"has no meaning for engine {engine}", "set data.engine: replay")
    if tee is not None and (kind.worker is None or on_policy is not None):
        why = f"engine {engine}: they are on disk already" if kind.worker is None else "data.on_policy: the target answers anew each time"
        raise UserError("data.tee", tee, f"keeps records of no use with {why}", "leave it out")


def _check_options(engine: str, kind: EngineKind, engines: EngineConfig, *, answered_apart: bool) -> None:
    """Refuse options of ``data.engines`` that this engine does not obey."""
    unused = dict(kind.unused)
    if not kind.versions and not (answered_apart and ENGINES[ANSWERER].versions):
        unused["allow_unknown_version"] = "leave it out: any release is taken"
    if not kind.deterministic:
        unused["deterministic"] = f"leave it out, or use {' or '.join(name for name in capturing(deterministic=True) if ENGINES[name].worker)}"
    defaults = EngineConfig()
    for option in fields(EngineConfig):
        given = getattr(engines, option.name)
        if option.name in unused and given != getattr(defaults, option.name):
            raise UserError(f"data.engines.{option.name}", given, f"has no meaning for engine {engine}", unused[option.name])


def check_media(*, media: str, image_positions: str, engine: str, on_policy: OnPolicy | None) -> None:
    """What images exclude.

    Raises:
        UserError: settings that exclude each other.
    """
    if media != "engine":
        if image_positions != "index":
            raise UserError("data.image_positions", image_positions, "has no meaning without images", "set data.media to engine, or leave it out")
        return
    if not find_engine(engine).images:
        fix = f"use one of {', '.join(capturing(images=True))}, or media placeholder"
        raise UserError("data.media", media, f"does not work with engine {engine}: it is not given images", fix)
    if on_policy is not None:
        raise UserError("data.media", media, "does not work with data.on_policy: prompts that are answered in the run have no images", "leave one of them out")


def validation_sets(given: Validate) -> dict[str, str | Sequence[str] | None]:
    """Validation data by stage: ``validate``, or ``validate/NAME`` for each named set.

    Raises:
        UserError: a name that cannot be part of a metric's.
    """
    if not isinstance(given, Mapping):
        return {"validate": given}
    for name in given:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError("data.validate", name, "is no name for metrics", "use letters, digits, dots, dashes and underscores")
    return {f"validate/{name}": sources for name, sources in given.items()}
