"""Checkpoints are put in place whole: whatever moment a save is cut at, the one before it is there under its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from torchspec.errors import UserError
from torchspec.models.checkpoint import publish, read_draft_weights, read_entries, read_facts, recover
from torchspec.trainer import Trainer


def write(path: Path, content: str, *, folder: bool) -> Path:
    """A checkpoint of either form."""
    if folder:
        path.mkdir()
        (path / "meta.pt").write_text(content)
    else:
        path.write_text(content)
    return path


def read(path: Path) -> str:
    return (path / "meta.pt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path: Path, folder: bool) -> None:
    final = write(tmp_path / "last.ckpt", "old", folder=folder)
    publish(write(tmp_path / ".last.ckpt.partial", "new", folder=folder), final)
    assert read(final) == "new" and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_also_replaces_a_file_and_a_file_a_link(tmp_path: Path) -> None:
    final = write(tmp_path / "last.ckpt", "old", folder=False)
    publish(write(tmp_path / "partial", "sharded", folder=True), final)
    assert read(final) == "sharded"
    kept = write(tmp_path / "kept.ckpt", "kept", folder=False)
    link = tmp_path / "link.ckpt"
    link.symlink_to(kept)
    publish(write(tmp_path / "partial", "new", folder=False), link)
    assert read(link) == "new" and read(kept) == "kept"


def test_a_crash_between_the_two_renames_of_a_folder_is_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = write(tmp_path / "last.ckpt", "old", folder=True)
    partial = write(tmp_path / ".last.ckpt.partial", "new", folder=True)
    rename = Path.rename

    def killed(self: Path, target: Any) -> Path:
        if self == partial:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(partial, final)
    assert not final.exists()
    recover(tmp_path)
    assert read(final) == "old"
    recover(tmp_path)  # idempotent
    assert read(final) == "old"


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["killed", "disk full"])
def test_a_save_that_is_cut_leaves_the_checkpoint_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, error: BaseException) -> None:
    final = write(tmp_path / "last.ckpt", "old", folder=folder)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def half(self: Any, filepath: Any, *_: Any) -> None:
        write(Path(filepath), "hal", folder=folder)
        raise error

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", half)
    with pytest.raises((KeyboardInterrupt, UserError)):
        trainer.save_checkpoint(final)
    assert read(final) == "old"
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda self, filepath, *_: write(Path(filepath), "new", folder=folder) and None)
    trainer.save_checkpoint(final)  # over what was left half-way
    assert read(final) == "new" and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class _Runs:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_partial_and_foreign_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"torchspec": {"a": 1}, "state_dict": {"task.draft.x": torch.zeros(10_000)}}, whole)
    assert read_facts(whole) == {"a": 1} and read_draft_weights(whole)["x"].shape == (10_000,)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"not a checkpoint at all" * 100)
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    evil = tmp_path / "evil.ckpt"
    torch.save({"torchspec": _Runs()}, evil)
    sharded = write(tmp_path / "sharded.ckpt", "", folder=True)
    for path, words in {cut: "cannot be read", garbage: "cannot be read", empty: "cannot be read", evil: "cannot be read"}.items():
        with pytest.raises(UserError, match=words) as refused:
            read_entries(path)
        assert path.name in str(refused.value)
    with pytest.raises(UserError, match="incomplete sharded checkpoint: .metadata missing"):
        read_entries(sharded)
    with pytest.raises(UserError, match="does not exist"):
        read_entries(tmp_path / "none.ckpt")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, foreign)
    with pytest.raises(UserError, match="no checkpoint of a draft"):
        read_facts(foreign)
    with pytest.raises(UserError, match="holds no weights"):
        read_draft_weights(foreign)
