"""What a user gets wrong on the command line: one clear line, an exit code that is not 0, and nothing lost."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from tests.e2e.runs import make, run, save_world, store_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_world(tmp_path_factory.mktemp("world"), train=24, validate=4)


def refused(folder: Path, *words: str, expected: tuple[str, ...], file_size: int | None = None) -> str:
    """Run; the last line says all that is expected, and there is no traceback."""
    code, output = run(*words, file_size=file_size)
    assert code not in (0, None), output
    lines = [line for line in output.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and "usage" not in output, output
    assert all(part in lines[-1] for part in expected), output
    assert "Traceback" not in output, output
    assert not (folder / "shm").exists() or store_files(folder) == []
    return output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--data.train", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--data.target.path", "nowhere/model"), "data.target.path"),
        (("--trainer.strategy", "fsdp"), "fsdp2"),
        (("--data.packs_per_step", "3", "--trainer.devices", "2", "--trainer.strategy", "ddp"), "packs_per_step"),
        (("--model.aux_layers", "[5,2]"), "strictly increasing"),
        (("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--ckpt_path", "last"), "no last*.ckpt is under"),
        (("--trainer.precision", "bf16-mixed"), "trainer.precision='bf16-mixed' is not what decides here"),
        (("--data.engines.attn_implementation", "nonsense"), "error: data.engines.attn_implementation='nonsense' is refused by Transformers (Specified"),
        (("--data.store.shm_dir", "/nowhere"), "error: data.store.shm_dir='/nowhere' is not a directory. Fix: give a directory on"),
        (("--data.max_length", "512"), "max_length"),
        (("--data.maximum_length", "5"), "maximum_length"),
    ],
)
def test_bad_input_is_one_clear_line(world: dict[str, Path], tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    refused(tmp_path, "fit", "--config", str(make(tmp_path, world)), *words, expected=(expected,))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"conversations": [{"role": "user"', "train.jsonl:3"),
        ('{"conversations": [{"role": "wizard", "content": "hi"}, {"role": "assistant", "content": "yes yes"}]}', "wizard"),
        ('{"text": 5}', "train.jsonl:3"),
    ],
    ids=["malformed", "role", "keys"],
)
def test_a_bad_row_is_located(world: dict[str, Path], tmp_path: Path, row: str, expected: str) -> None:
    data = tmp_path / "train.jsonl"
    lines = world["train"].read_text().splitlines()
    data.write_text("\n".join([*lines[:2], row, *lines[2:]]) + "\n")
    refused(tmp_path, "fit", "--config", str(make(tmp_path, world)), "--data.train", str(data), expected=(expected, "max_bad_fraction"))


def test_a_target_without_chat_template(world: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(world["target"], bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    described = json.loads((bare / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(described))
    refused(tmp_path, "fit", "--config", str(make(tmp_path, world)), "--data.target.path", str(bare), expected=("chat template", str(bare)))


def test_a_draft_of_another_hidden_size(world: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "draft.json").write_text(json.dumps({"target_hidden_size": 96}))
    words = ("fit", "--config", str(make(tmp_path, world)), "--model.draft", str(tmp_path / "draft.json"))
    refused(tmp_path, *words, expected=("target_hidden_size", "96", "128"))


def test_a_full_disk_at_export_keeps_the_checkpoint_and_the_older_draft(world: dict[str, Path], tmp_path: Path) -> None:
    code, output = run("fit", "--config", str(make(tmp_path, world)), "--trainer.max_steps", "2")
    assert code == 0, output
    draft, checkpoint = tmp_path / "draft", tmp_path / "checkpoints" / "last.ckpt"
    before = {path.name: path.read_bytes() for path in draft.iterdir()}

    words = ("export", "--target", str(world["target"]), "--checkpoint", str(checkpoint), "--output", str(draft))
    refused(tmp_path, *words, expected=("export directory", "free space"), file_size=64 * 1024)
    assert {path.name: path.read_bytes() for path in draft.iterdir()} == before
    code, output = run(*words)
    assert code == 0, output


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_full_disk_at_a_checkpoint_is_one_line_and_leaves_no_part_of_it(world: dict[str, Path], tmp_path: Path, strategy: str) -> None:
    words = ("fit", "--config", str(make(tmp_path, world)), "--trainer.strategy", strategy)
    file = str(tmp_path / "checkpoints")
    refused(tmp_path, *words, expected=("checkpoint", file, "free space"), file_size=900 * 1024)  # enough for records, too little for a checkpoint
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_serving_after_training_needs_an_export_before_it(world: dict[str, Path], tmp_path: Path) -> None:
    config = make(tmp_path, world)
    described = yaml.safe_load(config.read_text())
    (acceptance,) = [c for c in described["trainer"]["callbacks"] if c["class_path"].endswith("AcceptanceLength")]
    acceptance["init_args"]["serve_prompts"] = str(world["validate"])
    config.write_text(yaml.safe_dump(described))
    refused(tmp_path, "fit", "--config", str(config), expected=("serve_prompts", "put ExportDraft before AcceptanceLength"))


def test_workers_by_hand_need_a_secret(world: dict[str, Path], tmp_path: Path) -> None:
    words = ("fit", "--config", str(make(tmp_path, world)), "--data.engines.workers", "0")
    refused(tmp_path, *words, expected=("TORCHSPEC_TOKEN", "is not set"))
    refused(tmp_path, *words, "--data.engines.listen", "here", expected=("data.engines.listen", "HOST:PORT"))


def test_a_port_that_something_else_has_taken(world: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mooncake.store")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(tmp_path, "fit", "--config", str(make(tmp_path, world)), "--data.store.kind", "mooncake", "--data.store.master", master, expected=(master,))


def test_mooncake_without_its_library(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken" / "mooncake"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "store.py").write_text('raise ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory")\n')
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    output = refused(tmp_path, "fit", "--config", str(make(tmp_path, world)), "--data.store.kind", "mooncake", expected=("libibverbs.so.1", "apt-get install"))
    assert output.count("error:") == 1
