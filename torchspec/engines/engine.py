"""What a target engine is: it takes leases and writes one record for each.

An engine lives in a worker process of its own (``worker.py``), which pulls leases from the coordinator and reports back.
``submit``/``poll`` fit both a batching engine (Transformers: ``poll`` runs one batch) and an asynchronous one (vLLM: requests
are in flight all the time and its own connector writes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torchspec.engines.messages import Answered, Failed, Finished, Lease
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer.spec import RecordSpec
from torchspec.transfer.store import Address


@dataclass(frozen=True)
class EngineConfig:
    """How engine workers run the target (``data.engine`` chooses which engine)."""

    workers: int = 1
    """Worker processes on this host."""
    devices: list[str] | None = None
    """One entry a worker: cpu, or CUDA indices such as "0" or "0,1". None: workers share the CUDA devices that this
    process sees (``CUDA_VISIBLE_DEVICES``) in turn, whatever ``trainer.accelerator`` is, or the CPU where there are none."""
    batch_tokens: int = 4096
    """Tokens of one forward of the target (padding included)."""
    batch_samples: int = 64
    """Conversations of one forward of the target."""
    deterministic: bool = False
    """One conversation a forward: records repeat bit for bit, since a record depends on what shares its batch."""
    listen: str | None = None
    """HOST:PORT on which the coordinator waits for ranks and workers, and which they are told; port 0 takes a free one. None: a port of 127.0.0.1, or, with
    ``trainer.num_nodes`` above 1, of this host's address by MASTER_ADDR. Anything but loopback lets other hosts connect: they need the token."""
    attn_implementation: str = "auto"
    """Attention of the Transformers engine: auto (sdpa, or what the class has in its place), sdpa, eager, ... vLLM's is
    ``engine_args: {attention_backend: ...}``."""
    threads: int | None = None
    """CPU threads a worker; None shares this host's cores evenly between its CPU workers and ranks (two that overlap slow each other down many times over)."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed to the engine as they are (from_pretrained of Transformers, engine arguments of vLLM, ServerArgs of SGLang)."""
    allow_unknown_version: bool = False
    """Run with a release of the engine's library (vLLM, SGLang), or in SGLang a kind of target, that is not listed in docs/engines.md."""
    start_timeout: float = 600.0
    """Seconds for a worker to say ready; then it is given up, with the last lines of its log."""
    lease_timeout: float = 300.0
    """Seconds for a lease before its sample goes to another attempt."""
    silence_timeout: float = 30.0
    """Seconds without a heartbeat before a worker counts as dead."""
    max_restarts: int = 3
    """Restarts of one worker before it is given up (``min_workers``)."""
    min_workers: int = 1
    """Workers that must be left. A run that starts workers itself ends when those of them that can still be started or serve, and those started by hand, are
    fewer: one that is bad from the start, or was restarted ``max_restarts`` times, is left out. 0 goes on without any, waiting for others to join."""
    no_worker_timeout: float | None = None
    """Seconds with fewer than ``min_workers`` workers alive (or none), and none of this run's starting, before the run ends; None waits without end.
    That there is none is said after 10 s (30 s where some are loading) and every minute."""
    max_attempts: int = 3
    """Attempts at one sample before it is given up and listed in failed_samples.jsonl."""
    max_failed_fraction: float = 0.01
    """Share of an epoch's samples that may be given up before the run stops."""

    def __post_init__(self) -> None:
        for name, least in (
            ("workers", 0),
            ("batch_tokens", 1),
            ("batch_samples", 1),
            ("threads", 1),
            ("max_restarts", 0),
            ("min_workers", 0),
            ("max_attempts", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.engines.{name}", value, f"is below {least}", f"use {least} or more")
        for name in ("start_timeout", "lease_timeout", "silence_timeout", "no_worker_timeout"):
            if getattr(self, name) is not None and not 0.0 < getattr(self, name) < math.inf:
                raise UserError(f"data.engines.{name}", getattr(self, name), "is no time to wait", "give seconds, more than 0")
        if 0 < self.workers < self.min_workers:
            problem = f"is more than data.engines.workers={self.workers}"
            raise UserError("data.engines.min_workers", self.min_workers, problem, "lower it (those that join by hand count as well once they are there)")
        if not 0.0 <= self.max_failed_fraction <= 1.0:
            raise UserError("data.engines.max_failed_fraction", self.max_failed_fraction, "is no share", "use a number from 0 to 1")


@dataclass(frozen=True)
class Sampling:
    """How answers are generated."""

    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the most likely tokens that make up this share of the probability; 1 is all."""
    seed: int = 0
    """Of the sampling."""
    _where: ClassVar[str] = ""
    """What stands before the names of the fields where the user gives them."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"{self._where}max_new_tokens", self.max_new_tokens, "is below 1", "give room for 1 token or more")
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"{self._where}temperature", self.temperature, "is no temperature", "use 0 for greedy answers, or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"{self._where}top_p", self.top_p, "is no share", "use a number above 0 and at most 1")
        if self.seed < 0:
            raise UserError(f"{self._where}seed", self.seed, "is negative", "use 0 or more")


@dataclass(frozen=True)
class OnPolicy(Sampling):
    """The target answers the training prompts in the run.

    With ``answer_workers: 0`` the capturing engine (``vllm`` or ``vllm_remote``) answers a prompt and captures its states in one pass. Else so many workers on
    this host answer with vLLM and with the draft in training as its speculator (callback ``torchspec.callbacks.on_policy.ServeDraft``), and the capturing
    engine, any, takes the finished conversations.
    """

    answer_workers: int = 0
    """vLLM workers that only answer."""
    answer_devices: list[str] | None = None
    """One entry for each of them, as ``data.engines.devices``."""
    answer_args: dict[str, Any] = field(default_factory=dict)
    """Engine arguments of their vLLM."""
    num_speculative_tokens: int = 3
    """Drafts they propose at a time."""
    _where: ClassVar[str] = "data.on_policy."

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2:
            raise UserError("data.on_policy.max_new_tokens", self.max_new_tokens, "is below 2", "give room for 2 tokens or more: one supervises nothing")
        super().__post_init__()
        if self.answer_workers < 0:
            raise UserError("data.on_policy.answer_workers", self.answer_workers, "is negative", "use 0 or more")
        if self.num_speculative_tokens < 1:
            raise UserError("data.on_policy.num_speculative_tokens", self.num_speculative_tokens, "is below 1", "use 1 or more")


@dataclass(frozen=True)
class Job:
    """What an engine is built from, in its worker process."""

    target: TargetConfig
    spec: RecordSpec
    """What the trainer expects."""
    store: Address
    config: EngineConfig
    max_length: int
    """Longest sample of the plan, tokens."""
    device: str
    """torch device inside the process: cpu or cuda:0."""
    on_policy: OnPolicy | None = None
    """How prompts are answered; None where every sample is a whole conversation."""
    images: bool = False
    """Samples may hold images."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since start; they only grow."""

    samples: int
    tokens: int
    busy_s: float
    write_s: float
    drafts: int = 0
    """Times that a draft was proposed; 0 where nothing speculates."""
    accepted: int = 0
    """Tokens of them that the target took."""


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    index: int
    """Position of its prompt in the list given."""
    ids: list[int]
    """New tokens, end token included where it was reached."""
    finish: str
    """stop or length."""


class Engine(Protocol):
    """A running target. Constructed from a :class:`Job`; loading happens in :meth:`start`."""

    spec: RecordSpec
    """What this engine writes; equal to the job's spec when all is well."""
    max_tokens: int
    """Longest sample it takes."""

    def start(self) -> dict[str, Any]:
        """Load the target; returns facts for the ready message (engine, versions, device, num_layers)."""
        ...

    def room(self) -> tuple[int, int]:
        """(samples, tokens) that it would take now."""
        ...

    def submit(self, leases: Sequence[Lease]) -> None:
        """Take leases; returns at once."""
        ...

    def cancel(self, leases: Sequence[int]) -> list[int]:
        """Forget those of the leases that have not started; returns which."""
        ...

    def poll(self, timeout: float) -> tuple[Sequence[Finished | Answered], Sequence[Failed]]:
        """Results since the last call; waits up to ``timeout`` seconds for one when work is in flight. A batching engine works here."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Idempotent."""
        ...


@runtime_checkable
class TakesDrafts(Protocol):
    """An engine that answers with a draft as its speculator; it has room once it has one."""

    def take_draft(self, path: str, step: int, speculative: Mapping[str, Any]) -> bool:
        """Speculate with the exported draft in this directory from now on.

        Args:
            path: on this host.
            step: optimizer step that it is of.
            speculative: how the engine is told to speculate with it, as the draft's family says.

        Returns:
            False when what it holds must be finished first; it has no room meanwhile: poll, and call again with this draft or a newer one.
        """
        ...


class Generator(Protocol):
    """A target that answers (``regenerate``)."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        """Answers in the order they finish, one for each prompt."""
        ...

    def close(self) -> None: ...
