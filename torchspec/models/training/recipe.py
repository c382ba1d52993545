"""How a draft was trained, as plain values: what a checkpoint says of it (``weights_only=True`` loads it) and the model card tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchspec.models.ops.loss_formulas import LossWeights


def recipe(*, loss: LossWeights, init: str, start_from: str | None, trainer: Any | None, train_head: bool = True) -> dict[str, Any]:
    """Facts of a run.

    Args:
        loss: which losses.
        init: ``model.init``.
        start_from: ``model.start_from``; it overrules ``init``.
        train_head: ``model.train_head``.
        trainer: gives optimizers, schedules and the datamodule's own description, as far as they are there.
    """
    facts: dict[str, Any] = {"loss": {name: weight for name, weight in asdict(loss).items() if weight}}
    facts["start"] = {"init": init} if start_from is None else {"weights": public_name(start_from)}
    if not train_head:
        facts["head"] = "frozen"
    for optimizer in getattr(trainer, "optimizers", [])[:1]:
        facts["optimizer"] = {"name": type(optimizer).__name__, "groups": _groups(optimizer)}
        more = _plain(settings := getattr(optimizer, "settings", {}), list(settings))
        if more:
            facts["optimizer"]["settings"] = more
    for config in getattr(trainer, "lr_scheduler_configs", [])[:1]:
        schedule = config.scheduler
        facts["schedule"] = {"name": type(schedule).__name__, **_plain(vars(schedule), ("warmup_steps", "total_steps", "final", "decay"))}
    for callback in getattr(trainer, "callbacks", []):
        if getattr(callback, "averages_weights", False):
            facts["average"] = {"name": type(callback).__name__, **_plain(vars(callback), ("horizon", "start"))}
    data = getattr(getattr(trainer, "datamodule", None), "described", None)
    if data is not None:
        facts["data"] = {**data, "train": [[public_name(name), weight] for name, weight in data["train"]]}
    return facts


def public_name(name: str) -> str:
    """A hub id as it is; of a local file or folder the name alone, because what tells it may be published."""
    return Path(name).name if Path(name).expanduser().exists() else name


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Settings of each different group of parameters; ``lr`` is the peak, which a schedule multiplies."""
    found: list[dict[str, Any]] = []
    silent = {"params", "initial_lr", "fused", "foreach", "differentiable", "capturable", "decoupled_weight_decay"}  # how it is computed, not what
    for group in optimizer.param_groups:
        settings = {**group, "lr": group.get("initial_lr", group["lr"])}
        plain = _plain(settings, [name for name in settings if name not in silent])
        if plain not in found:
            found.append(plain)
    return found


def _plain(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those that say something, without types of torch's or Python's own."""
    numbers = {name: values[name].item() if isinstance(values[name], Tensor) else values[name] for name in names if name in values}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}
    return {name: value for name, value in kept.items() if isinstance(value, int | float | str | list) and value is not False}


def rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as lines of a table; those that an older checkpoint lacks are left out."""
    found = []
    if "loss" in facts:
        found.append(("loss", ", ".join(f"{name} {weight:g}" for name, weight in facts["loss"].items())))
    if "start" in facts:
        start = facts["start"]
        words = {
            "target": "the target's head and norm where the hidden sizes are equal",
            "target_head": "random but for the target's head, where the hidden sizes are equal",
            "random": "random",
        }
        found.append(("started from", f"weights of {start['weights']}" if "weights" in start else words[start["init"]]))
    if "head" in facts:
        found.append(("head", "kept as it started"))
    if "optimizer" in facts:
        optimizer = facts["optimizer"]
        groups = "; ".join(_settings(group) for group in [*optimizer["groups"], optimizer.get("settings", {})] if group)
        found.append(("optimizer", f"{optimizer['name']}: {groups}"))
    if "schedule" in facts:
        found.append(("schedule", f"{facts['schedule']['name']}: {_settings({k: v for k, v in facts['schedule'].items() if k != 'name'})}"))
    if "average" in facts:
        average = facts["average"]
        settings = _settings({k: v for k, v in average.items() if k != "name"})
        found.append(("weights", f"{average['name']}: {settings}"))
    if "data" in facts:
        data = facts["data"]
        sources = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in data["train"])
        count = f", {data['conversations']:,} conversations" if data.get("conversations") is not None else ""
        answers = ", answered anew by the target" if data.get("on_policy") else ""
        found.append(("data", sources + count + answers))
        found.append(("tokens", f"at most {data['max_length']:,} a conversation, {data['tokens_per_step']:,} an optimizer step"))
    return found


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {' '.join(map(_short, value)) if isinstance(value, list) else _short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
