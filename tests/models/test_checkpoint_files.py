"""Checkpoints are put in place whole: whatever moment a save is cut at, the one before it is there under its name."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from torchspec.errors import UserError
from torchspec.models.training.checkpoint import is_checkpoint, publish, read_draft_weights, read_entries, read_facts, recover
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
    facts = dict.fromkeys(("draft_config", "target", "family", "options", "draft_ids"), 1)
    torch.save({"torchspec": facts, "state_dict": {"task.draft.x": torch.zeros(10_000)}}, whole)
    assert read_facts(whole) == facts and read_draft_weights(whole)["x"].shape == (10_000,)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"not a checkpoint at all" * 100)
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    evil = tmp_path / "evil.ckpt"
    torch.save({"torchspec": _Runs()}, evil)
    bare = write(tmp_path / "sharded.ckpt", "", folder=True)
    for path, words in {cut: "cannot be read", garbage: "cannot be read", empty: "cannot be read", evil: "cannot be read"}.items():
        with pytest.raises(UserError, match=words) as refused:
            read_entries(path)
        assert path.name in str(refused.value)
    with pytest.raises(UserError, match="incomplete sharded checkpoint: .metadata missing"):
        read_entries(bare)
    with pytest.raises(UserError, match="does not exist"):
        read_entries(tmp_path / "none.ckpt")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, foreign)
    with pytest.raises(UserError, match="no checkpoint of a draft"):
        read_facts(foreign)
    torch.save({"torchspec": {"target": {}}}, foreign)
    with pytest.raises(UserError, match="lacks torchspec.draft_config"):
        read_facts(foreign)
    with pytest.raises(UserError, match="holds no weights"):
        read_draft_weights(foreign)


def sharded(path: Path) -> Path:
    """A sharded checkpoint, written as fsdp2 does."""
    state = {"state_dict": {"task.draft.x": torch.arange(10_000.0)}, "optimizer_0": {"state": {"x": {"exp_avg": torch.ones(10_000), "buffer": None}}}}
    with warnings.catch_warnings(action="ignore"):
        save(state, checkpoint_id=path)
    torch.save({"torchspec": dict.fromkeys(("draft_config", "target", "unroll_steps", "step_weights", "draft_ids"), 1), "global_step": 3}, path / "meta.pt")
    return path


def test_a_whole_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    path = sharded(tmp_path / "last.ckpt")
    assert read_entries(path)["global_step"] == 3
    assert torch.equal(read_draft_weights(path)["x"], torch.arange(10_000.0))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "incomplete sharded checkpoint: __0_0.distcp missing"),
        (lambda path: _cut(path / "__0_0.distcp"), r"incomplete sharded checkpoint: __0_0.distcp has [\d,]+ of [\d,]+ bytes"),
        (lambda path: (path / ".metadata").unlink(), "incomplete sharded checkpoint: .metadata missing"),
        (lambda path: _cut(path / ".metadata"), ".metadata.*cannot be read"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps(_Runs())), ".metadata.*is no part of a checkpoint's metadata"),
        (lambda path: (path / ".metadata").write_bytes(pickle.dumps(3)), ".metadata.*cannot be read"),
        (lambda path: _cut(path / "meta.pt"), "meta.pt.*cannot be read"),
    ],
    ids=["no shard", "half a shard", "no metadata", "half of the metadata", "evil metadata", "other metadata", "half of the facts"],
)
def test_a_partial_sharded_checkpoint_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    path = sharded(tmp_path / "last.ckpt")
    damage(path)
    for read_it in (read_entries, read_draft_weights)[: 1 if "meta.pt" in words else 2]:  # weights are not in meta.pt
        with pytest.raises(UserError, match=words):
            read_it(path)


def test_a_shard_with_other_bytes_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "last.ckpt")
    (path / "__0_0.distcp").write_bytes(b"x" * (path / "__0_0.distcp").stat().st_size)
    with pytest.raises(UserError, match="cannot be read"):
        read_draft_weights(path)


def test_readers_find_the_folder_that_stepped_aside_and_leave_it_there(tmp_path: Path) -> None:
    sharded(tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.previous")
    assert read_entries(tmp_path / "last.ckpt")["global_step"] == 3
    assert read_draft_weights(tmp_path / "last.ckpt")["x"].shape == (10_000,)
    assert is_checkpoint(tmp_path / "last.ckpt") and [path.name for path in tmp_path.iterdir()] == [".last.ckpt.previous"]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_a_killed_save_left_is_taken_away_by_the_next_run(tmp_path: Path, folder: bool) -> None:
    write(tmp_path / ".last.ckpt.partial", "hal", folder=folder)
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = write(tmp_path / "last.ckpt", "old", folder=True)
    partial = write(tmp_path / ".last.ckpt.partial", "new", folder=True)
    (partial / ".metadata").touch()
    seen: list[tuple[str, bool, bool]] = []
    sync = os.fsync

    def told(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((path.name, partial.exists(), (tmp_path / ".last.ckpt.previous").exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    publish(partial, final)
    assert sorted(seen[:3]) == [(".last.ckpt.partial", True, False), (".metadata", True, False), ("meta.pt", True, False)]
    assert seen[2][0] == ".last.ckpt.partial" and seen[3:] == [(tmp_path.name, False, True)]


def _full(path: Path) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:604] . unexpected pos 64 vs 0")


def _rank_failed(path: Path) -> None:
    failure = OSError(28, "No space left on device")
    raise CheckpointException("save", {1: _wrap_exception(failure)})


@pytest.mark.parametrize(("fails", "words"), [(_full, "unexpected pos"), (_rank_failed, "No space left on device")], ids=["archive writer", "a rank's shard"])
def test_a_full_disk_in_torchs_words_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path], None], words: str
) -> None:
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def half(self: Any, filepath: Any, *_: Any) -> None:
        write(Path(filepath), "hal", folder=True)
        fails(filepath)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", half)
    with pytest.raises(UserError, match=f"cannot be written .*{words}"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_the_disks_is_not_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def fails(self: Any, filepath: Any, *_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", fails)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
