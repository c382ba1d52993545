"""A trainer's (or an observer's) connection to the coordinator: blocking, used by one thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchspec.engines.connection import SILENCE, BadFrame, Closed, Connection
from torchspec.engines.handshake import Refused, greet
from torchspec.engines.messages import (
    Acknowledge,
    CloseStage,
    Damaged,
    GroupStatus,
    Message,
    NewDraft,
    Opened,
    OpenStage,
    Pack,
    PackReady,
    Reissue,
    StatusRequest,
    Stop,
    Submit,
    ToTrainer,
    Welcome,
)
from torchspec.errors import GroupStopped, UserError

__all__ = ["Endpoint", "GroupStopped", "TrainerClient"]


@dataclass(frozen=True)
class Endpoint:
    """Where the coordinator listens, and what it asks for."""

    host: str
    port: int
    token: str


class TrainerClient:
    """See the module. Every method raises :class:`GroupStopped` when the group has ended, ``UserError`` where the user can mend why.

    Args:
        endpoint: from ``EngineGroup.start``.
        name: for the logs.
        role: trainer or observer.
    """

    def __init__(self, endpoint: Endpoint, name: str, *, role: str = "trainer") -> None:
        self._ready: deque[PackReady] = deque()
        self._answers: deque[GroupStatus] = deque()
        self._opening = 0
        """Passes asked for and not confirmed: what comes before the confirmation belongs to an earlier one."""
        try:
            self._connection = Connection((endpoint.host, endpoint.port), ToTrainer, silence=SILENCE)
        except Closed as error:
            raise GroupStopped(str(error)) from error
        try:
            self.welcome: Welcome = greet(self._connection, token=endpoint.token, role=role, name=name)
        except (Refused, Closed, BadFrame) as error:
            self.close()
            raise GroupStopped(str(error)) from error

    def open_stage(self, stage: str, epoch: int, *, first_pack: int, num_packs: int, rank: int, world: int, step_packs: int = 0) -> None:
        """Begin a pass; what came for earlier ones is dropped."""
        self._ready.clear()
        self._opening += 1
        self._send(OpenStage(stage=stage, epoch=epoch, first_pack=first_pack, num_packs=num_packs, rank=rank, world=world, step_packs=step_packs))

    def submit(self, stage: str, epoch: int, packs: Sequence[Pack]) -> None:
        """Packs of this rank, in plan order."""
        self._send(Submit(stage=stage, epoch=epoch, packs=list(packs)))

    def poll(self, timeout: float) -> PackReady | None:
        """A pack that is ready; None after ``timeout`` seconds without one."""
        deadline = time.monotonic() + timeout
        while not self._ready:
            if not self._receive(deadline - time.monotonic()):
                return None
        return self._ready.popleft()

    def acknowledge(self, stage: str, epoch: int, packs: Sequence[int]) -> None:
        """Their records were copied out."""
        self._send(Acknowledge(stage=stage, epoch=epoch, packs=list(packs)))

    def reissue(self, stage: str, epoch: int, pack: int, damaged: Sequence[Damaged]) -> None:
        """Records of a pack that could not be read or did not verify, all of them at once."""
        self._send(Reissue(stage=stage, epoch=epoch, pack=pack, damaged=list(damaged)))

    def close_stage(self, stage: str, epoch: int) -> None:
        """No more packs of the pass."""
        self._send(CloseStage(stage=stage, epoch=epoch))

    def new_draft(self, path: str, step: int, speculative: dict[str, Any]) -> None:
        """The draft in training, exported to a directory: workers that answer speculate with it from now on."""
        self._send(NewDraft(path=path, step=step, speculative=speculative))

    def ask(self, timeout: float = 10.0) -> dict[str, Any]:
        """State of the group (docs/design.md, "Group metrics")."""
        self._send(StatusRequest())
        deadline = time.monotonic() + timeout
        while not self._answers:
            if not self._receive(deadline - time.monotonic()):
                raise GroupStopped(f"the coordinator did not answer within {timeout:.0f} s")
        return self._answers.popleft().state

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def _send(self, message: Message) -> None:
        try:
            self._connection.send(message)
        except (Closed, BadFrame) as error:
            raise self._last_words(GroupStopped(str(error))) from error

    def _receive(self, timeout: float) -> bool:
        try:
            message = self._connection.receive(max(timeout, 0.0))
        except (Closed, BadFrame) as error:
            raise GroupStopped(str(error)) from error
        if isinstance(message, Stop):
            raise _reason(message)
        if isinstance(message, PackReady):
            if not self._opening:
                self._ready.append(message)
        elif isinstance(message, Opened):
            self._opening -= 1
        elif isinstance(message, GroupStatus):
            self._answers.append(message)
        return message is not None

    def _last_words(self, otherwise: GroupStopped) -> GroupStopped | UserError:
        """What the coordinator said before it closed, if it is still in the socket."""
        try:
            while (message := self._connection.receive(0.2)) is not None:
                if isinstance(message, Stop):
                    return _reason(message) if message.error else otherwise
        except (Closed, BadFrame):
            pass
        return otherwise


def _reason(stop: Stop) -> GroupStopped | UserError:
    """Why the group ended, as an error."""
    return UserError.of(stop.user) if stop.user else GroupStopped(stop.error or "the engine group has ended")
