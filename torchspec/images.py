"""Images of a conversation: which targets take them, how many tokens stand for one, and which positions those have. Shared by tokenising and engines.

Every family here replaces the one image token that its chat template writes by as many copies of it as the vision tower gives vectors; families that put other
tokens between them are refused. Sizes come from the target's own image processor (Transformers), which is run on the image: what it cannot read is found
when the data is tokenised.

A target with multi-axis RoPE (Qwen2-VL, arXiv 2409.12191) counts a still image of h x w tokens as max(h, w) positions of its text, all at the first of them
on the temporal axis:

    tokens        a  b  I  I  I  I  I  I  c  d        (an image of 2 x 3)
    index         0  1  2  3  4  5  6  7  8  9
    temporal      0  1  2  2  2  2  2  2  5  6
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from torchspec.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from torchspec.target import Target

GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Families whose image processor says the patches of each axis (``image_grid_thw``); all have multi-axis RoPE."""
FIXED = ("llava",)
"""Families in which every image has the same size."""


class BadImage(Exception):
    """An image that cannot be used; the message says why."""


@dataclass(frozen=True)
class Measured:
    """An image in tokens."""

    tokens: int
    span: int
    """Positions of the text that it takes where the target has multi-axis RoPE."""


def digest_of(encoded: bytes) -> str:
    """XXH3-128 of an encoded image, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(encoded)


def open_picture(encoded: bytes) -> Picture:
    """The decoded image, in RGB.

    Raises:
        BadImage: it is none that Pillow reads.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders do
        raise BadImage(f"is no image that can be read ({type(error).__name__})") from None


class Placed(Protocol):
    """Where an encoded image lies (``engines.messages.Image``)."""

    @property
    def path(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def digest(self) -> str: ...


def read_picture(image: Placed) -> Picture:
    """An image that was tokenised, decoded.

    Raises:
        BadImage: its file is missing, or is not what was tokenised.
    """
    try:
        with Path(image.path).open("rb") as handle:
            handle.seek(image.offset)
            encoded = handle.read(image.nbytes)
    except OSError as error:
        raise BadImage(f"image {image.path} cannot be read here ({error.strerror}): engines need the files of the data, on a disk that they share") from None
    if digest_of(encoded) != image.digest:
        raise BadImage(f"image {image.path} has changed since it was tokenised")
    return open_picture(encoded)


class VisionTower:
    """What a target makes of an image.

    Args:
        target: a vision-language model.

    Raises:
        UserError: of a family that is not known here, or without an image processor that loads.
    """

    def __init__(self, target: Target) -> None:
        config: Any = target.full_hf_config
        self.family = str(config.model_type)
        if self.family not in (*GRID, *FIXED):
            known = ", ".join((*GRID, *FIXED))
            what = "takes no images" if getattr(config, "vision_config", None) is None else "has tokens for images that are laid out in a way of its own"
            raise UserError(
                "data.media",
                "engine",
                f"does not work with a target of type {self.family}: it {what} (known: {known})",
                "set data.media to placeholder or refuse",
            )
        self.image_id = int(config.image_token_id if self.family in GRID else config.image_token_index)
        """Id of the token that stands for an image."""
        self.has_axes = self.family in GRID
        """Whether its RoPE has several axes."""
        self._config = config
        self._merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        self._processor = _processor(target)

    @property
    def fingerprint(self) -> str:
        """Changes when images become other tokens."""
        return json.dumps([self.family, self.image_id, self._merge, self._processor.to_dict()], sort_keys=True, default=str)

    def inputs(self, pictures: list[Picture]) -> dict[str, Any]:
        """What the model wants of images beside the ids: tensors by the names of its arguments.

        Raises:
            BadImage: of a size that the processor refuses.
        """
        try:
            return dict(self._processor(images=pictures, return_tensors="pt"))
        except (ValueError, OSError) as error:
            raise BadImage(f"is refused by the target's image processor ({str(error).splitlines()[0][:200]})") from None

    def measure(self, picture: Picture) -> Measured:
        """How many tokens an image becomes.

        Raises:
            BadImage: see :meth:`inputs`.
        """
        made = self.inputs([picture])
        if self.family in GRID:
            frames, height, width = (int(n) for n in made["image_grid_thw"][0])
            height, width = height // self._merge, width // self._merge
            return Measured(frames * height * width, max(frames, height, width))
        side = int(self._config.vision_config.patch_size)
        height, width = (int(n) // side for n in made["pixel_values"].shape[-2:])
        tokens = height * width + (0 if self._config.vision_feature_select_strategy == "default" else 1)
        return Measured(tokens, tokens)


def _processor(target: Target) -> Any:
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    config = target.config
    try:
        import PIL  # noqa: F401  (Transformers says only that a class is missing)

        level = logging.get_verbosity()
        logging.set_verbosity_error()  # without torchvision it says at length that it uses Pillow
        try:
            try:
                return AutoImageProcessor.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
            except (OSError, ValueError, ImportError):
                if not config.trust_remote_code:
                    raise
                return AutoImageProcessor.from_pretrained(config.path, revision=config.revision, trust_remote_code=True)
        finally:
            logging.set_verbosity(level)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "data.target.path",
            config.path,
            f"has no image processor that loads ({reason})",
            "add preprocessor_config.json to the target, and install the extra: pip install -e '.[media]' in a checkout",
        ) from error


def temporal_positions(tokens: int, spans: list[tuple[int, int, int]]) -> np.ndarray:
    """Positions on the first axis of multi-axis RoPE, [T] int64.

    Args:
        tokens: T.
        spans: (first token, tokens, positions taken) of each image, in order.
    """
    steps = np.ones(tokens, dtype=np.int64)
    for at, count, span in spans:
        steps[at + 1 : at + count] = 0
        if at + count < tokens:
            steps[at + count] = span
    return np.cumsum(steps) - 1


def unexpanded(ids: list[int], places: list[tuple[int, int]]) -> list[int]:
    """Ids with one image token for each image, as the chat template writes them.

    Args:
        ids: of a conversation.
        places: (first token, tokens) of each image, in order.
    """
    short: list[int] = []
    begin = 0
    for at, count in places:
        short += ids[begin : at + 1]
        begin = at + count
    return short + ids[begin:]
