"""Training checkpoints on disk, a single file (auto, ddp) or a sharded folder (fsdp2): put in place whole, and read without a trainer."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.families import with_family
from torchspec.models.ops.not_finite import no_longer_numbers, not_finite
from torchspec.paths import home

_FOLDER_FACTS = "meta.pt"
"""Lightning's name of the file beside the shards that holds everything but weights and optimizer."""

_FACTS = ("draft_config", "target", "family", "options", "draft_ids")
"""What every ``torchspec`` entry holds."""
_UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError)
_ANOTHER = "use another checkpoint"


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name. A file replaces a file in one step; where either is a folder the old one steps aside first (:func:`recover`).

    What is in it is on the disk before it has its name, and the name before this returns: a machine that loses its power keeps one of the two.
    """
    for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        _sync(path)
    before = final.is_dir() and not final.is_symlink()
    if before or partial.is_dir():
        previous = _aside(final)
        if previous.is_dir():
            _retire(previous, final)
        if before:
            final.rename(previous)
        else:
            final.unlink(missing_ok=True)
        partial.rename(final)
        _sync(final.parent)
        if previous.is_dir():
            _retire(previous, final)
    else:
        partial.replace(final)
        _sync(final.parent)


def _retire(previous: Path, final: Path) -> None:
    """Remove the folder that stepped aside; what somebody put into it beside the checkpoint's own files goes to its successor.

    A successor that is a file has ``NAME.others`` beside it for that.
    """
    for name in beside_shards(previous):
        place = final if final.is_dir() else final.with_name(f"{final.name}.others")
        if not (place / name).exists():
            place.mkdir(exist_ok=True)
            (previous / name).rename(place / name)
    remove(previous)


def beside_shards(path: Path) -> list[str]:
    """Names in the folder of a sharded checkpoint that are no part of it; none for a file."""
    if not path.is_dir():
        return []
    return sorted(each.name for each in path.iterdir() if each.name not in (_FOLDER_FACTS, ".metadata") and each.suffix != ".distcp")


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise  # some network file systems know no fsync of a folder
    finally:
        os.close(descriptor)


def partial_of(final: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return final.with_name(f".{final.name}.partial")


def _aside(final: Path) -> Path:
    """Where the folder that :func:`publish` replaces waits for its successor."""
    return final.with_name(f".{final.name}.previous")


def recover(folder: Path) -> None:
    """Undo what a crash while saving left in a folder: half of a checkpoint, or a sharded one that had stepped aside for one that never took its place.

    For the run that writes there alone: to others :func:`standing` says where a checkpoint is.
    """
    if not folder.is_dir():
        return
    for partial in folder.glob(".*.ckpt.partial"):
        remove(partial)
    for previous in folder.glob(".*.ckpt.previous"):
        final = folder / previous.name.removeprefix(".").removesuffix(".previous")
        if final.exists():
            if previous.is_dir():
                _retire(previous, final)
            remove(previous)
        else:
            previous.rename(final)


def standing(path: Path) -> Path:
    """The checkpoint of a name: what has it, or the folder that stepped aside for one that a crash kept from taking it."""
    path = home(path)
    aside = _aside(path)
    return aside if not path.exists() and aside.is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named or laid out as a training checkpoint; says nothing of its being whole."""
    return path.suffix == ".ckpt" or (standing(path) / _FOLDER_FACTS).is_file()


def is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of a draft; a damaged one is nobody's that we know."""
    try:
        return "torchspec" in read_entries(path)
    except UserError:
        return False


def read_entries(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but sharded tensors (for a single file: the whole of it, memory-mapped).

    Raises:
        UserError: when nothing is there, or it is not whole.
    """
    path = standing(path)
    if not path.exists():
        raise UserError("ckpt_path", str(path), "does not exist", "check the path; checkpoints are under the run's folder")
    if path.is_dir():
        shard_metadata(path)
    file = path / _FOLDER_FACTS if path.is_dir() else path
    try:
        entries: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=path.is_file())
    except _UNREADABLE as error:
        raise _damaged(file, error) from error
    return entries


def shard_metadata(path: Path) -> Any:
    """The ``.metadata`` of a sharded checkpoint, of which all is there (``torch.distributed.checkpoint.metadata.Metadata``).

    Nothing but the types of such a file is unpickled, so a foreign one runs nothing; its readers in torch are given it after this one.

    Raises:
        UserError: a file is missing, shorter than the others say, or cannot be read.
    """
    missing = [name for name in (_FOLDER_FACTS, ".metadata") if not (path / name).is_file()]
    if not missing:
        file = path / ".metadata"
        try:
            with file.open("rb") as handle:
                metadata = _MetadataReader(handle).load()
            needed: dict[str, int] = {}
            for part in metadata.storage_data.values():
                needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
        except (*_UNREADABLE, AttributeError, TypeError, ImportError, IndexError, KeyError) as error:
            raise _damaged(file, error) from error
        missing = sorted(name for name in needed if not (path / name).is_file())
    if missing:
        raise UserError("ckpt_path", str(path), f"is an incomplete sharded checkpoint: {', '.join(missing)} missing", _ANOTHER)
    cut = {name: size for name, length in sorted(needed.items()) if (size := (path / name).stat().st_size) < length}
    if cut:
        said = ", ".join(f"{name} has {size:,} of {needed[name]:,} bytes" for name, size in cut.items())
        raise UserError("ckpt_path", str(path), f"is an incomplete sharded checkpoint: {said}", _ANOTHER)
    return metadata


class _MetadataReader(pickle.Unpickler):
    """Refuses every name that no ``.metadata`` of torch holds."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _NAMES = (
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        path = module.split(".")[0] == "pathlib" and name in ("Path", "PosixPath", "PurePosixPath")
        if path or module in ("torch", self._METADATA) or (module, name) in self._NAMES:
            found = super().find_class(module, name)
            defined = isinstance(found, type) and found.__module__ == self._METADATA
            if path or defined or (module, name) in self._NAMES or isinstance(found, torch.dtype | torch.memory_format):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


def unwrapped(error: BaseException) -> BaseException:
    """What a ``CheckpointException`` of torch is about: the first failure of a rank, or itself. It is no Exception, so ``except Exception`` misses it."""
    failures = getattr(error, "failures", None)
    return next((failure for failure, _ in failures.values()), error) if isinstance(failures, dict) else error


def is_failed_write(error: BaseException) -> bool:
    """Whether the disk refused a write: an OSError, or what torch's archive writer makes of one."""
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "PytorchStreamWriter")))


