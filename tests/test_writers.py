"""Nothing of the user's is ever removed: each writer, beside files that are not its own."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.exports import export_variant, save_plain_target
from torchspec import folders
from torchspec.callbacks.acceptance import AcceptanceLength
from torchspec.callbacks.export import ExportDraft
from torchspec.callbacks.on_policy import _free, _remove
from torchspec.callbacks.provenance import Provenance
from torchspec.data.outputs import output_file, output_folder
from torchspec.data.regenerate import made_with
from torchspec.data.show import is_page, page
from torchspec.data.vocabulary_report import TokenCounts, is_plot
from torchspec.data.vocabulary_report import plot as drawn
from torchspec.errors import UserError
from torchspec.files import dumps, json_with, spare_name, write
from torchspec.models.training.checkpoint import publish, recover
from torchspec.saved_config import save_configuration
from torchspec.target import Target
from torchspec.transfer.shards import Manifest, ShardWriter, shards_in
from torchspec.transfer.spec import RecordSpec

PACKAGE = Path(__file__).resolve().parents[1] / "torchspec"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def refused(target: Target, folder: Path, *names: str) -> None:
    """An export to it is refused by these names, and everything stays."""
    around = folder.resolve().parent
    before = tree(around)
    with pytest.raises(UserError) as said:
        export_variant("plain", target, folder)
    assert all(name in str(said.value) for name in names), said.value
    assert tree(around) == before


# -- exports


def test_an_export_leaves_a_model_given_as_output(target: Target, tmp_path: Path) -> None:
    save_plain_target(tmp_path / "model")
    (tmp_path / "model" / "my_notes.txt").write_text("read me")
    refused(target, tmp_path / "model", "config.json", "model.safetensors", "my_notes.txt")


def test_an_export_leaves_notes_beside_a_draft_folders_in_it_and_an_edited_readme(target: Target, tmp_path: Path) -> None:
    draft = export_variant("plain", target, tmp_path / "draft").folder
    for spoil in ("notes.txt", "results/a.json", "README.md"):
        kept = (draft / spoil).read_bytes() if (draft / spoil).is_file() else None
        (draft / spoil).parent.mkdir(exist_ok=True)
        (draft / spoil).write_text("mine")
        refused(target, draft, spoil)
        (draft / spoil).unlink()
        if kept is not None:
            (draft / spoil).write_bytes(kept)
    assert (draft / "results").is_dir()
    refused(target, draft, "results/")
    (draft / "results").rmdir()
    export_variant("plain", target, draft)


def test_an_export_of_before_marks_is_told_as_what_it_may_be(target: Target, tmp_path: Path) -> None:
    draft = export_variant("plain", target, tmp_path / "draft").folder
    (draft / folders.MARK).unlink()
    before = tree(draft)
    with pytest.raises(UserError, match=r"holds files that may be yours: README\.md, .*earlier TorchSpec, which left no mark.* remove it"):
        export_variant("plain", target, draft)
    assert tree(draft) == before


def test_an_export_replaces_an_export(target: Target, tmp_path: Path) -> None:
    export_variant("plain", target, tmp_path / "draft", max_shard_size="5KB")
    assert len(list((tmp_path / "draft").glob("*.safetensors"))) > 1
    export_variant("plain", target, tmp_path / "draft")
    assert sorted(path.name for path in (tmp_path / "draft").iterdir()) == [folders.MARK, "README.md", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_an_export_through_a_link_goes_where_it_points(target: Target, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export_variant("plain", target, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    (tmp_path / "real" / "mine").symlink_to(tmp_path / "elsewhere")
    refused(target, tmp_path / "link", "mine")


def test_an_export_to_a_file_says_so(target: Target, tmp_path: Path) -> None:
    (tmp_path / "draft").write_text("mine")
    refused(target, tmp_path / "draft", "is a file")
    with pytest.raises(UserError, match="export directory"):
        export_variant("plain", target, tmp_path / "draft" / "below")


def test_an_export_into_the_working_folder_fills_it_and_leaves_what_is_there(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path.cwd().stat().st_ino
    for size in ("5KB", "5GB"):
        export_variant("plain", target, Path(), max_shard_size=size)
        assert Path.cwd().stat().st_ino == inode and Path("config.json").is_file()  # a shell in it still sees it
    assert sorted(os.listdir()) == [folders.MARK, "README.md", "config.json", "model.safetensors"]
    Path("notes").touch()
    refused(target, Path(), "notes")


def test_an_export_to_the_home_folder_is_refused_without_a_walk_through_it(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "Documents").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused(target, Path("~"), "Documents")


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_an_export_killed_at_any_call_leaves_a_whole_draft_and_is_cleared_away(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Each step that moves or removes something is the last of some run; what it left is put right by the next."""
    draft = tmp_path / "draft"
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    export_variant("plain", target, draft)
    whole = tree(draft)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom torchspec import folders\n"
        "left = int(sys.argv[1])\n"
        f"{'' if exchange else 'folders._exchange = lambda one, other: False'}\n"
        "def watch(event, args):\n    global left\n"
        "    if event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir') or (event == 'ctypes.call_function'):\n"
        "        left -= 1\n        if left == 0: os._exit(9)\n"
        "sys.addaudithook(watch)\n"
        "with folders.workplace(Path(sys.argv[2]), field='output') as made:\n"
        "    for name in ('config.json', 'README.md', 'model.safetensors'): (made / name).write_text('new')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for step in range(1, 40):
        done = subprocess.run([sys.executable, "-c", script, str(step), str(draft)], env=environment, capture_output=True, text=True, check=False)
        there = draft if draft.exists() else tmp_path / ".draft.torchspec-previous"
        read = tree(there)
        assert read == whole or {name for name in read if name != folders.MARK and read[name] != b"new"} == set(), (step, done.stderr)
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
    assert done.returncode == 0 and tree(draft)["config.json"] == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_workplace_of_a_living_process_and_a_strangers_folder_of_its_name_stay(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        living, strange = tmp_path / f".draft{folders._PARTIAL}{other.pid}", tmp_path / f".draft{folders._PARTIAL}mine"
        for folder in (living, strange):
            folder.mkdir()
            (folder / "a").touch()
        (living / folders.MARK).write_text(json.dumps({"unfinished": True, "host": os.uname().nodename, "pid": other.pid}))
        with folders.workplace(tmp_path / "draft", field="output") as made:
            (made / "config.json").touch()
        assert (living / "a").is_file() and (strange / "a").is_file()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with folders.workplace(tmp_path / "draft", field="output") as made:
        (made / "config.json").touch()
    assert not living.exists() and strange.exists()


def test_what_comes_while_an_export_runs_stays(tmp_path: Path) -> None:
    for _ in range(2):
        with folders.workplace(tmp_path / "draft", field="output") as made:
            (made / "config.json").write_text("old")
    with pytest.raises(UserError, match="note"), folders.workplace(tmp_path / "draft", field="output") as made:
        (tmp_path / "draft" / "note").write_text("mine")
        (made / "config.json").write_text("new")
    assert (tmp_path / "draft" / "note").read_text() == "mine" and (tmp_path / "draft" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_what_a_command_reads_is_no_output(tmp_path: Path) -> None:
    with folders.workplace(tmp_path / "draft", field="output") as made:
        (made / "model.safetensors").touch()
    for reads in (tmp_path / "draft", tmp_path / "draft" / "model.safetensors"):
        with pytest.raises(UserError, match="is what is read"):
            folders.check_output(tmp_path / "draft", field="output", reads=reads)


def run_of(folder: Path, **more: Any) -> Any:
    """As much of a trainer as callbacks ask for."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(default_root_dir=str(folder), is_global_zero=True, fast_dev_run=False, strategy=strategy, checkpoint_callbacks=[], **more)


@pytest.mark.parametrize("which", ["draft/thesis.tex", "export.ckpt"])
def test_export_draft_says_before_training_what_is_in_the_way(tmp_path: Path, which: str) -> None:
    (tmp_path / which).parent.mkdir(exist_ok=True)
    (tmp_path / which).write_text("mine")
    with pytest.raises(UserError, match=Path(which).name):
        ExportDraft().setup(run_of(tmp_path), SimpleNamespace(start=None), "fit")
    with folders.workplace(tmp_path / "from", field="output") as made:
        (made / "config.json").touch()
    with pytest.raises(UserError, match="is what is read"):
        ExportDraft(str(tmp_path / "from")).setup(run_of(tmp_path), SimpleNamespace(start=SimpleNamespace(source=str(tmp_path / "from"))), "fit")


def test_served_drafts_leave_what_no_run_wrote(tmp_path: Path) -> None:
    for name in ("step-final", "step-50"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "step-9.ckpt").write_text("mine")
    (tmp_path / "step-list.txt").write_text("mine")
    before = tree(tmp_path)
    for path in tmp_path.glob("step-*"):
        _remove(path)
    assert tree(tmp_path) == before
    assert _free(tmp_path / "step-50") == tmp_path / "step-50-1" and _free(tmp_path / "step-100") == tmp_path / "step-100"


# -- checkpoints


def test_what_lies_in_a_sharded_checkpoint_goes_on_to_its_successor(tmp_path: Path) -> None:
    final, partial = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
    for folder, content in ((final, "old"), (partial, "new")):
        folder.mkdir()
        (folder / "meta.pt").write_text(content)
        (folder / "__0_0.distcp").write_text(content)
    (final / "notes.txt").write_text("mine")
    publish(partial, final)
    assert tree(final) == {"__0_0.distcp": b"new", "meta.pt": b"new", "notes.txt": b"mine"}
    (final / "notes.txt").rename(tmp_path / "notes.txt")
    final.rename(tmp_path / ".last.ckpt.previous")  # killed between its steps, with a successor in place
    (tmp_path / "notes.txt").rename(tmp_path / ".last.ckpt.previous" / "notes.txt")
    final.mkdir()
    recover(tmp_path)
    assert tree(tmp_path) == {"last.ckpt": b"", "last.ckpt/notes.txt": b"mine"}


@pytest.mark.parametrize(("callback", "name"), [("ours", "last.ckpt"), ("best", "best.ckpt"), ("lightning", "last.ckpt"), ("link", "last.ckpt")])
def test_a_checkpoint_of_another_program_is_left_as_it_is(target: Target, tmp_path: Path, callback: str, name: str) -> None:
    """Whoever writes there: a name that is always the same, and ``last`` of Lightning's own, whatever its version counter."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.defects.fits import fit, module
    from torchspec.callbacks.last import LastCheckpoint

    (tmp_path / "checkpoints").mkdir()
    torch.save({"epoch": 3}, tmp_path / "checkpoints" / name)
    before = tree(tmp_path / "checkpoints")
    made = {
        "ours": lambda: LastCheckpoint(1),
        "best": lambda: ModelCheckpoint(filename="best", save_top_k=1, every_n_train_steps=1),
        "lightning": lambda: ModelCheckpoint(save_last=True),
        "link": lambda: ModelCheckpoint(save_last="link"),
    }[callback]()
    with pytest.raises(UserError, match=rf"{name}.*left as it is"):
        fit(tmp_path, module(target), steps=1, enable_checkpointing=True, callbacks=[made])
    assert tree(tmp_path / "checkpoints") == before


def test_a_file_in_the_place_of_the_checkpoints_is_told_before_training(target: Target, tmp_path: Path) -> None:
    from tests.defects.fits import fit, module
    from torchspec.callbacks.last import LastCheckpoint

    (tmp_path / "checkpoints").write_text("mine")
    for dirpath in (None, str(tmp_path / "checkpoints" / "below")):
        with pytest.raises(UserError, match=r"trainer\.callbacks=.*checkpoints.* is no folder"):
            fit(tmp_path, module(target), steps=1, enable_checkpointing=True, callbacks=[LastCheckpoint(1, dirpath=dirpath)])
    assert (tmp_path / "checkpoints").read_text() == "mine" and not (tmp_path / "logs").exists()


def test_notes_in_a_sharded_checkpoint_are_not_lost_to_a_link(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning removes a folder that stands where its link goes; an empty file holds nothing to lose."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.defects.fits import fit, module
    from torchspec import trainer

    place = tmp_path / "checkpoints" / "last.ckpt"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    monkeypatch.setattr(trainer, "is_ours", lambda path: path == place)
    with pytest.raises(UserError, match=r"would become a link, and holds what no run wrote: notes\.txt"):
        fit(tmp_path, module(target), steps=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(save_last="link")])
    assert (place / "notes.txt").read_text() == "mine"
    (place / "notes.txt").unlink()
    place.rmdir()
    place.touch()
    fit(tmp_path, module(target), steps=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(save_last=True)])
    assert place.stat().st_size > 0


def test_a_csv_of_the_users_is_not_removed_by_lightnings_logger(target: Target, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from tests.defects.fits import fit, module

    def run() -> None:
        fit(tmp_path, module(target), steps=1, logger=CSVLogger(str(tmp_path), name="", version=""))

    (tmp_path / "metrics.csv").write_text("name,score\nmine,1\n")
    with pytest.raises(UserError, match=r"metrics.csv.*no list of metrics"):
        run()
    assert (tmp_path / "metrics.csv").read_text() == "name,score\nmine,1\n"
    (tmp_path / "metrics.csv").unlink()
    run()
    run()  # over its own
    assert "step" in (tmp_path / "metrics.csv").read_text()


def test_hidden_files_of_others_beside_checkpoints_stay(tmp_path: Path) -> None:
    for name in (".download.partial", ".settings.previous", ".last.ckpt.partial"):
        (tmp_path / name).write_text("mine")
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".download.partial", ".settings.previous"]


# -- files of a run's folder


def test_a_configuration_of_the_users_stays_and_a_runs_own_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine\ntrainer: {}\n")
    assert save_configuration("a: 1\n", tmp_path / "config.yaml").name == "config-1.yaml"
    assert save_configuration("a: 2\n", tmp_path / "config.yaml").name == "config-1.yaml"
    assert (tmp_path / "config.yaml").read_text() == "# mine\ntrainer: {}\n"
    (tmp_path / "config-1.yaml").write_text((tmp_path / "config-1.yaml").read_text() + "# edited\n")
    assert save_configuration("a: 3\n", tmp_path / "config.yaml").name == "config-2.yaml"
    assert (tmp_path / "config-1.yaml").read_text().endswith("a: 2\n# edited\n")


def test_provenance_and_acceptance_leave_files_of_their_names(tmp_path: Path) -> None:
    for name in ("provenance.json", "acceptance.jsonl"):
        (tmp_path / name).write_text('{"title": "mine"}\n')
    module = SimpleNamespace(target=SimpleNamespace(describe=dict))
    trainer = run_of(tmp_path, world_size=1, datamodule=None, callbacks=[], loggers=[], state=SimpleNamespace(fn="fit"), global_step=0)
    for _ in range(2):
        Provenance().setup(trainer, module, "fit")
        walk = AcceptanceLength()
        walk._last = {"step": 0, "acceptance_length": 1.0, "rates": [], "drafts": 1, "loss": float("nan")}
        walk._flush(trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acceptance-1.jsonl", "acceptance.jsonl", "provenance-1.json", "provenance.json"]
    assert (tmp_path / "provenance.json").read_text() == (tmp_path / "acceptance.jsonl").read_text() == '{"title": "mine"}\n'
    assert json.loads((tmp_path / "provenance-1.json").read_text())["world_size"] == 1


# -- files that the user names


def test_commands_leave_a_file_that_they_did_not_write(tmp_path: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_text('{"messages": []}\n')
    for ours in (is_page, is_plot, TokenCounts.is_one, json_with("acceptance_length")):
        with pytest.raises(UserError, match="left as it is"):
            output_file(str(mine), field="output", ours=ours, what="output")
    assert mine.read_text() == '{"messages": []}\n'
    counts = TokenCounts(torch.arange(300), (1,), "t")
    made = {"page.html": page([], target="t"), "plot.svg": drawn(counts, title="t")}
    for name, text in made.items():
        write(tmp_path / name, text)
    counts.save(tmp_path / "counts.safetensors")
    (tmp_path / "empty").touch()
    for name, ours in {"page.html": is_page, "plot.svg": is_plot, "counts.safetensors": TokenCounts.is_one, "empty": is_page}.items():
        output_file(str(tmp_path / name), field="output", ours=ours)


def test_trying_an_output_leaves_links_and_files_of_any_name(tmp_path: Path) -> None:
    (tmp_path / ".torchspec-trial").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "later")
    output_folder(str(tmp_path), field="output")
    output_file(str(tmp_path / "link"), field="output")
    assert (tmp_path / ".torchspec-trial").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_a_file_is_written_whole_through_a_link_and_never_over_a_device(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new" and (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]
    assert spare_name(tmp_path / "real", json_with("x")).name == "real-1"


def test_regenerate_leaves_a_file_that_only_has_the_name_of_its_failures(tmp_path: Path) -> None:
    from torchspec.data.regenerate import answer_file
    from torchspec.engines.engine import Sampling

    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "out.jsonl.failed.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match="list of failed rows"):
        answer_file(
            SimpleNamespace(), made_with("t", Sampling()), input=str(tmp_path / "in.jsonl"), output=tmp_path / "out.jsonl", sampling=Sampling()
        )  # type: ignore[arg-type]  # fmt: skip
    assert (tmp_path / "out.jsonl.failed.jsonl").read_text() == '{"mine": 1}\n'


# -- records


def test_records_leave_other_tensors_in_their_folder_and_refuse_a_shards_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    spec = RecordSpec(target="t", tokenizer="", aux_layers=(1,), hidden_size=4, dtype="float32")
    save_file({"a": torch.ones(1)}, tmp_path / "records-of-my-band.safetensors")
    (tmp_path / ".records-0-playlist").write_text("mine")
    before = tree(tmp_path)
    ShardWriter(tmp_path, spec).close()
    assert {name: content for name, content in tree(tmp_path).items() if name in before} == before and shards_in(tmp_path) == []
    save_file({"a": torch.ones(1)}, tmp_path / "records-0-00000.safetensors")
    with pytest.raises(UserError, match=r"records-0-00000.safetensors.*is no shard of records"):
        ShardWriter(tmp_path, spec)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="manifest"):
        Manifest(spec, "exact").write(tmp_path / "other")


# -- all of them


KNOWN = {
    "folders.py": "its own workplaces, by mark",
    "files.py": "its own partial file; what it replaces was looked at",
    "logs.py": "logs of a run's own processes, moved to a name of theirs",
    "engines/sglang/engine.py": "sockets and shared memory of the SGLang that it started, by SGLang's own names",
    "tokenizer.py": "a temporary folder of its own",
    "acceptance.py": "a temporary folder of its own; logs of a report by name",
    "callbacks/on_policy.py": "drafts by mark, checkpoints by content",
    "callbacks/acceptance.py": "a list that is ours",
    "models/training/checkpoint.py": "checkpoints by name, what else lies in one is carried on",
    "models/export/export.py": "inside a workplace",
    "models/export/draft_files.py": "inside a workplace",
    "data/outputs.py": "a file that it made itself",
    "data/build.py": "entries of the cache, by hash",
    "data/prepare.py": "entries of the cache, by hash",
    "data/failures.py": "a list without lines of ours or others",
    "data/regenerate.py": "rows and failures that are ours",
    "transfer/shards.py": "parts of shards by name",
    "transfer/shm.py": "keys of a store",
    "transfer/shm_server.py": "stores by mark and lock",
}
"""Who removes or writes files, and what of."""
CALLS = {"rmtree", "unlink", "rmdir", "rename", "write_text", "write_bytes", "save_file", "truncate", "removedirs", "copyfile", "copytree", "move"}


def test_who_removes_and_replaces_files_is_known() -> None:
    """A new one belongs in the table, and its test in this file."""
    found: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            opens = name == "open" and any(isinstance(a, ast.Constant) and str(a.value)[:1] in ("w", "x") for a in node.args)
            replaces = isinstance(node.func, ast.Attribute) and name == "replace" and len(node.args) == 1 and "structs" not in ast.unparse(node.func)
            of_os = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "os" and name in ("remove", "replace")
            if name in CALLS or opens or replaces or of_os:
                found[str(path.relative_to(PACKAGE))] += 1
    assert set(found) <= set(KNOWN), set(found) - set(KNOWN)


def test_json_has_no_nan() -> None:
    value = {"a": float("nan"), "b": [1.0, float("inf")], "c": ({"d": -float("inf")},), float("nan"): 1}
    assert json.loads(dumps(value), parse_constant=lambda name: pytest.fail(name)) == {"a": None, "b": [1.0, None], "c": [{"d": None}], "nan": 1}


PLAIN = {
    "tokenizer.py", "fingerprint.py", "images.py", "acceptance.py", "acceptance_child.py",
    "engines/desk.py", "engines/coordinator.py", "engines/group.py", "engines/vllm/connector.py", "engines/capture/requests.py", "engines/vllm/options.py",
    "engines/sglang/collector.py", "engines/sglang/engine.py", "engines/sglang/options.py", "engines/sglang/remote.py",
    "models/export/model_card.py",
    "data/messages.py", "data/render.py", "data/tokenise.py", "data/vocabulary_report.py", "data/generators.py", "data/exact_ids.py", "data/rows.py",
    "data/conversations.py", "data/build.py", "data/prepare.py", "data/template.py", "data/regenerate.py",
    "transfer/record.py", "transfer/shards.py", "transfer/segment.py", "transfer/mooncake_server.py",
}  # fmt: skip
"""Files that call json themselves: for hashes, for each other, for what has no measured number in it, or for rows that json reads again."""


def test_json_that_others_read_is_written_in_one_place() -> None:
    """``files.dumps``, which knows no NaN; a new caller of json is looked at once."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "examples").rglob("*.py")]:
        own = str(path.relative_to(PACKAGE)) in PLAIN | {"files.py"} if PACKAGE in path.parents else path.name in ("quickstart.py", "split.py")
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert own or not {"json.dumps", "json.dump"} & calls, path
