"""Everything that crosses a coordinator socket: msgspec structs, never pickle.

A frame is a 4-byte little-endian length, a 4-byte number and one MessagePack map that names its type. Each side numbers its frames from 0;
a frame out of order is refused and the connection closed. The coordinator speaks first (:class:`Challenge`), a client answers with :class:`Hello`.

    trainer   -> Hello OpenStage Submit Acknowledge Reissue CloseStage NewDraft StatusRequest
              <- Challenge Welcome Opened PackReady GroupStatus Pulse Stop
    worker    -> Hello Ready Unfit Leave Pull Report Beat
              <- Challenge Welcome Work Cancel NewDraft Pulse Stop
    observer  -> Hello StatusRequest
              <- Challenge Welcome GroupStatus Pulse Stop
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL = 5
MAX_FRAME = 64 * 2**20
"""Bytes; a longer frame is refused unread."""


class Message(msgspec.Struct, tag=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every frame."""


class PartialAnswer(msgspec.Struct, frozen=True):
    """The target is to answer first: what it says belongs to the conversation (on-policy training)."""

    new_tokens: int
    """Answer tokens at most."""
    seed: int
    """Of the sampling, so that another attempt says the same."""


class Image(msgspec.Struct, frozen=True):
    """An image of a conversation: where its bytes lie, and the tokens that stand for it. The bytes stay where they are until an engine reads them."""

    path: str
    """Of a file that engines can read too."""
    offset: int
    """Where in the file the encoded image (PNG, JPEG, ...) begins."""
    nbytes: int
    digest: str
    """XXH3-128 of the encoded image, in hexadecimal."""
    at: int
    """Position of its first token in the conversation."""
    tokens: int
    """So many copies of the target's image token."""


class Sample(msgspec.Struct, frozen=True):
    """One conversation to capture."""

    index: int
    """Position in the tokenised dataset; unique inside (stage, epoch)."""
    ids: bytes
    """Token ids, little-endian int32."""
    generate_from: PartialAnswer | None = None
    """Set where ``ids`` are a prompt."""
    images: list[Image] = []
    """In the order of their tokens."""


class Pack(msgspec.Struct, frozen=True):
    """One micro-batch of one rank, by its place in the plan."""

    index: int
    samples: list[Sample]


class RecordRef(msgspec.Struct, frozen=True):
    """A finished record in the store."""

    index: int
    key: str
    nbytes: int
    tokens: int
    rows: int


class Failure(msgspec.Struct, frozen=True):
    """A sample that was given up after ``max_attempts``."""

    index: int
    reason: str
    attempts: int


class Lease(msgspec.Struct, frozen=True):
    """The right, until it is revoked, to produce one record under one key."""

    id: int
    key: str
    stage: str
    index: int
    ids: bytes
    generate_from: PartialAnswer | None = None
    """Set where ``ids`` are a prompt that this worker is to answer."""
    images: list[Image] = []


class Finished(msgspec.Struct, frozen=True):
    """A record that is whole in the store. Of an answered prompt it holds ``rows + 1`` tokens."""

    lease: int
    nbytes: int
    rows: int


class Answered(msgspec.Struct, frozen=True):
    """What a worker that only answers (no key, no record) made of a prompt; another one captures it."""

    lease: int
    ids: bytes
    """Prompt and answer, little-endian int32."""


class Failed(msgspec.Struct, frozen=True):
    """A lease that produced nothing."""

    lease: int
    reason: str
    retry: bool = True
    """False: the same sample would fail anywhere (too long, say)."""


class Damaged(msgspec.Struct, frozen=True):
    """A finished record that could not be read or did not verify."""

    index: int
    key: str
    reason: str


# any client -> coordinator


class Hello(Message, frozen=True, kw_only=True):
    """Who the client is, with its proof of the token; answered by :class:`Welcome`."""

    proof: bytes
    """``handshake.prove`` of the token, the challenge, and the two fields below."""
    role: str
    """trainer, worker or observer."""
    name: str
    """rank-0, worker-1, ...; for logs."""
    protocol: int = PROTOCOL


class StatusRequest(Message, frozen=True, kw_only=True):
    """Asks for :class:`GroupStatus`."""


# trainer -> coordinator


class OpenStage(Message, frozen=True, kw_only=True):
    """This rank will submit packs ``first_pack + rank, + world, ...`` below ``num_packs`` of one pass over a plan.

    A stage name (``train``, ``validate`` or ``validate/NAME``) is open once a rank; opening it again closes the earlier pass. Answered by :class:`Opened`.
    """

    stage: str
    epoch: int
    first_pack: int
    num_packs: int
    rank: int
    world: int
    step_packs: int = 0
    """Packs of an optimizer step, where its packs are to be announced together, with the lengths of its answers (on-policy: no plan knows them)."""


class Submit(Message, frozen=True, kw_only=True):
    """Packs of this rank, in plan order, each once. An empty pack is ready at once."""

    stage: str
    epoch: int
    packs: list[Pack]


class Acknowledge(Message, frozen=True, kw_only=True):
    """The pack's records were copied out: delete them and return their bytes to the budget."""

    stage: str
    epoch: int
    packs: list[int]


class Reissue(Message, frozen=True, kw_only=True):
    """Finished records of a pack that were of no use; each counts as a failed attempt and is produced again. All of a pack in one message:
    the pack must not become ready again in between."""

    stage: str
    epoch: int
    pack: int
    damaged: list[Damaged]