def _damaged(path: Path, error: BaseException) -> UserError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError("ckpt_path", str(path), f"cannot be read ({said})", f"the file is damaged: {_ANOTHER}")


def read_facts(path: Path) -> dict[str, Any]:
    """The ``torchspec`` entry of a checkpoint (``DraftModule.facts``).

    Raises:
        UserError: when the checkpoint is missing, damaged, or not of a draft.
    """
    facts: dict[str, Any] | None = read_entries(path).get("torchspec")
    if facts is None:
        raise UserError("ckpt_path", str(path), "holds no torchspec entry: it is no checkpoint of a draft", "give one that fit wrote")
    facts = with_family(facts)
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise UserError("ckpt_path", str(path), f"lacks {', '.join(f'torchspec.{name}' for name in missing)}", _ANOTHER)
    return facts


def read_draft_weights(path: Path, which: Literal["raw", "average"] | None = None) -> dict[str, Tensor]:
    """The draft's trained tensors by their name in its network, fp32, whole.

    Args:
        path: of the checkpoint.
        which: the weights in training, or their average; None takes the average where there is one.

    Raises:
        UserError: see :func:`read_entries`; also when no draft weights are inside, or no average that was asked for.
    """
    prefix = "task.draft."
    tensors = _read_weights(path, prefix)
    averages = {} if which == "raw" else read_averages(path, prefix)
    if which == "average" and not averages:
        fix = "use raw; torchspec.callbacks.average.Average makes averages"
        raise UserError("weights", "average", f"are not in {path}, or are what it holds alone", fix)
    if wrong := not_finite(averages.items()):
        raise UserError("ckpt_path", str(path), f"is of no use: its {no_longer_numbers(wrong)}", "use an earlier checkpoint")
    return {**tensors, **averages}


def read_averages(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Averages (``callbacks/average.py``) of tensors whose names begin with ``prefix``, by what follows it; whole, and
    empty where there are none.

    Raises:
        UserError: see :func:`read_entries`.
    """
    from torchspec.models.training.averages import KEY, averages_in

    path = standing(path)
    entries = read_entries(path)
    if not (entries.get("torchspec") or {}).get("averages"):
        return {}
    if not path.is_dir():
        return {name.removeprefix(prefix): t for name, t in averages_in(entries).items() if name.startswith(prefix)}
    return _read_shards(path, f"optimizer_0.state.{prefix}", f".{KEY}")


def _read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    path = standing(path)
    if path.is_dir():
        tensors = _read_shards(path, f"state_dict.{prefix}", "")
    else:
        tensors = {key.removeprefix(prefix): value for key, value in read_entries(path).get("state_dict", {}).items() if key.startswith(prefix)}
    if not tensors:
        raise UserError("ckpt_path", str(path), f"holds no weights under {prefix}*", "give a checkpoint that fit wrote")
    if wrong := not_finite(tensors.items()):
        raise UserError("ckpt_path", str(path), f"is of no use: its {no_longer_numbers(wrong)}", "use an earlier checkpoint")
    return tensors


def _read_shards(path: Path, prefix: str, suffix: str) -> dict[str, Tensor]:
    """Tensors of a sharded checkpoint whose keys begin and end so, by what is between."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    wanted = {
        key: meta
        for key, meta in shard_metadata(path).state_dict_metadata.items()
        if key.startswith(prefix) and key.endswith(suffix) and isinstance(meta, TensorStorageMetadata)
    }
    state: dict[str, Any] = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in wanted.items()}
    try:
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
    except BaseException as error:
        cause = unwrapped(error)
        if not isinstance(cause, _UNREADABLE):
            raise
        raise _damaged(path, cause) from error
    return {key.removeprefix(prefix).removesuffix(suffix): value for key, value in state.items()}
