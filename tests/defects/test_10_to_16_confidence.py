"""Failures that this field has had, each with the test that catches it: 10 to 16, masks, metrics, data and training that look better than they are.

``benchmarks/mutations.py`` plants each of them in a copy of the package and shows that its test fails.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from tests.defects.fits import fit, module
from tests.engines.parts import save_tiny
from tests.engines.test_ledger import make, out, pack
from tests.engines.test_transformers_engine import engine_for, leases_of, work_off
from tests.models.differences import PRUNED, WEIGHTS
from tests.models.exports import save_plain_target
from tests.models.packs import conversation, draft_config, task
from tests.models.packs import pack as pack_of
from tests.models.variants import VARIANTS
from tests.tiny import CHATML, save_tokenizer
from torchspec.callbacks.last import LastCheckpoint
from torchspec.data.conversations import Conversation
from torchspec.data.plan import Plan
from torchspec.data.prompts import Prompts
from torchspec.data.render import Renderer
from torchspec.engines.engine import OnPolicy
from torchspec.models.metrics import StepSums
from torchspec.models.ops.dense_projections import DenseAttention
from torchspec.models.ops.norm import RMSNorm
from torchspec.models.ops.shared_rows import Residual, linear
from torchspec.models.optim.schedules import WSD, Constant, Cosine, Linear
from torchspec.models.training.parallelize import parallelize
from torchspec.target import Target
from torchspec.transfer import StoreServer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return save_plain_target(tmp_path_factory.mktemp("target"))


def test_defect_10_the_mask_is_what_the_target_generates_its_end_token_included(tmp_path: Path) -> None:
    """No system prompt comes in, the first answer is there, and each answer ends with its end-of-turn token, whatever else looks like one."""
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHATML
    words = [("user", "assistant"), ("assistant", "yes"), ("user", "the dog"), ("assistant", "runs  over")]
    rendered = Renderer(tokenizer, name="tiny").render(Conversation(messages=tuple({"role": role, "content": text} for role, text in words)))
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in words)
    assert tokenizer.decode(rendered.ids.tolist()) == whole
    runs = np.split(rendered.ids, np.flatnonzero(np.diff(rendered.mask)) + 1)[1::2]
    assert [tokenizer.decode(run.tolist()) for run in runs] == ["yes<|im_end|>", "runs  over<|im_end|>"]


def test_defect_11_tokens_outside_the_draft_vocabulary_are_misses_and_means_are_over_tokens() -> None:
    """Acceptance is a mean of products along each position, never a product of means; packs of any size count by their tokens."""
    config = draft_config().with_draft_vocabulary(len(PRUNED))
    made = task(config, draft_ids=PRUNED, step_weights=WEIGHTS)
    with torch.no_grad():  # a draft that always says what the target says, of what it can say
        made.draft.lm_head.weight.zero_()
    conversations = [conversation(config, [0] + [1] * n, n) for n in (3, 40, 12)]
    last = [c.last for c in conversations]
    best = [made.head.logits(states).argmax(-1).tolist() for states in last]
    sums = None
    right: list[list[bool]] = []
    for c, tokens in zip(conversations, best, strict=True):
        batch = pack_of(config, [c], 3)
        output = made(batch, measure=True)
        sums = StepSums.of(output, batch) if sums is None else sums.add(output, batch)
        for t in range(len(c.ids) - 2):  # zero logits: row 0 is said everywhere
            right.append([tokens[t + 1 + k] == PRUNED[0] for k in range(3) if t + 2 + k < len(c.ids)])
    assert sums is not None
    found = sums.metrics(len(WEIGHTS))
    whole = [row for row in right if row]
    assert found["accuracy_0"] == pytest.approx(sum(row[0] for row in whole) / len(whole))
    assert found["expected_acceptance_greedy"] == pytest.approx(1 + sum(math.prod(row[: k + 1]) for row in whole for k in range(len(row))) / len(whole))
    inside = np.mean([token in PRUNED for tokens in best for token in tokens])
    assert 0.2 < inside < 0.8  # of both kinds
    half, whole_of, none = [50.0, 50.0], [100.0, 100.0], [0.0, 0.0]
    table = {"rows": whole_of, "loss": none, "correct": half, "correct_so_far": half, "objective": none, "normaliser": whole_of}
    dependent = StepSums(tuple(table), torch.tensor(list(table.values()), dtype=torch.float64)).metrics(2)
    assert dependent["expected_acceptance_greedy"] == 2.0  # the product of the accuracies would say 1.75


def test_defect_11_a_likely_token_outside_is_a_miss_even_if_the_draft_says_the_best_one_inside() -> None:
    config = draft_config().with_draft_vocabulary(2)
    made = task(config, draft_ids=[7, 9], step_weights=[1.0])
    made.head.weight.zero_()
    assert made.head.order is not None
    row = made.head.order.argsort()
    made.head.weight[row[3]], made.head.weight[row[7]] = 2.0, 1.0  # 3 is the likeliest, 7 the likeliest of the draft's
    with torch.no_grad():
        made.draft.lm_head.weight.zero_()
    given = conversation(config, [0, 1, 1, 1], 0)
    given.last.copy_(given.last.abs())
    output = made(pack_of(config, [given], 1), measure=True)
    assert output.sums["rows"].tolist() == [2.0] and output.sums["correct"].tolist() == [0.0]


def test_defect_12_a_sample_as_long_as_the_engine_takes_is_taken_and_a_longer_one_goes_alone(server: StoreServer, tmp_path: Path) -> None:
    engine = engine_for(save_tiny(tmp_path), server, batch_tokens=4096)
    most = engine.max_tokens
    finished, failed = work_off(engine, leases_of([[1] * most, [2] * (most + 1), [3] * 5, [4] * (most - 1)]))
    engine.close()
    assert sorted(done.lease for done in finished) == [0, 2, 3]
    assert [(bad.lease, bad.retry) for bad in failed] == [(1, False)] and str(most + 1) in failed[0].reason


def test_defect_13_a_prefill_that_was_not_computed_to_its_end_is_no_record() -> None:
    pytest.importorskip("vllm")
    from torchspec.engines.capture.requests import PARAMETER
    from torchspec.engines.vllm.connector import HiddenStatesConnector

    pending: list[Any] = []
    order = SimpleNamespace(answer=False, tail=[5], run={}, key="k")
    stand_in = SimpleNamespace(_ids=lambda request, order: [1, 2, 3, 4, 5], _check_run=lambda run: None, _pending=pending, _accepted=OrderedDict())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("torchspec.engines.vllm.connector.read_request", lambda plain: order)
        for computed, taken in ((3, False), (4, True)):
            request: Any = SimpleNamespace(
                kv_transfer_params={PARAMETER: {}}, num_computed_tokens=computed, status=SimpleNamespace(name="ABORTED"), request_id="r"
            )
            held, said = HiddenStatesConnector.request_finished(stand_in, request, [0])  # type: ignore[arg-type]
            assert held is taken and ("accepted" in said[PARAMETER]) is taken  # type: ignore[index]
    assert len(pending) == 1 and pending[0][0].rows == 4


def test_defect_13_no_two_attempts_share_a_key() -> None:
    ledger = make()
    for stage in ("train", "validate"):
        ledger.open_stage(0, stage, 0, first_pack=0, num_packs=1, world=1)
        ledger.submit(0, stage, 0, [pack(0, 3)])
    keys: list[str] = []
    for number in range(20):
        name = f"engine-{number}"
        ledger.join(name, 1000)
        for lease in ledger.pull(name, 64, 10**6, 0.0):
            keys.append(lease.key)
            ledger.fail(name, lease.id, "once more", retry=True)
        out(ledger)
        ledger.deleted(keys)
    assert len(keys) == 6 and len(set(keys)) == 6  # three attempts at each of two samples of the same index


def test_defect_14_gradients_are_accumulated_and_reduced_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small gradients added in bf16 stop growing; here the sum of 16 equal micro-batches is 16 times one of them, and so is the head's over chunks."""
    import torchspec.models.ops.head_loss as loss_module

    config = draft_config(hidden_size=32, target_hidden_size=32)
    made = task(config, draft_ids=None, step_weights=WEIGHTS, dtype=torch.bfloat16)
    batch = pack_of(config, [conversation(config, [0] + [1] * 100, 0)], 3, dtype=torch.bfloat16)
    made(batch).loss.backward()
    once = {name: p.grad.clone() for name, p in made.draft.named_parameters() if p.grad is not None}
    assert {gradient.dtype for gradient in once.values()} == {torch.float32}
    for _ in range(15):
        made(batch).loss.backward()
    for name, parameter in made.draft.named_parameters():
        torch.testing.assert_close(parameter.grad, 16 * once[name], rtol=1e-4, atol=1e-6)
        parameter.grad = None
    monkeypatch.setattr(loss_module, "_chunks", lambda total, *_: [(low, min(low + 8, total)) for low in range(0, total, 8)])
    made(batch).loss.backward()
    head, whole = made.draft.lm_head.weight.grad, once["lm_head.weight"]
    assert head is not None and float((head - whole).norm() / whole.norm()) < 2e-3

    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **options: given.update(options))
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: None)
    parallelize(made, mesh=SimpleNamespace(get_group=lambda: None), compute_dtype=torch.bfloat16)
    assert given["mp_policy"].reduce_dtype == torch.float32


