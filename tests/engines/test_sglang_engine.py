"""What stock SGLang writes through our hooks equals Transformers' own hidden states; a start in which no hook sees them is refused."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.parts import read_record, save_tiny, spec_of
from tests.engines.test_transformers_engine import expected, leases_of, random_samples, work_off
from torchspec.engines.capture.requests import TOKEN_VARIABLE
from torchspec.engines.engine import Answer, EngineConfig, Job, Sampling
from torchspec.engines.messages import Failed
from torchspec.engines.sglang.engine import SGLangEngine
from torchspec.engines.sglang.generator import SGLangGenerator
from torchspec.engines.transformers.generator import TransformersGenerator
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer, open_store

pytestmark = [pytest.mark.skipif(find_spec("sglang") is None, reason="no SGLang"), pytest.mark.slow, pytest.mark.alone]
MAX_LENGTH = 64


def engine_for(target: Path, server: StoreServer, aux: tuple[int, ...], **config: Any) -> SGLangEngine:
    given = EngineConfig(**{"batch_samples": 8, "batch_tokens": 32, "threads": 1, **config})
    return SGLangEngine(Job(TargetConfig(str(target)), spec_of(target, aux), server.address, given, max_length=MAX_LENGTH, device="cpu"))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen3", "qwen3_moe", "gemma3"))])
def test_records_equal_transformers(family: str, server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index i is hidden_states[i], 0 and L included; from 1 token to twice what a step takes, side by side; what is not to be had is a named failure."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    target = save_tiny(tmp_path, family, hidden=128)
    model = AutoModelForCausalLM.from_pretrained(target)
    hooks = HiddenStateHooks(model, (4,), num_layers=4)
    engine = engine_for(target, server, (0, 1, 3))
    try:
        info = engine.start()
        assert info["num_layers"] == 4 and info["tensor_parallel_size"] == 1
        samples = random_samples([5, 17, 1, 40, 33, 2, MAX_LENGTH, 18, MAX_LENGTH + 1])
        samples.append([3, 96])
        leases = leases_of(samples)
        finished, failed = work_off(engine, leases)  # type: ignore[arg-type]
        assert sorted(failed, key=lambda f: f.lease) == [
            Failed(8, f"{MAX_LENGTH + 1} tokens; SGLang takes 1 to {MAX_LENGTH} here", retry=False),
            Failed(9, "token ids 3 to 96; the target's vocabulary has 96", retry=False),
        ]
        store = open_store(server.address)
        records = {done.lease: read_record(store, leases[done.lease].key, done.nbytes, engine.spec) for done in finished}
        store.close()
        assert sorted(records) == list(range(8))
        for index, record in records.items():
            ids, rows = samples[index], record.last.shape[0]
            assert record.input_ids.tolist() == ids and rows == max(len(ids) - 1, 1)
            states, final = expected(model, ids)
            with torch.inference_mode():
                given = hooks.norm(record.last)
            wanted = torch.cat([states[0], states[1], states[3]], dim=-1)[:rows]
            assert (record.aux - wanted).norm() / wanted.norm() < 1e-5
            assert (given - final[:rows]).norm() / final.norm() < 1e-5
        engine._run = {**engine._run, "record": spec_of(target, (1, 2)).to_dict()}  # a start for other states than the hooks see
        problem = asyncio.run_coroutine_threadsafe(engine._probe(), engine._loop).result()
        assert problem == "the run wants hidden states [1, 2, 4], this SGLang was started with [0, 1, 3, 4]"
        stats = engine.stats()
        assert stats.samples == 10 and stats.tokens >= sum(map(len, samples[:8])) and stats.write_s > 0
    finally:
        engine.close()


@pytest.mark.nightly
def test_answers_equal_transformers(tmp_path: Path) -> None:
    """Greedy, of prompts up to the end of the target's positions."""
    target = TargetConfig(str(save_tiny(tmp_path, hidden=128)))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 9, 20, 506, 40, 500, 512)]
    found: list[dict[int, Answer]] = []
    for made in (TransformersGenerator(target, device="cpu"), SGLangGenerator(target, batch_size=4, device="cpu")):
        found.append({answer.index: answer for answer in made.generate(prompts, Sampling(max_new_tokens=16))})
        made.close()
    theirs, ours = found
    for i, prompt in enumerate(prompts):  # SGLang, as vLLM, ends where the target's positions end
        room = 512 - len(prompt)
        assert ours[i].ids == theirs[i].ids[:room] and ours[i].finish == (theirs[i].finish if len(theirs[i].ids) <= room else "length"), i
    assert {answer.finish for answer in ours.values()} == {"stop", "length"}
