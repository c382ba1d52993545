"""What the Transformers engine writes equals Transformers' own hidden states, for several families, whatever shares its batch."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.parts import read_record, save_tiny, spec_of
from torchspec.engines.engine import EngineConfig, Job
from torchspec.engines.messages import Failed, Finished, Lease
from torchspec.engines.record_writer import RecordWriter
from torchspec.engines.transformers.engine import TransformersEngine, load_model
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer import Store, StoreError, StoreServer, open_store
from torchspec.transfer.record import Record

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "mistral", "qwen3_moe", "gpt_neox", "opt"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target"))


def engine_for(target: Path, server: StoreServer, *, aux: tuple[int, ...] = (1, 2), **config: Any) -> TransformersEngine:
    given = EngineConfig(**{"batch_samples": 8, "batch_tokens": 512, **config})
    engine = TransformersEngine(Job(TargetConfig(str(target)), spec_of(target, aux), server.address, given, max_length=64, device="cpu"))
    engine.start()
    return engine


def leases_of(samples: list[list[int]]) -> list[Lease]:
    keys = [secrets.token_hex(8) for _ in samples]
    return [Lease(i, keys[i], "train", i, torch.tensor(ids, dtype=torch.int32).numpy().tobytes()) for i, ids in enumerate(samples)]


def work_off(engine: TransformersEngine, leases: list[Lease]) -> tuple[list[Finished], list[Failed]]:
    engine.submit(leases)
    finished: list[Finished] = []
    failed: list[Failed] = []
    while len(finished) + len(failed) < len(leases):
        one, other = engine.poll(5.0)
        finished += one
        failed += other
    return finished, failed


def records_of(engine: TransformersEngine, server: StoreServer, samples: list[list[int]]) -> list[Record]:
    leases = leases_of(samples)
    finished, failed = work_off(engine, leases)
    assert not failed
    store = open_store(server.address)
    records = [read_record(store, leases[done.lease].key, done.nbytes, engine.spec) for done in sorted(finished, key=lambda f: f.lease)]
    store.close()
    return records


def random_samples(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def expected(model: nn.Module, ids: list[int]) -> tuple[list[Tensor], Tensor]:
    """Transformers' hidden_states 0..L-1 [T, D], and the state after the final norm."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0] for state in out.hidden_states[:-1]], out.hidden_states[-1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_records_equal_transformers_whatever_the_batch(family: str, server: StoreServer, tmp_path: Path) -> None:
    """Index i is hidden_states[i], 0 and L included; ``last`` becomes the final state by the final norm; no padding is seen."""
    from transformers import AutoModelForCausalLM

    target = save_tiny(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(target)
    samples = random_samples([5, 17, 1, 40, 33, 2, 64, 18])
    engine = engine_for(target, server, aux=(0, 1, 3))
    records = records_of(engine, server, samples)
    hooks = HiddenStateHooks(model, (4,), num_layers=4)
    for ids, record in zip(samples, records, strict=True):
        states, final = expected(model, ids)
        torch.testing.assert_close(record.aux, torch.cat([states[0], states[1], states[3]], dim=-1), rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(hooks.norm(record.last), final, rtol=1e-4, atol=1e-4)
        assert record.input_ids.tolist() == ids
    engine.close()


def test_a_draft_may_read_the_last_state_alone(target: Path, server: StoreServer) -> None:
    ids = random_samples([12, 5])
    engine = engine_for(target, server, aux=())
    alone = records_of(engine, server, ids)
    engine.close()
    engine = engine_for(target, server)
    beside = records_of(engine, server, ids)
    engine.close()
    assert [tuple(record.aux.shape) for record in alone] == [(12, 0), (5, 0)]
    assert all(torch.equal(one.last, other.last) for one, other in zip(alone, beside, strict=True))


def test_last_is_before_the_final_norm(target: Path, server: StoreServer) -> None:
    """A norm applied twice would go unnoticed above where its weight is 1: the state itself is far from the normed one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target)
    engine = engine_for(target, server)
    (record,) = records_of(engine, server, random_samples([12]))
    _, final = expected(model, random_samples([12])[0])
    assert (record.last - final).norm() > 0.1 * final.norm()
    engine.close()


def test_deterministic_records_repeat_bit_for_bit_beside_any_neighbours(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server, deterministic=True)
    samples = random_samples([20, 7, 31])
    (alone,) = records_of(engine, server, samples[:1])
    among = records_of(engine, server, samples[::-1])[-1]
    assert torch.equal(alone.aux, among.aux) and torch.equal(alone.last, among.last)
    engine.close()


def test_only_what_is_needed_is_computed(target: Path) -> None:
    """No logits; and nothing after the last wanted index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target)
    ran: list[str] = []
    for name, module in model.named_modules():
        if name in ("model.norm", "lm_head") or (name.startswith("model.layers.") and name.count(".") == 2):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    HiddenStateHooks(model, (1, 2), num_layers=4).run(torch.tensor([[1, 2, 3]]))
    assert ran == ["model.layers.0", "model.layers.1"]
    ran.clear()
    HiddenStateHooks(model, (1, 4), num_layers=4).run(torch.tensor([[1, 2, 3]]))
    assert ran == [f"model.layers.{i}" for i in range(4)]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no list of 4 blocks"):
        HiddenStateHooks(nn.Linear(2, 2), (1,), num_layers=4)


def test_a_bad_sample_is_named_and_its_neighbours_arrive(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server)
    finished, failed = work_off(engine, leases_of([[1, 2], [96], [], [3] * 600, [-1, 4], [5]]))
    assert sorted(f.lease for f in finished) == [0, 5]
    reasons = {f.lease: f.reason for f in failed}
    assert "vocabulary has 96" in reasons[1] and "0 tokens" in reasons[2] and "600 tokens" in reasons[3] and "-1" in reasons[4]
    assert not any(f.retry for f in failed)
    engine.close()


def test_a_forward_that_fails_is_repeated_one_by_one(target: Path, server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(target, server)
    run = HiddenStateHooks.run

    def too_much(self: HiddenStateHooks, input_ids: Tensor, seen: Any = None) -> dict[int, Tensor]:
        if input_ids.shape[0] > 1 or input_ids[0, 0] == 7:
            raise torch.OutOfMemoryError("out of memory\nmany lines")
        return run(self, input_ids, seen)

    monkeypatch.setattr(HiddenStateHooks, "run", too_much)
    finished, failed = work_off(engine, leases_of([[1, 2], [7, 8], [3]]))
    assert sorted(f.lease for f in finished) == [0, 2]
    assert [(f.lease, f.reason, f.retry) for f in failed] == [(1, "OutOfMemoryError: out of memory", True)]
    engine.close()


class _Faulty:
    """A store whose first puts fail."""

    def __init__(self, store: Store, faults: list[StoreError]) -> None:
        self.store, self.faults = store, faults

    def put(self, keys: Any, values: Any) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.store.put(keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def _make_faulty(writer: RecordWriter, faults: list[StoreError]) -> None:
    for thread in writer._threads:
        thread.store = _Faulty(thread.store, faults)  # type: ignore[assignment]


def test_a_full_store_is_waited_for(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server)
    assert engine._writer is not None
    _make_faulty(engine._writer, [StoreError("full", "k", "no room")] * 2)
    finished, failed = work_off(engine, leases_of([[1, 2], [3]]))
    assert len(finished) == 2 and not failed
    engine.close()


def test_a_put_that_fails_costs_only_its_own_record(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server)
    assert engine._writer is not None
    _make_faulty(engine._writer, [StoreError("io", "k", "bad"), StoreError("io", "k", "bad again")])
    finished, failed = work_off(engine, leases_of([[1, 2], [3]]))
    assert [f.lease for f in finished] == [1]
    assert [(f.lease, f.retry) for f in failed] == [(0, True)] and "bad again" in failed[0].reason
    engine.close()


def test_cancelled_leases_are_not_computed(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server)
    leases = leases_of([[1], [2], [3]])
    engine.submit(leases)
    assert engine.cancel([1, 99]) == [1]
    samples, tokens = engine.room()
    assert (samples, tokens) == (14, 1022)
    finished: list[Finished] = []
    while len(finished) < 2:
        finished += engine.poll(5.0)[0]
    assert sorted(f.lease for f in finished) == [0, 2]
    store = open_store(server.address)
    assert store.exists([lease.key for lease in leases]) == [True, False, True]
    store.close()
    engine.close()


def test_batches_hold_their_limits_and_mix_like_lengths(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server, batch_samples=4, batch_tokens=100)
    engine.submit(leases_of([[1] * n for n in (10, 60, 11, 50, 12, 9, 10, 90)]))
    shapes = []
    while batch := engine._next_batch():
        lengths = [len(lease.ids) // 4 for lease in batch]
        assert len(lengths) <= 4 and (len(lengths) * max(lengths) <= 100 or len(lengths) == 1)
        shapes.append(sorted(lengths))
    assert shapes[0] == [9, 10, 10, 11]
    assert sorted(n for shape in shapes for n in shape) == [9, 10, 10, 11, 12, 50, 60, 90]
    engine.close()


def test_counters_grow_by_what_was_done(target: Path, server: StoreServer) -> None:
    engine = engine_for(target, server)
    work_off(engine, leases_of([[1, 2, 3], [4, 5]]))
    stats = engine.stats()
    assert (stats.samples, stats.tokens) == (2, 5)
    assert 0 < stats.write_s <= stats.busy_s
    engine.close()


def test_the_writer_ends_with_what_it_was_given(target: Path, server: StoreServer) -> None:
    writer = RecordWriter(server.address, spec_of(target), producer="test", device="cpu")
    assert writer.results(0.0) == []
    writer.close()
    writer.close()
    assert not [writing for writing in writer._threads if writing.thread.is_alive()]


@pytest.mark.parametrize("attention", ["nonsense", "some/kernel"])
def test_an_attention_that_is_refused_is_named_by_its_option(tmp_path: Path, attention: str) -> None:
    """Not the target, which is all right."""
    target = save_tiny(tmp_path / "target")
    with pytest.raises(UserError) as refused:
        load_model(TargetConfig(str(target)), device="cpu", attn_implementation=attention)
    assert refused.value.field == "data.engines.attn_implementation" and refused.value.value == attention and "\n" not in str(refused.value)
