"""What a user names for a command to write or to run on, tried before the work: a traceback after an hour of it is no answer."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from torchspec.errors import UserError
from torchspec.files import Ours, refuse_foreign


def output_file(given: str, *, field: str, ours: Ours | None = None, what: str = "") -> Path:
    """A file that can be written; its folder is made.

    Args:
        given: by the user.
        field: the option.
        ours: knows what this command wrote before, the only thing it may replace; None for a file that is gone on with.
        what: it writes.

    Raises:
        UserError: a folder, somebody else's file, or a place where nothing can be written.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        raise UserError(field, given, "is a folder", "give a file")
    if ours is not None:
        refuse_foreign(path, ours, field=field, what=what)
    path = path.resolve()
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise _unwritable(given, field, error) from None
    return path


def output_folder(given: str, *, field: str) -> Path:
    """A folder in which files can be written; it is made.

    Raises:
        UserError: a file, or a place where nothing can be written.
    """
    path = Path(given).expanduser()
    if path.is_file():
        raise UserError(field, given, "is a file", "give a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _unwritable(given, field, error) from None
    return path


def _unwritable(given: str, field: str, error: OSError) -> UserError:
    return UserError(field, given, f"cannot be written ({error.strerror})", "give another place, or mend its permissions")


def check_device(device: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        UserError: an unknown name, or CUDA where there is none.
    """
    import torch

    named = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if named is None:
        raise UserError("device", device, "is no device", "use auto, cpu, or a CUDA device such as cuda:0")
    if device.startswith("cuda") and int(named.group(1) or 0) >= torch.cuda.device_count():
        raise UserError("device", device, f"is not there ({torch.cuda.device_count()} CUDA devices are)", "use auto or cpu, or check the driver")
