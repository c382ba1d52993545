"""What stock vLLM writes through our connector equals Transformers' own hidden states, for several families; and it takes what it cannot do for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engines.parts import read_record, save_tiny, spec_of
from tests.engines.test_transformers_engine import expected, leases_of, random_samples, work_off
from torchspec.engines.capture.requests import TOKEN_VARIABLE
from torchspec.engines.engine import EngineConfig, Job, OnPolicy
from torchspec.engines.messages import Failed, Finished, Lease, PartialAnswer
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.engines.vllm.engine import VLLMEngine
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer, open_store
from torchspec.transfer.record import Record

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.alone]
MAX_LENGTH = 64


def engine_for(target: Path, server: StoreServer, aux: tuple[int, ...], on_policy: OnPolicy | None = None, **config: Any) -> VLLMEngine:
    given = EngineConfig(**{"batch_samples": 8, "batch_tokens": 32, "threads": 1, **config})
    job = Job(TargetConfig(str(target)), spec_of(target, aux), server.address, given, max_length=MAX_LENGTH, device="cpu", on_policy=on_policy)
    return VLLMEngine(job)


def read(server: StoreServer, engine: VLLMEngine, leases: list[Lease], finished: list[Finished]) -> dict[int, Record]:
    store = open_store(server.address)
    records = {done.lease: read_record(store, leases[done.lease].key, done.nbytes, engine.spec) for done in finished}
    store.close()
    return records


SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 14, "disable_log_stats": False}
"""Room for three conversations of 64 tokens (two blocks in each of two groups): others are preempted while they are answered. The statistics count it."""


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance", "engine_args"),
    [
        ("llama", torch.float32, 1e-5, SMALL_CACHE),
        pytest.param("qwen3", torch.float32, 1e-5, {}, marks=pytest.mark.nightly),
        pytest.param("qwen3_moe", torch.float32, 1e-5, {}, marks=pytest.mark.nightly),
        ("mistral", torch.float32, 1e-5, {"tensor_parallel_size": 2}),
        ("deepseek_v3", torch.float32, 1e-5, {}),  # latent attention (MLA), grouped experts
        ("qwen3_next", torch.bfloat16, 0.15, {}),  # hybrid: linear attention beside full attention, in several cache groups; vLLM's CPU kernel is bf16 alone
    ],
)
def test_records_equal_transformers(
    family: str, dtype: torch.dtype, tolerance: float, engine_args: dict[str, Any], server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index i is hidden_states[i], 0 and L included; from 1 token to more than a step takes, side by side; what is not to be had is a named failure."""
    from transformers import AutoModelForCausalLM

    if family == "qwen3_next" and working_dtype(dtype, "cpu") is not dtype:
        pytest.skip("vLLM's linear attention computes in bf16 alone, and this CPU has no instructions for it")
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    target = save_tiny(tmp_path, family, hidden=128, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(target)
    hooks = HiddenStateHooks(model, (4,), num_layers=4)
    hybrid = family == "qwen3_next"
    aux = (1, 3) if family == "deepseek_v3" else (0, 1, 3)  # vLLM's DeepSeek model cannot give index 0
    engine = engine_for(target, server, aux, None if hybrid else OnPolicy(), engine_args=engine_args)
    try:
        info = engine.start()
        assert info["num_layers"] == 4 and info["tensor_parallel_size"] == engine_args.get("tensor_parallel_size", 1)
        samples = random_samples([5, 17, 1, 40, 33, 2, MAX_LENGTH, 18, MAX_LENGTH + 1])
        samples.append([3, 96])
        leases = leases_of(samples)
        finished, failed = work_off(engine, leases)
        assert sorted(failed, key=lambda f: f.lease) == [
            Failed(8, f"{MAX_LENGTH + 1} tokens; vLLM takes 1 to {MAX_LENGTH} here", retry=False),
            Failed(9, "token ids 3 to 96; the target's vocabulary has 96", retry=False),
        ]
        records = read(server, engine, leases, finished)
        assert sorted(records) == list(range(8))
        for index, record in records.items():
            ids, rows = samples[index], record.last.shape[0]
            assert record.input_ids.tolist() == ids and rows == max(len(ids) - 1, 1)
            states, final = expected(model, ids)
            with torch.inference_mode():
                pairs = [*zip(record.aux.view(rows, len(aux), -1).unbind(1), (states[i] for i in aux), strict=True), (hooks.norm(record.last), final)]
            for ours, theirs in pairs:
                assert (ours.float() - theirs[:rows].float()).norm() <= tolerance * theirs[:rows].float().norm()
        stats = engine.stats()
        assert stats.samples == len(samples) and 0 < stats.write_s < stats.busy_s
        if not hybrid:
            check_answers(engine, server, model, tolerance)
        if family == "llama":
            check_preempted(engine, server, model)
            check_foreign_orders(engine)
    finally:
        engine.close()


def check_answers(engine: VLLMEngine, server: StoreServer, model: Any, tolerance: float) -> None:
    """Prompts are answered as the target would, beside conversations that are not, and the record holds prompt, answer and the states of both."""
    prompts, new = random_samples([7, 1, 40, 20, 30]), [9, 2, 24, 16, 0]
    pairs = zip(leases_of(prompts), new, strict=True)
    leases = [msgspec.structs.replace(lease, generate_from=PartialAnswer(tokens, seed=0) if tokens else None) for lease, tokens in pairs]
    before = engine.stats()
    finished, failed = work_off(engine, leases)
    assert not failed
    records = read(server, engine, leases, finished)
    assert records[4].input_ids.tolist() == prompts[4]
    ends = engine.target.end_ids()
    for index, (prompt, tokens) in enumerate(zip(prompts[:4], new[:4], strict=True)):
        record = records[index]
        ids = record.input_ids.tolist()
        answer = ids[len(prompt) :]
        assert ids[: len(prompt)] == prompt and 1 <= len(answer) <= tokens and record.last.shape[0] == len(ids) - 1
        assert len(answer) == tokens or answer[-1] in ends
        assert not set(answer[:-1]) & set(ends)
        states, _ = expected(model, ids)
        aux = engine.spec.aux_layers
        for ours, theirs in zip(record.aux.view(len(ids) - 1, len(aux), -1).unbind(1), (states[i] for i in aux), strict=True):
            assert (ours.float() - theirs[:-1].float()).norm() <= tolerance * theirs[:-1].float().norm()
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(dim=-1) - chosen).max() <= tolerance * logits.abs().max()
    assert engine.stats().tokens - before.tokens == sum(len(record.input_ids) for record in records.values())


