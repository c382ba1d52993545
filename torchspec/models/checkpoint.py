"""Training checkpoints on disk, a single file (auto, ddp) or a sharded folder (fsdp2): put in place whole, and read without a trainer."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError

_FOLDER_FACTS = "meta.pt"
"""Lightning's name of the file beside the shards that holds everything but weights and optimizer."""


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name. A file replaces the old one in one step; a folder cannot, so the old one steps aside first (:func:`recover`)."""
    if not partial.is_dir():
        partial.replace(final)
        return
    previous = final.with_name(f".{final.name}.previous")
    remove(previous)
    if final.is_dir() and not final.is_symlink():
        final.rename(previous)
    else:
        final.unlink(missing_ok=True)
    partial.rename(final)
    remove(previous)


def recover(folder: Path) -> None:
    """Undo what a crash inside :func:`publish` left in a folder: a sharded checkpoint that had stepped aside for one that never took its place."""
    for previous in folder.glob(".*.previous") if folder.is_dir() else ():
        final = folder / previous.name.removeprefix(".").removesuffix(".previous")
        if final.exists():
            remove(previous)
        else:
            previous.rename(final)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named or laid out as a training checkpoint; says nothing of its being whole."""
    return path.suffix == ".ckpt" or (path / _FOLDER_FACTS).is_file()


def read_entries(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but sharded tensors (for a single file: the whole of it, memory-mapped).

    Raises:
        UserError: when nothing is there, or it is not whole.
    """
    if not path.exists():
        raise UserError("ckpt_path", str(path), "does not exist", "check the path; checkpoints are under the run's folder")
    if path.is_dir():
        missing = [name for name in (_FOLDER_FACTS, ".metadata") if not (path / name).is_file()]
        if missing:
            raise UserError("ckpt_path", str(path), f"is an incomplete sharded checkpoint: {', '.join(missing)} missing", "use another checkpoint")
    file = path / _FOLDER_FACTS if path.is_dir() else path
    try:
        entries: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=path.is_file())
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            "ckpt_path", str(file), f"cannot be read ({str(error).splitlines()[0][:120]})", "the file is damaged: use another checkpoint"
        ) from error
    return entries


def read_facts(path: Path) -> dict[str, Any]:
    """The ``torchspec`` entry of a checkpoint (``DraftModule.facts``).

    Raises:
        UserError: when the checkpoint is missing, damaged, or not of a draft.
    """
    facts: dict[str, Any] | None = read_entries(path).get("torchspec")
    if facts is None:
        raise UserError("ckpt_path", str(path), "holds no torchspec entry: it is no checkpoint of a draft", "give one that fit wrote")
    return facts


def read_draft_weights(path: Path) -> dict[str, Tensor]:
    """The draft's trained tensors by their name in ``Eagle3Draft``, fp32, whole.

    Raises:
        UserError: see :func:`read_entries`; also when no draft weights are inside.
    """
    prefix = "task.draft."
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load

        read_entries(path)
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        wanted = {key: meta for key, meta in known.items() if key.startswith(f"state_dict.{prefix}") and isinstance(meta, TensorStorageMetadata)}
        state: dict[str, Any] = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in wanted.items()}
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
        tensors = {key.removeprefix(f"state_dict.{prefix}"): value for key, value in state.items()}
    else:
        tensors = {key.removeprefix(prefix): value for key, value in read_entries(path).get("state_dict", {}).items() if key.startswith(prefix)}
    if not tensors:
        raise UserError("ckpt_path", str(path), f"holds no weights under {prefix}*", "give a checkpoint that fit wrote")
    return tensors
