"""What the ledger remembers: passes over a plan, their packs and samples, the workers, the byte credit that packs hold, and what is to be done outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchspec.engines.messages import Failure, Image, PackReady, PartialAnswer, RecordRef

VALIDATE, TRAIN = "validate", "train"
KINDS = (VALIDATE, TRAIN)
"""Kinds of stages, the first before the second: it has the reserve, and its samples go to workers first."""


def kind_of(stage: str) -> str:
    """``validate`` and ``validate/NAME`` are validation, every other stage is training."""
    return VALIDATE if stage == VALIDATE or stage.startswith(f"{VALIDATE}/") else TRAIN


@dataclass(slots=True)
class Out:
    """What to do outside the ledger; :meth:`take` empties it."""

    ready: list[tuple[int, PackReady]] = field(default_factory=list)
    """(rank, message)."""
    delete: list[str] = field(default_factory=list)
    """Keys; each is confirmed by ``Ledger.deleted``."""
    cancel: list[tuple[str, int]] = field(default_factory=list)
    """(worker, lease)."""
    stop: str | None = None

    def take(self) -> Out:
        """What there is; nothing is left."""
        taken = Out(self.ready, self.delete, self.cancel, self.stop)
        self.ready, self.delete, self.cancel, self.stop = [], [], [], None
        return taken


@dataclass(slots=True, eq=False)
class SampleState:
    """One conversation on its way."""

    index: int
    ids: bytes
    pack: PackState
    generate_from: PartialAnswer | None = None
    """Set while the prompt in ``ids`` is to be answered."""
    prompt: int = 0
    """Tokens of the prompt, of a sample that is or was to be answered."""
    attempt: int = 0
    """Attempts that failed."""
    key: str = ""
    lease: int | None = None
    record: RecordRef | None = None
    failure: Failure | None = None
    images: list[Image] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of the conversation, at most."""
        return len(self.ids) // 4 + (self.generate_from.new_tokens if self.generate_from is not None else 0)


@dataclass(slots=True, eq=False)
class PackState:
    """One micro-batch of one rank; it holds the credit of its samples."""

    index: int
    rank: int
    owner: PassState
    nbytes: int = 0
    samples: list[SampleState] = field(default_factory=list)
    granted: bool = False
    waiting: int = 0
    """Samples neither finished nor given up."""
    announced: bool = False
    ended: bool = False
    """Acknowledged, or its pass closed: the credit goes back when ``keys`` is empty."""
    keys: set[str] = field(default_factory=set)
    """Keys that may exist in the store."""


@dataclass(slots=True, eq=False)
class PassState:
    """One way through packs ``first`` to ``end`` of a plan, by all ranks."""

    stage: str
    epoch: int
    world: int
    first: int
    end: int
    next: int
    """Lowest pack without credit."""
    open: set[int] = field(default_factory=set)
    """Ranks that take part."""
    closed: set[int] = field(default_factory=set)
    """Ranks that took part."""
    lost: set[int] = field(default_factory=set)
    """Those of them whose connection was lost before they said that they were through."""
    packs: dict[int, PackState] = field(default_factory=dict)
    """Submitted and not yet ended."""
    step_packs: int = 0
    """Packs that are announced together; 0: each by itself."""
    answers: dict[int, list[int]] = field(default_factory=dict)
    """Answer lengths of steps that were announced and have packs left, by step."""
    submitted_packs: int = 0
    submitted_samples: int = 0
    failed: int = 0

    def rank_of(self, index: int) -> int:
        """Whose a pack is."""
        return (index - self.first) % self.world

    def step_of(self, index: int) -> int:
        """Optimizer step of a pack; only where ``step_packs`` is given."""
        return index // self.step_packs

    @property
    def expected_samples(self) -> float:
        """Samples of the whole pass, judged by the packs seen so far."""
        return self.submitted_samples / max(self.submitted_packs, 1) * (self.end - self.first)


@dataclass(slots=True, eq=False)
class WorkerState:
    """What a worker holds."""

    max_tokens: int
    answers: bool = False
    """Answers prompts instead of writing records."""
    leases: dict[int, SampleState] = field(default_factory=dict)
    deadlines: dict[int, float] = field(default_factory=dict)
    """Of every lease, also a cancelled one until the worker has settled it."""
    cancelled: dict[int, str] = field(default_factory=dict)
    """Leases taken back that may still write: their key."""
    alone: int = 0
    """The lease beside which it gets no other."""


class Credit:
    """Bytes alive, inside a budget of which validation has a reserve that training cannot take.

    Validation may borrow what training does not use; training waits until that is back.

    Args:
        budget: bytes alive at once.
        reserve: bytes of it for validation alone.
    """

    def __init__(self, *, budget: int, reserve: int) -> None:
        self.budget = budget
        self.reserve = reserve
        self._alive = {kind: 0 for kind in KINDS}

    @property
    def alive(self) -> int:
        """Bytes granted and not yet returned."""
        return self._alive[VALIDATE] + self._alive[TRAIN]

    def of(self, kind: str) -> int:
        """The part of :attr:`alive` that belongs to a kind of stage."""
        return self._alive[kind]

    def most(self, kind: str) -> int:
        """The largest pack that can ever fit."""
        return self.budget if kind == VALIDATE else self.budget - self.reserve

    def fits(self, kind: str, nbytes: int) -> bool:
        validating, training = self._alive[VALIDATE], self._alive[TRAIN]
        if kind == VALIDATE:
            return validating + training + nbytes <= self.budget
        return training + max(validating, self.reserve) + nbytes <= self.budget

    def take(self, kind: str, nbytes: int) -> None:
        self._alive[kind] += nbytes

    def give_back(self, kind: str, nbytes: int) -> None:
        self._alive[kind] -= nbytes
