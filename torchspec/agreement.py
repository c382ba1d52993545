"""What ranks do about the batch that each of them has, or has not: go on, stop, or leave because one failed.

They agree by one number over a host-side (gloo) group, so that no batch waits for the device. Nobody is then inside a collective that another rank will never
enter, and the checkpoint saved on the way out is whole.
"""

from __future__ import annotations

import enum
import time
from datetime import timedelta
from typing import Any

import torch

from torchspec.errors import GroupStopped

_GATHERING = timedelta(seconds=20)
"""How long a rank that is leaving waits for the others to leave too."""


class Vote(enum.IntEnum):
    """What a rank says of its next batch; the highest vote counts for all."""

    GO = 0
    STOP = 1
    """Told to end."""
    FAILED = 2
    """Has no batch, and an error."""


class Agreement:
    """The ranks' common word on every batch. Alone, a rank agrees with itself.

    Args:
        world: number of ranks.
        timeout: for a rank to vote; None takes torch's.
    """

    def __init__(self, world: int = 1, timeout: timedelta | None = None) -> None:
        self._world = world
        self._timeout = timeout
        self._votes: Any | None = None
        self._exits: Any | None = None
        self.reached = Vote.GO

    def __call__(self, vote: Vote) -> Vote:
        """The highest vote of all ranks, each of which calls this once a batch.

        Raises:
            GroupStopped: when a rank is gone.
        """
        if self._world == 1:
            self.reached = vote
            return vote
        word = torch.tensor([int(vote)])
        try:
            if self._votes is None:
                self._votes, self._exits = (torch.distributed.new_group(backend="gloo", timeout=self._timeout) for _ in range(2))
            _wait_for(torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX, group=self._votes, async_op=True))
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise GroupStopped(f"another rank has ended, see logs/rank-N.log, or is not reached by gloo, see GLOO_SOCKET_IFNAME ({reason})") from error
        self.reached = Vote(int(word))
        return self.reached

    def all_leave(self) -> bool:
        """True when every rank is on its way out, so that they can still save together. Called by a rank that leaves."""
        if self._world == 1:
            return True
        if self._exits is None:
            return False  # nothing was trained
        try:
            torch.distributed.monitored_barrier(self._exits, timeout=_GATHERING)
        except RuntimeError:
            return False
        return True

    def alike(self, state: int) -> bool:
        """True when every rank gives the same number. Called by all of them, after :meth:`all_leave` said so."""
        if self._world == 1:
            return True
        word = torch.tensor([state, -state])
        try:
            torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX, group=self._exits)
        except RuntimeError:
            return False
        return bool(word[0] == -word[1])


def _wait_for(work: Any) -> None:
    """Like ``work.wait()``, which would hold signals back for as long as another rank has no batch: it runs no handler."""
    pause = 5e-5
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    work.wait()


def alone(vote: Vote) -> Vote:
    """The agreement of a single rank."""
    return vote
