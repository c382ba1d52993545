"""What a user's data settings may not be, beyond their types: each said by key, value and fix before anything is read or started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torchspec.engines.engine import ANSWERING, EngineConfig, OnPolicy
from torchspec.errors import UserError

SEES = ("transformers", "vllm", "replay")
"""Engines that are given images, or need none."""
EngineName = Literal["transformers", "vllm", "vllm_remote", "replay"]
"""What ``data.engine`` may be."""
ENGINES: tuple[str, ...] = get_args(EngineName)
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
        UserError: settings that exclude each other.
    """
    if engine not in ENGINES:
        raise UserError("data.engine", engine, "is unknown", f"use one of {', '.join(ENGINES)}")
    if engine.startswith("vllm") and engines.attn_implementation != EngineConfig.attn_implementation:
        fix = "leave it out; vLLM's own is data.engines.engine_args: {attention_backend: ...}" if engine == "vllm" else "leave it out; the server has its own"
        raise UserError("data.engines.attn_implementation", engines.attn_implementation, f"has no meaning for engine {engine}", fix)
    if on_policy is not None and not on_policy.answer_workers and engine not in ANSWERING:
        raise UserError("data.engine", engine, "cannot answer prompts (data.on_policy)", f"use {' or '.join(ANSWERING)}, or data.on_policy.answer_workers")
    if on_policy is not None and engine == "replay":
        raise UserError("data.engine", engine, "cannot answer prompts (data.on_policy)", "use an engine that runs the target")
    if (engine == "replay") != (records is not None):
        problem = "is missing: engine replay reads records" if records is None else f"has no meaning for engine {engine}"
        raise UserError("data.records", records, problem, "give the folder that main.py extract wrote" if records is None else "set data.engine: replay")
    if tee is not None and (engine == "replay" or on_policy is not None):
        why = "engine replay: they are on disk already" if engine == "replay" else "data.on_policy: the target answers anew each time"
        raise UserError("data.tee", tee, f"keeps records of no use with {why}", "leave it out")


def check_media(*, media: str, image_positions: str, engine: str, on_policy: OnPolicy | None) -> None:
    """What images exclude.

    Raises:
        UserError: settings that exclude each other.
    """
    if media != "engine":
        if image_positions != "index":
            raise UserError("data.image_positions", image_positions, "has no meaning without images", "set data.media to engine, or leave it out")
        return
    if engine not in SEES:
        raise UserError(
            "data.media", media, f"does not work with engine {engine}: it is not given images", f"use one of {', '.join(SEES)}, or media placeholder"
        )
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
