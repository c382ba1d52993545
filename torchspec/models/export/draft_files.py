"""A draft's tensors on disk: safetensors, in one file or in shards with an index, as Transformers lays them out and every server reads them.

Published drafts also come as ``pytorch_model.bin``; those are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.files import dumps
from torchspec.paths import home
from torchspec.proxies import through_to_hub

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"


def write_tensors(folder: Path, tensors: dict[str, Tensor], *, max_shard_size: str = "5GB") -> list[str]:
    """Write tensors, in as many files as ``max_shard_size`` asks for, and force them to the disk.

    Args:
        folder: exists.
        tensors: contiguous, on the host.
        max_shard_size: such as 5GB; a larger tensor gets a file of its own.

    Returns:
        Names of the files written.

    Raises:
        OSError, safetensors.SafetensorError: no room.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        with (folder / file).open("rb") as handle:
            os.fsync(handle.fileno())
    if split.is_sharded:
        (folder / INDEX).write_text(dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2) + "\n")
        return [*split.filename_to_tensors, INDEX]
    return list(split.filename_to_tensors)


def locate_draft(source: str, *, revision: str | None = None, beside: Sequence[str] = (), weights: bool = True) -> tuple[Path, Path | None]:
    """Folder that holds a draft's files, and its weights where ``source`` is one file.

    Args:
        source: a directory, one file of weights with its ``config.json`` beside it, or a hub id.
        revision: branch, tag or commit of a hub id.
        beside: names of further files that it may have.
        weights: whether they are wanted too, and not ``config.json`` alone.

    Raises:
        UserError: nothing there.
    """
    path = Path(home(source))
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, path
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError("draft", source, "does not exist", "give a directory, a file of weights, or a hub id (org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = ["config.json", *(["*.safetensors", INDEX, _PICKLED, *beside] if weights else [])]
        return Path(snapshot_download(source, revision=revision, allow_patterns=files)), None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError("draft", source, f"cannot be fetched{through_to_hub()} ({reason})", "check the hub id and the network, or give a directory") from error


def read_description(folder: Path) -> dict[str, Any]:
    """``config.json`` of a draft.

    Raises:
        UserError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError("draft", str(folder), "holds no config.json", "give a directory that a trainer exported, or put its config.json beside the weights")
    try:
        described = json.loads(file.read_text())
    except ValueError as error:
        raise UserError("draft", str(file), f"is no JSON ({error})", "correct the file") from error
    if not isinstance(described, dict):
        raise UserError("draft", str(file), "is no JSON object", "give a draft's config.json")
    return described


def read_draft_tensors(folder: Path, file: Path | None = None) -> dict[str, Tensor]:
    """All tensors of a draft.

    Args:
        folder: from :func:`locate_draft`.
        file: the one file of weights, where that was given.

    Raises:
        UserError: no weights, a missing shard, a damaged file, or one name in two files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file is not None:
        files = [file]
    elif (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors")) or [folder / _PICKLED]
    found: dict[str, Tensor] = {}
    for part in files:
        if not part.is_file():
            raise UserError("draft", str(folder), f"lacks {part.name}", "complete the directory")
        try:
            tensors = load_file(part) if part.suffix == ".safetensors" else torch.load(part, map_location="cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise UserError("draft", str(part), f"cannot be read ({str(error).splitlines()[0][:120]})", "the file is damaged: fetch it again") from error
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise UserError("draft", str(folder), f"holds {twice[0]} in two files", "remove the files that do not belong to the draft")
        found |= tensors
    return found