def check_preempted(engine: VLLMEngine, server: StoreServer, model: Any) -> None:
    """Requests that lost their blocks in mid-flight and began again have whole records."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    prompts = random_samples([30] * 8)
    leases = [msgspec.structs.replace(lease, generate_from=PartialAnswer(30, seed=0)) for lease in leases_of(prompts)]
    finished, failed = work_off(engine, leases)
    assert not failed
    assert sum(int(getattr(m, "value", 0)) for m in get_metrics_snapshot() if m.name == "vllm:num_preemptions") > 0, "the test must see preemptions"
    for index, record in read(server, engine, leases, finished).items():
        ids = record.input_ids.tolist()
        assert ids[:30] == prompts[index] and len(record.last) == len(ids) - 1
        states, _ = expected(model, ids)
        assert (record.aux.view(len(ids) - 1, 3, -1)[:, 2] - states[3][:-1]).norm() <= 1e-5 * states[3][:-1].norm()


def check_foreign_orders(engine: VLLMEngine) -> None:
    """An order with another token, for another target, or for states that this vLLM does not keep is refused, and the engine goes on."""
    (lease,) = leases_of(random_samples([6]))
    good = engine._run
    for change, words in (
        ({"target": "sha256:other"}, "is of the target sha256:other"),
        ({"aux_layers": [2]}, r"wants hidden states"),
        ({"hidden_size": 64}, "width 64"),
    ):
        engine._run = {**good, "record": {**good["record"], **change}}
        finished, (failed,) = work_off(engine, [lease])
        assert not finished and words in failed.reason
    engine._run = {**good, "store": {"kind": "shm", "path": "/nowhere"}}
    finished, (failed,) = work_off(engine, [lease])
    assert not finished and failed.retry and failed.reason
    engine._run = good
    finished, failures = work_off(engine, leases_of(random_samples([6])))
    assert len(finished) == 1 and not failures


def test_deterministic_records_repeat_beside_any_neighbours(server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    engine = engine_for(save_tiny(tmp_path, hidden=128, dtype=torch.bfloat16), server, (1, 2), deterministic=True)
    try:
        engine.start()
        samples = random_samples([20, 50, 7, 31])
        found = []
        for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
            leases = leases_of([samples[i] for i in order])
            finished, failed = work_off(engine, leases)
            assert not failed
            found.append({order[i]: record for i, record in read(server, engine, leases, finished).items()})
        for index in range(4):
            assert torch.equal(found[0][index].aux, found[1][index].aux) and torch.equal(found[0][index].last, found[1][index].last)
    finally:
        engine.close()


def test_random_answers_are_refused_on_a_cpu(server: StoreServer, tmp_path: Path) -> None:
    engine = engine_for(save_tiny(tmp_path, hidden=128), server, (1, 2), OnPolicy(temperature=0.7))
    with pytest.raises(UserError, match=r"data\.on_policy\.temperature=0\.7"):
        engine.start()
    engine.close()


def test_a_hybrid_target_is_not_answered_and_captured_in_one_pass(server: StoreServer, tmp_path: Path) -> None:
    engine = engine_for(save_tiny(tmp_path, "qwen3_next", hidden=128, dtype=torch.bfloat16), server, (1, 2), OnPolicy())
    with pytest.raises(UserError, match="recurrent layers"):
        engine.start()
    engine.close()


def test_a_target_whose_states_vllm_does_not_give_is_refused_before_it_is_loaded(server: StoreServer, tmp_path: Path) -> None:
    engine = engine_for(save_tiny(tmp_path, "gemma3", hidden=128), server, (1, 2))
    with pytest.raises(UserError, match="cannot hand out hidden states of Gemma3ForCausalLM"):
        engine.start()
    engine.close()