def test_defect_14_small_terms_of_many_steps_do_not_stop_growing() -> None:
    """300 steps that each add 1 to the gradient of a bias (of a master) or of a norm (of a bf16 copy, as FSDP gathers it): in bf16 the sum stops at 256."""
    attention = DenseAttention(32, hidden_size=16, heads=4, kv_heads=2, head_dim=8, bias=True)
    norm = RMSNorm(16, 1e-6).bfloat16()
    projections, used = attention.cast(torch.bfloat16), norm.cast()
    ones, total = torch.ones(1, 16, dtype=torch.bfloat16), torch.zeros(())
    for _ in range(300):
        flat = linear(torch.zeros(1, 32, dtype=torch.bfloat16), projections.inputs, bias=projections.bias)
        output = projections.output(torch.zeros(1, 4, 8, dtype=torch.bfloat16), Residual(ones))
        total = total + flat.float().sum() + output.float().sum() + used(ones).float().sum()
    total.backward()
    for name, parameter in [*((name, p) for name, p in attention.named_parameters() if name.endswith("bias")), ("norm", norm.weight)]:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.float(), torch.full(parameter.shape, 300.0), msg=name)


@pytest.mark.parametrize("variant", ["attention_bias", "Qwen3 (qk_norm)", "MLA", "H < D, own embedding", "two layers", "EAGLE-3.1 (fc_norm, norm_output)"])
def test_defect_14_bf16_copies_have_the_gradients_of_their_masters_rounded_once(variant: str) -> None:
    """What FSDP gathers in bf16: each parameter's gradient over all steps is summed wide, so it is exactly the fp32 master's, rounded."""
    config = draft_config(**VARIANTS[variant])
    masters, copies = (task(config, draft_ids=None, step_weights=WEIGHTS, dtype=torch.bfloat16) for _ in range(2))
    batch = pack_of(config, [conversation(config, [0] + [1] * 40, seed) for seed in range(3)], 3, dtype=torch.bfloat16)
    for master, copy in zip(masters.draft.parameters(), copies.draft.parameters(), strict=True):
        copy.data = copy.data.bfloat16()
        master.data = copy.data.float()
    for made in (masters, copies):
        made(batch).loss.backward()
    for (name, master), copy in zip(masters.draft.named_parameters(), copies.draft.parameters(), strict=True):
        assert master.grad is not None and copy.grad is not None and (master.dtype, copy.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(master.grad.bfloat16(), copy.grad), name


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, WSD])
@pytest.mark.parametrize("warmup", [0, 3, 0.1])
def test_defect_15_no_step_runs_at_rate_zero_and_decay_goes_through(kind: Any, warmup: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = kind(optimizer, warmup_steps=warmup, total_steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.sum().backward()
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1.0


class _Scores(Callback):
    """Logs a score that was decided before."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("score", next(self.scores))


def test_defect_15_rotation_keeps_the_best_checkpoint(target: Target, tmp_path: Path) -> None:
    saved, newest = ModelCheckpoint(monitor="score", mode="max"), LastCheckpoint(every_n_train_steps=4)  # as configs/quickstart.yaml has it
    trainer = fit(
        tmp_path,
        module(target),
        steps=10,
        validate=True,
        val_check_interval=2,
        enable_checkpointing=True,
        callbacks=[_Scores([0.1, 0.9, 0.5, 0.7, 0.2]), saved, newest],
    )
    assert trainer.global_step == 10
    best = Path(saved.best_model_path)
    assert best.is_file() and torch.load(best, weights_only=True)["global_step"] == 4
    assert torch.load(newest.last_model_path, weights_only=True)["global_step"] == 10
    assert {path.name for path in best.parent.glob("*.ckpt")} == {best.name, "last.ckpt"}


class _Data:
    """Twelve conversations of five tokens, an answer of three."""

    content = "c"

    def __len__(self) -> int:
        return 12

    def mask(self, index: int) -> np.ndarray:
        return np.array([0, 0, 1, 1, 1])

    def ids(self, index: int) -> np.ndarray:
        return np.full(5, index)


def test_defect_16_what_is_drawn_is_never_the_same_on_every_rank() -> None:
    """Anchors belong to DFlash, which is not in this project. What is drawn here is the order of the data, of which ranks take different packs, and the
    seeds of sampled answers, which belong to the conversation and the epoch and so to no rank: repeated on resume, and different between any two."""
    data: Any = _Data()
    of_ranks = [Prompts(data, OnPolicy(max_new_tokens=4), max_length=16) for _ in range(2)]
    drawn = [[[prompts.request(index, epoch=epoch).generate_from.seed for index in range(12)] for epoch in range(2)] for prompts in of_ranks]  # type: ignore[union-attr]
    assert drawn[0] == drawn[1] and len({seed for epoch in drawn[0] for seed in epoch}) == 24
    plan = Plan(np.full(64, 10), seed=3, epoch=0, max_tokens=20, packs_per_step=4)
    packs = [tuple(plan.pack(i).tolist()) for i in range(len(plan))]
    assert sorted(i for pack in packs for i in pack) == list(range(64))  # ranks take packs r, r + world, ...: never one that another has