class CloseStage(Message, frozen=True, kw_only=True):
    """This rank takes no more packs of the pass: drop what is queued, delete what is finished, return the bytes."""

    stage: str
    epoch: int


class NewDraft(Message, frozen=True, kw_only=True):
    """The draft in training, exported: workers that answer speculate with it from now on (trainer -> coordinator -> worker)."""

    path: str
    """Directory, on the workers' host."""
    step: int
    """Optimizer step that it is of."""
    speculative: dict[str, Any]
    """vLLM's ``speculative_config`` for it, as its family says."""


# worker -> coordinator


class Ready(Message, frozen=True, kw_only=True):
    """The engine is up. The coordinator compares ``spec`` with the run's expectation and refuses the worker where they differ."""

    spec: dict[str, Any]
    """``RecordSpec.to_dict`` of what this engine will write."""
    info: dict[str, Any]
    """engine, versions, device, host, process id, num_layers."""
    max_tokens: int
    """Longest sample it takes."""
    answers: bool = False
    """It answers prompts and writes no records (``spec`` is then empty)."""


class Unfit(Message, frozen=True, kw_only=True):
    """This worker cannot serve, for a reason that the user can mend; it ends."""

    words: list[str]
    """``UserError.words``."""


class Leave(Message, frozen=True, kw_only=True):
    """This worker was told to end: what it holds goes to others, and no sample is to blame for it."""


class Pull(Message, frozen=True, kw_only=True):
    """Room for so much; answered by :class:`Work` as soon as there is any. A later Pull replaces an unanswered one."""

    samples: int
    tokens: int


class Report(Message, frozen=True, kw_only=True):
    """Results, in any order. Results of a revoked lease are dropped and their key deleted."""

    finished: list[Finished]
    failed: list[Failed]
    answered: list[Answered] = []


class Beat(Message, frozen=True, kw_only=True):
    """Sent every second by a thread of its own; the counters only grow."""

    samples: int
    tokens: int
    busy_s: float
    """Time inside the engine."""
    write_s: float
    """Time spent on writing records (also inside busy_s)."""
    drafts: int = 0
    """Times that a draft was proposed while answering."""
    accepted: int = 0
    """Tokens of them that the target took."""


class Wrote(Message, frozen=True, kw_only=True):
    """What became of a record (a side that writes elsewhere -> its worker): it is whole in the store; or, with ``error``, it is not and will not be."""

    key: str
    nbytes: int = 0
    rows: int = 0
    seconds: float = 0.0
    """Time spent on taking the states out and writing them."""
    error: str = ""


# coordinator -> client


class Challenge(Message, frozen=True, kw_only=True):
    """The first frame of a connection."""

    nonce: bytes
    """Random, never used again."""


class Pulse(Message, frozen=True, kw_only=True):
    """Sent every few seconds: a client that hears nothing at all for ``connection.SILENCE`` seconds takes the coordinator for lost."""


class Opened(Message, frozen=True, kw_only=True):
    """The pass is open. What came before this belongs to an earlier pass, which may have had the same stage and epoch."""

    stage: str
    epoch: int


class Welcome(Message, frozen=True, kw_only=True):
    """The client is let in: what run this is, and what it needs of it."""

    run: str
    incarnation: int
    store: dict[str, Any]
    """Store address, to be opened by ``transfer.open_store``."""
    spec: dict[str, Any]
    """The run's expected record spec."""
    job: dict[str, Any]
    """What a worker builds its engine from (``worker.py``); empty for other roles."""


class PackReady(Message, frozen=True, kw_only=True):
    """Every sample of the pack is finished or given up. Records stay until acknowledged."""

    stage: str
    epoch: int
    pack: int
    records: list[RecordRef]
    failed: list[Failure]
    answers: list[int] | None = None
    """Answer tokens of every sample of the pack's optimizer step, of all ranks; None where the plan knows what is supervised."""


class Work(Message, frozen=True, kw_only=True):
    """Answers :class:`Pull`, within the room that it gave."""

    leases: list[Lease]


class Cancel(Message, frozen=True, kw_only=True):
    """These leases are revoked: do not start them; what is finished of them is dropped."""

    leases: list[int]


class GroupStatus(Message, frozen=True, kw_only=True):
    """State of the group (see docs/design.md, "Group metrics")."""

    state: dict[str, Any]


class Stop(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The connection ends. ``error`` is empty for a normal end, else one line for the user.

    With defaults left out its form is that of every protocol so far: a client of another version can read why it is refused.
    """

    error: str = ""
    refused: bool = False
    """The run goes on, without this worker."""
    user: list[str] = []
    """``UserError.words`` of the same, where the user can mend it."""


ToCoordinator = Hello | StatusRequest | OpenStage | Submit | Acknowledge | Reissue | CloseStage | NewDraft | Ready | Unfit | Leave | Pull | Report | Beat
ToTrainer = Challenge | Welcome | Opened | PackReady | GroupStatus | Pulse | Stop
ToWorker = Challenge | Welcome | Work | Cancel | NewDraft | Pulse | Stop


def result_of(lease: Lease, wrote: Wrote) -> Finished | Failed:
    """What became of a lease, by what became of its record."""
    return Failed(lease.id, wrote.error) if wrote.error else Finished(lease.id, wrote.nbytes, wrote.rows)
