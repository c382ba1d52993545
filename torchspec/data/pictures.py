"""From where a row says that an image is to the encoded image and its size in tokens, while data is tokenised.

An image is a file (its path is kept, and its hash), or comes inside the row as a ``data:`` URL, as base64, or as the ``{bytes, path}`` that ``datasets`` writes
(its bytes are kept with the tokens, encoded as they are). Nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from torchspec.data.conversations import RowError
from torchspec.images import BadImage, Measured, VisionTower, digest_of, open_picture

_SHOWN = 60
"""Characters of a path or URL in an error."""


@dataclass(frozen=True)
class Found:
    """An image of a row."""

    encoded: bytes
    path: str
    """Of its file; "" where it came inside the row."""
    digest: str
    size: Measured


def find_image(source: Any, *, folder: Path, tower: VisionTower) -> Found:
    """Read and measure one image.

    Args:
        source: as the row has it.
        folder: that paths are relative to.
        tower: says how many tokens it becomes.

    Raises:
        RowError: it is not there, or is none.
    """
    if isinstance(source, dict):  # {url: ...} of OpenAI's image_url, {bytes: ..., path: ...} of datasets
        source = source.get("bytes") or source.get("url") or source.get("base64") or source.get("path")
    if not isinstance(source, str) or not source:
        raise RowError(f"has an image given as {type(source).__name__}, not as a path, a data: URL or base64")
    scheme = urlsplit(source[:32]).scheme.lower()
    path = ""
    if scheme == "data":
        encoded = _decoded(source.partition(",")[2], what="data: URL")
    elif scheme in ("http", "https", "ftp", "s3", "gs", "hf"):
        raise RowError(f"has an image at {source[:_SHOWN]}, and nothing is fetched from a network: download it and give its path")
    else:
        file = Path(unquote(urlsplit(source).path) if scheme == "file" else source).expanduser()
        if _is_file(folder / file):
            path = str((folder / file).resolve())
            encoded = _read(path)
        elif scheme == "file" or file.suffix:  # base64 has no dot
            raise RowError(f"has an image at {source[:_SHOWN]}, which is no file (paths are relative to {folder})")
        else:
            encoded = _decoded(source, what="base64")
    try:
        return Found(encoded, path, digest_of(encoded), tower.measure(open_picture(encoded)))
    except BadImage as error:
        raise RowError(f"has an image ({path or 'inside the row'}) that {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name: it is none
        return False


def _decoded(text: str, *, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RowError(f"has an image given as {what} that does not decode") from None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RowError(f"has an image at {path[-_SHOWN:]} that cannot be read ({error.strerror})") from None
