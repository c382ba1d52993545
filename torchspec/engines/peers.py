"""What the coordinator knows of a connection beside the ledger: who it is, and for a worker what it asked for and last said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchspec.engines.connection import Peer
from torchspec.engines.messages import Beat, Challenge, Pull, Ready


@dataclass(slots=True)
class Client:
    """A connection."""

    challenge: Challenge
    expires: float
    """When it must have said who it is."""
    role: str = ""
    """Empty until it has."""
    rank: int = -1
    """Of a trainer that has opened a stage."""


@dataclass(slots=True)
class WorkerView:
    """A connected worker."""

    peer: Peer
    last_beat: float
    since: float = 0.0
    """When it came."""
    ready: bool = False
    answers: bool = False
    """It answers prompts and writes no records."""
    told: bool = False
    """The user knows already why it ends."""
    in_order: bool = False
    """It said that it was told to end."""
    ending: str = ""
    """Why we ended it."""
    pull: Pull | None = None
    beat: Beat = field(default_factory=lambda: Beat(samples=0, tokens=0, busy_s=0.0, write_s=0.0))
    idle_for_credit_s: float = 0.0
    idle_for_packs_s: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Its part of the group's metrics (docs/design.md)."""
        b = self.beat
        counters = {"samples": b.samples, "tokens": b.tokens, "busy_s": b.busy_s, "write_s": b.write_s, "alive": self.ready}
        counters |= {"answers": self.answers, "drafts": b.drafts, "accepted": b.accepted}
        return {**counters, "idle_for_credit_s": self.idle_for_credit_s, "idle_for_packs_s": self.idle_for_packs_s}


def mismatch(ready: Ready, expected: dict[str, Any], *, max_length: int) -> str | None:
    """Why this engine is of no use to the run; None when it is good."""
    different = [f"{name} is {ready.spec.get(name)!r}, the trainer expects {value!r}" for name, value in expected.items() if ready.spec.get(name) != value]
    if different and not ready.answers:
        return f"would write other records than this run needs: {'; '.join(different)}"
    if ready.max_tokens < max_length:
        return f"takes at most {ready.max_tokens} tokens, data.max_length is {max_length}: lower it, or raise the engine's limit"
    return None
