"""Rows to tokens, in worker processes of ``datasets.map``: parse, render, and give images their tokens.

A chat template writes one image token for an image; the target sees as many as the image has vectors. So ids and mask are rendered with the one, and it is
repeated afterwards: where answers begin and end is not touched by it. A conversation is cut on the right, never inside an image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchspec.data.conversations import Conversation, RowError, parse
from torchspec.data.pictures import Found, find_image
from torchspec.data.render import Rendered, Renderer, tokenizer_fingerprint
from torchspec.data.template import first_line
from torchspec.errors import UserError
from torchspec.images import VisionTower


@dataclass(frozen=True)
class ImageRow:
    """An image of a tokenised conversation, as it is kept beside the tokens."""

    path: str
    """Of its file; "" where its bytes are kept."""
    offset: int
    nbytes: int
    digest: str
    at: int
    """Its first token."""
    tokens: int
    span: int
    """Positions that it takes on the temporal axis of multi-axis RoPE."""


@dataclass(frozen=True)
class Tokenised:
    """A row in tokens, or why it has none."""

    ids: np.ndarray
    mask: np.ndarray
    length: int = 0
    """Tokens before the cut."""
    images: tuple[ImageRow, ...] = ()
    blobs: tuple[bytes, ...] = ()
    """Encoded images of those that have no path."""
    problem: str = ""
    unused: tuple[str, ...] = ()
    """Keys of the row that nothing was read from."""


class Tokenise:
    """See the module.

    Args:
        renderer: for rows of messages or text; None where all rows bring their tokens.
        max_length: tokens kept of a conversation.
        messages_key, media: as of :func:`torchspec.data.conversations.parse`.
        tower: measures images, where engines are given any.
        folders: that paths of images are relative to, one a source.
    """

    def __init__(
        self,
        renderer: Renderer | None,
        *,
        max_length: int,
        messages_key: str | None,
        media: str,
        tower: VisionTower | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        self.renderer, self.max_length, self.messages_key, self.media = renderer, max_length, messages_key, media
        self.tower, self.folders = tower, folders
        self._fingerprint = "" if renderer is None else tokenizer_fingerprint(renderer.tokenizer)
        self._made_in = os.getpid()

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if self.tower is not None and os.getpid() != self._made_in:
            torch.set_num_threads(1)  # in a forked process, more may wait for each other without end
        done = [self.row(row, source) for row, source in zip(batch["row"], batch["source"], strict=True)]
        return {
            "ids": [row.ids for row in done],
            "mask": [row.mask for row in done],
            "length": [row.length for row in done],
            "problem": [row.problem for row in done],
            "images": [json.dumps([list(vars(image).values()) for image in row.images]) if row.images else "" for row in done],
            "blobs": [list(row.blobs) for row in done],
            "unused": [list(row.unused) for row in done],
        }

    def row(self, row: bytes, source: int) -> Tokenised:
        """One row; what is wrong with it is in ``problem``."""
        try:
            conversation = parse(row, messages_key=self.messages_key, media=self.media)
            unused = conversation.unused
            if conversation.input_ids is not None:
                if conversation.tokenizer and self._fingerprint not in ("", conversation.tokenizer):
                    raise RowError("has the tokens of another tokenizer or chat template than the target's")
                rendered = Rendered(np.array(conversation.input_ids, dtype=np.int32), np.array(conversation.loss_mask, dtype=np.uint8))
            elif self.renderer is None:
                raise RowError("has messages or text, and the target has no tokenizer and chat template for them (the first row that is good has tokens)")
            else:
                rendered = self.renderer.render(conversation)
                unused = self.renderer.unused(conversation)
            if self.tower is not None:
                return replace(self._with_images(rendered, conversation, source, self.tower), unused=unused)
            ids, mask = rendered.ids[: self.max_length], rendered.mask[: self.max_length]
            return Tokenised(ids, mask, rendered.ids.shape[0], unused=unused)
        except RowError as error:
            return _bad(error)
        except UserError:
            raise
        except Exception as error:  # of a tokenizer, a template or an image: one row is no reason to lose the run
            return _bad(RowError(f"cannot be rendered ({type(error).__name__}: {first_line(error)})"))

    def _with_images(self, rendered: Rendered, conversation: Conversation, source: int, tower: VisionTower) -> Tokenised:
        places = np.flatnonzero(rendered.ids == tower.image_id)
        if places.size != len(conversation.images):
            raise RowError(f"has {len(conversation.images)} images, and the target's chat template writes {places.size} image tokens for them")
        found = [find_image(image, folder=self.folders[source], tower=tower) for image in conversation.images]
        expanded, at = expand(rendered, places, [image.size.tokens for image in found])
        total = expanded.ids.shape[0]
        end = min(total, self.max_length)
        whole: list[tuple[Found, int]] = []
        for image, first in zip(found, at, strict=True):
            if first + image.size.tokens >= end:  # the last token is never an image's: engines are not given it
                end = min(end, first)
                break
            whole.append((image, first))
        rows, blobs, offset = [], [], 0
        for image, first in whole:
            size = image.size
            rows.append(ImageRow(image.path, 0 if image.path else offset, len(image.encoded), image.digest, first, size.tokens, size.span))
            if not image.path:
                blobs.append(image.encoded)
                offset += len(image.encoded)
        return Tokenised(expanded.ids[:end], expanded.mask[:end], total, tuple(rows), tuple(blobs))


def _bad(error: RowError) -> Tokenised:
    return Tokenised(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8), problem=str(error))


def expand(rendered: Rendered, places: np.ndarray, tokens: list[int]) -> tuple[Rendered, list[int]]:
    """Image tokens repeated.

    Args:
        rendered: with one token an image.
        places: where these are.
        tokens: how many each becomes.

    Returns:
        Ids and mask, and the first token of each image in them.
    """
    times = np.ones(rendered.ids.shape[0], dtype=np.int64)
    times[places] = tokens
    first = np.cumsum(times) - times
    return Rendered(np.repeat(rendered.ids, times), np.repeat(rendered.mask, times)), first[places].tolist()
