"""What loader and collation ask of training data, whether its conversations are given (``TokenizedDataset``) or answered in the run (``Prompts``)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from torchspec.engines.messages import Sample


class Samples(Protocol):
    """Conversations 0 to n-1."""

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64 tokens of each, at most."""
        ...

    @property
    def content(self) -> str:
        """Hash of everything that decides what is trained."""
        ...

    def request(self, index: int, *, epoch: int) -> Sample:
        """What is asked of the engines."""
        ...

    def mismatch(self, index: int, ids: Tensor) -> str:
        """Why a record's token ids, [T] int32, are not those of this conversation; "" when they are."""
        ...

    def loss_mask(self, index: int, tokens: int) -> np.ndarray:
        """[T] uint8, of a record with so many tokens."""
        ...

    def positions(self, index: int, tokens: int) -> np.ndarray | None:
        """[T] int64 RoPE positions of the draft; None for 0 to T-1."""
        ...

    def key(self, index: int) -> int:
        """Under which its record is kept on disk (``transfer.keys``)."""
        ...

    def place(self, index: int) -> str:
        """Where the user finds it, as ``source:line``."""
        ...
