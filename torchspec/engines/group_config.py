"""What the coordinator is started with, and what a worker builds its engine from: typed values that cross a pipe and a socket as JSON.

Imports no torch: the coordinator reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

import torchspec
from torchspec.engines.engine import EngineConfig, OnPolicy
from torchspec.target import TargetConfig
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import StoreConfig


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker is told with its welcome."""

    version: str
    """Of the run's torchspec; a worker of another one does not read the rest."""
    engine: str
    """As ``data.engine`` names it (``table.py``)."""
    engines: EngineConfig
    target: TargetConfig
    max_length: int
    """Longest sample of the plan, tokens."""
    on_policy: OnPolicy | None
    """How prompts are answered; None where every sample is a whole conversation."""
    images: bool
    """Samples may hold images."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> WorkerConfig:
        """The same again.

        Raises:
            ValueError: something is missing, unknown or of another type; the message names it.
        """
        told = msgspec.convert(plain, cls)
        if unknown := _unknown(plain, told.to_dict()):
            raise ValueError(f"unknown: {unknown}")
        return told


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """Everything the coordinator knows of the run."""

    run: str
    incarnation: int
    token: str
    owner: int
    """Process whose end is the group's."""
    listen_host: str
    listen_port: int
    """0 takes a free one."""
    expected_host: str | None
    """Address under which other hosts reach this one; None where none does."""
    log_dir: str
    engine: str
    engines: EngineConfig
    devices: list[str]
    """Of each worker that is started here."""
    answer_devices: list[str]
    """Of each of those that only answer."""
    target: TargetConfig
    spec: RecordSpec
    """What the trainer expects of every record."""
    store: StoreConfig
    budget: int
    """Bytes of records alive at once."""
    reserve: int
    """Bytes of it that only validation may use."""
    max_length: int
    on_policy: OnPolicy | None
    images: bool

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, line: bytes) -> CoordinatorConfig:
        """The same again."""
        return msgspec.json.decode(line, type=cls)

    def worker(self, *, engine: str, engines: EngineConfig) -> WorkerConfig:
        """What a worker with this engine is told."""
        return WorkerConfig(
            version=torchspec.__version__,
            engine=engine,
            engines=engines,
            target=self.target,
            max_length=self.max_length,
            on_policy=self.on_policy,
            images=self.images,
        )


def _unknown(given: Any, known: Any, where: str = "") -> str:
    """Name of the first key that was given and is not known; "" where there is none."""
    if not isinstance(given, dict) or not isinstance(known, dict):
        return ""
    for name, value in given.items():
        if name not in known:
            return f"{where}{name}"
        if found := _unknown(value, known[name], f"{where}{name}."):
            return found
    return ""
