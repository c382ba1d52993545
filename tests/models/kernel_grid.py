"""Triton kernels against their torch twins: in the interpreter on small shapes, and on a GPU over a grid of real ones.

``test_kernels.py`` runs these tests in a process of their own; by hand: ``pytest tests/models/kernel_grid.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import kernel_cases as cases
from tests.models import kernel_cases_blocks as block_cases
from tests.models import kernel_cases_fp8 as narrow_cases
from tests.models.differences import PRUNED, STEPS, WEIGHTS, made_for
from tests.models.packs import conversation, draft_config, pack, task
from tests.models.variants import VARIANTS
from torchspec.models.ops import head_loss_fused, kernels, mlp
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.loss_formulas import LossWeights
from torchspec.models.target_head import TargetHead

pytest.importorskip("triton")
REAL = cases.DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16] if REAL else [torch.float32]
LOSSES = ["forward_kl", "cross_entropy", "reverse_kl", "jsd", "tv", "lk_alpha", "lk_lambda"]


def sizes(small: list[tuple[int, ...]], real: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [*small, *real] if REAL else small


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("shape", sizes([(1, 5), (7, 24), (0, 8)], [(301, 576), (1000, 4096), (77, 7168), (5000, 128)]))
def test_norm(shape: tuple[int, int], placed: bool, dtype: torch.dtype) -> None:
    cases.norm(*shape, dtype, placed=placed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", sizes([(7, 24), (16, 64)], [(301, 576), (1000, 4096), (77, 7168)]))
def test_norm_gradients_of_the_very_forward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    cases.norm_as_rounded(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("normed_residual", "every", "state"), [(False, False, True), (True, False, True), (False, True, False), (True, True, True)])
@pytest.mark.parametrize("shape", sizes([(5, 3, 24), (9, 9, 5), (4, 0, 8), (0, 0, 8)], [(301, 280, 576), (1000, 999, 4096), (77, 40, 7168), (5000, 1, 128)]))
def test_advance(shape: tuple[int, int, int], normed_residual: bool, every: bool, state: bool, dtype: torch.dtype) -> None:
    cases.advance(*shape, dtype, normed_residual=normed_residual, every=every, state=state)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_norm_sums_of_few_programs(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program does several blocks of rows, the last one fewer than the others or none."""
    from torchspec.models.ops.kernels import norm

    monkeypatch.setattr(norm, "_RESIDENT", 4 * number)
    monkeypatch.setattr(norm, "_blocks", lambda width: (2, 8, 4))
    for rows in (1, 4, 9, 13):
        cases.norm(rows, 5, torch.float32, placed=True)
        cases.advance(rows, rows - 1, 5, torch.float32, normed_residual=False, every=False, state=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sizes([(1, 3), (5, 24), (0, 8)], [(513, 1536), (257, 12288), (3, 14337)]))
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    cases.swiglu(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sizes([(3, 5, 7), (1, 1, 3), (0, 4, 4)], [(500, 700, 4096), (1000, 1001, 6144), (64, 64, 1025)]))
def test_rows(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases.rows(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sizes([(3, 2, 5), (1, 1, 8), (0, 2, 4)], [(700, 8, 128), (1001, 3, 64), (64, 5, 80)]))
def test_gather(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases.gather(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", sizes([(3, 4, 2, 8), (5, 3, 1, 10), (1, 2, 2, 4), (0, 2, 1, 4)], [(301, 32, 8, 128), (129, 9, 3, 64), (65, 24, 8, 80), (33, 14, 2, 192)])
)
def test_heads(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    cases.heads(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("shape", sizes([(3, 37), (1, 4), (0, 8)], [(65, 32000), (301, 12288)]))
def test_quantise(shape: tuple[int, int], factor: bool, dtype: torch.dtype) -> None:
    narrow_cases.quantise(*shape, dtype, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", sizes([(3, 37), (33, 70), (0, 8)], [(301, 12288), (4032, 32000), (130, 151936)]))
def test_turn(shape: tuple[int, int], dtype: torch.dtype) -> None:
    narrow_cases.turn(*shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", sizes([(3, 37), (33, 70), (0, 8)], [(301, 12288), (4032, 32000), (130, 151936)]))
def test_round_both(shape: tuple[int, int], dtype: torch.dtype) -> None:
    narrow_cases.round_both(*shape, dtype)


@pytest.mark.parametrize("shape", sizes([(3, 37), (130, 140), (0, 8)], [(24576, 4096), (32000, 4096), (151936, 4096)]))
def test_transpose(shape: tuple[int, int]) -> None:
    narrow_cases.transpose(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("shape", sizes([(1, 5), (7, 24), (0, 8)], [(301, 576), (1000, 4096), (77, 7168)]))
def test_norm_rounded(shape: tuple[int, int], placed: bool, dtype: torch.dtype) -> None:
    narrow_cases.norm_rounded(*shape, dtype, placed=placed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", sizes([(1, 3), (5, 24), (0, 8)], [(513, 1536), (257, 12288), (3, 14337)]))
def test_swiglu_rounded(shape: tuple[int, int], dtype: torch.dtype) -> None:
    narrow_cases.swiglu_rounded(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(dtype: torch.dtype) -> None:
    for number in (1, 5000, 8192):
        cases.scale(number, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(
    "shape", sizes([(3, 4, 2, 8), (1, 3, 1, 6), (0, 2, 2, 4)], [(301, 32, 8, 128), (129, 9, 3, 64), (65, 8, 8, 80), (65, 24, 3, 96), (33, 14, 2, 192)])
)
def test_merge(shape: tuple[int, int, int, int], count: int, dtype: torch.dtype) -> None:
    cases.merge(*shape, 3, count, dtype)


BLOCKS = [(4, 2, 1, 64, True, None), (7, 2, 1, 24, False, 3), (8, 4, 2, 16, True, 5), (16, 1, 1, 128, False, None), (4, 12, 1, 16, False, 9)]
"""Slots, heads, key-value heads, size of a head, causal, window."""
if REAL:
    BLOCKS = [
        (16, 32, 8, 128, False, None), (16, 32, 8, 128, True, 100), (7, 32, 8, 128, True, None), (8, 9, 3, 64, True, 9), (7, 28, 4, 128, False, 33),
        (4, 2, 1, 80, True, None), (16, 16, 1, 256, True, 64), (16, 8, 8, 64, False, None), (8, 64, 2, 128, True, None),
    ]  # fmt: skip


def _cuts() -> Any:
    """Small ones, so that small packs take several turns of every loop; on a GPU those of the package."""
    from torchspec.models.ops.kernels.block_attention import Launch, Launches

    return None if REAL else Launches(Launch(32, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 16, 4, 1))


@pytest.mark.parametrize("shape", BLOCKS)
def test_block_attention(shape: tuple[int, int, int, int, bool, int | None]) -> None:
    """Several conversations, of which one has no anchor and one has one."""
    slots, *heads, causal, window = shape
    lengths, numbers = ([700, 33, 9, 400], [90, 7, 0, 1]) if REAL else ([40, 9, 5, 23], [5, 0, 1, 4])
    rows = block_cases.drawn(lengths, numbers, slots, seed=slots)
    dtype = torch.bfloat16 if REAL else torch.float32
    block_cases.attention(rows, sum(lengths), *heads, dtype, causal=causal, window=window, launches=_cuts(), strided=slots == 8)


def test_block_attention_of_packs_with_few_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    """None; one at the very beginning of its conversation, which has no context; through the draft's own choice of kernels."""
    from torchspec.models.blocks import attention_triton

    if not REAL:
        monkeypatch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
        monkeypatch.setattr(attention_triton, "serves", lambda query, key, *, slots: True)
    dtype = torch.bfloat16 if REAL else torch.float32
    rows = block_cases.blocks([[0, 2], [], [0]], [3, 4, 5], 4)
    block_cases.attention(rows, 12, 2, 1, 16, dtype, causal=True, window=None, chosen=True)
    none = block_cases.blocks([[]], [3], 4)
    plan = attention_triton.Plan(none, attention_triton.kernel.Sizes(4, 2, 1, 16, True, None))
    given = [cases.make(*shape, dtype=dtype, seed=1).requires_grad_() for shape in ((0, 2, 16), (0, 1, 16), (0, 1, 16), (3, 1, 16), (3, 1, 16))]
    out = attention_triton.attend(plan, *given)
    found = torch.autograd.grad(out.sum(), given)
    assert out.shape == (0, 2, 16) and all(not t.any() for t in found)


def test_merge_of_heads_more_than_31_bits_apart(tmp_path: Path) -> None:
    """cuDNN lays heads one after the other: those of one long conversation with many heads end past 2^31 elements."""
    from torchspec.models.ops.kernels import merge

    apart, number, heads, size = 2**30, 2, 3, 8
    length = (heads - 1) * apart + number * size
    if REAL:
        memory = torch.empty(length, dtype=torch.float16, device=cases.DEVICE)
    else:  # pages of a sparse file, of which a handful are touched
        with (tmp_path / "heads").open("wb") as file:
            file.truncate(2 * length)
        memory = torch.from_file(str(tmp_path / "heads"), shared=True, size=length, dtype=torch.float16)
    make = lambda *shape, seed: cases.make(*shape, dtype=torch.float16, seed=seed)  # noqa: E731
    near = make(number, heads, size, seed=1)
    far = memory.as_strided((number, heads, size), (size, apart, 1))
    far.copy_(near)
    query, extra = make(number, heads, size, seed=2), [make(number, 2, heads, size, seed=seed) for seed in (3, 4)]
    lse, rows = make(number, heads, seed=5).float(), torch.arange(number, device=cases.DEVICE)
    rules: dict[str, Any] = {"rows": rows, "entries": rows, "count": 2, "scale": 0.5}
    found = []
    for causal in (near, far):
        out, merged = merge.forward(causal, lse, query, *extra, **rules)
        sums = [torch.zeros(number, 2, heads, size, device=cases.DEVICE) for _ in range(2)]
        found.append((out, merged, merge.backward(make(number, heads, size, seed=6), query, out, merged, *extra, causal, *sums, **rules)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sizes([(3, 37, 37), (2, 40, 11), (0, 8, 8)], [(65, 151936, 151936), (65, 151936, 32000), (33, 49152, 8191)]))
def test_target(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    cases.target(*shape, dtype)


def test_target_in_bf16() -> None:
    cases.target(4, 40, 11, torch.bfloat16)


EVERY_LOSS = {name: 0.3 + 0.1 * i for i, name in enumerate(LOSSES)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("weights", [*[{name: 1.0} for name in LOSSES], EVERY_LOSS], ids=lambda w: "+".join(w))
def test_losses(weights: dict[str, float], pruned: bool, dtype: torch.dtype) -> None:
    for shape in sizes([(4, 29)], [(65, 32000), (17, 50257)]):
        for measure in (False, True):
            cases.losses(*shape, weights, dtype, pruned=pruned, measure=measure)


@pytest.mark.parametrize("weights", [{"forward_kl": 1.0}, EVERY_LOSS], ids=lambda w: "+".join(w))
def test_losses_of_logits_in_fp16(weights: dict[str, float]) -> None:
    """What stands past the end of a row is no infinity there, which a probability of 0 would make no number of."""
    cases.losses(4, 29, weights, torch.float16, kind=torch.float32, pruned=True, measure=False)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("weights", [{"forward_kl": 1.0}, {"tv": 1.0}, EVERY_LOSS], ids=lambda w: "+".join(w))
def test_losses_of_a_sure_target_rounded_to_bf16(weights: dict[str, float], pruned: bool) -> None:
    """Its largest p is so far off that p does not add up to 1; what is made of it is exact for the very p."""
    cases.losses(6, 29, weights, torch.float32, kind=torch.bfloat16, sure=12.0, pruned=pruned, measure=True)


STEPS_SEEN = [("plain", PRUNED, False), ("plain", None, True), ("Qwen3, norm_before_residual", None, False)]
"""Variants that the interpreter has time for."""
if REAL:
    STEPS_SEEN += [(variant, draft_ids, False) for variant in VARIANTS for draft_ids in (None, PRUNED)]


FLASHED = [("plain", True), ("plain", False), ("two layers, EAGLE-3.1, bias, norm_before_residual", True)]
if REAL:
    FLASHED += [(variant, False) for variant in ("one key head", "attention_bias", "Qwen3 (qk_norm)", "heads wider than H", "MLA, two layers, EAGLE-3.1")]


@pytest.mark.parametrize(("variant", "whole"), FLASHED)
def test_whole_step_around_a_flash_kernel(variant: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on the path that a GPU takes in half precision, with the library's kernel made in torch.

    ``whole``: as where nearly all rows are supervised, with queries kept spread and embeddings of all rows projected at once.
    """
    from torchspec.models.eagle3 import network
    from torchspec.models.ops.attention import flash as attention_flash
    from torchspec.models.ops.attention import fused as attention_fused

    monkeypatch.setattr(attention_fused, "_SPREAD", 100.0 if whole else 0.0)
    monkeypatch.setattr(network, "_NEARLY_ALL", 0.0 if whole else 1.0)
    monkeypatch.setattr(attention_flash, "serves", lambda query: query.dtype != torch.float64)
    monkeypatch.setattr(attention_flash, "Causal", cases.CausalInTorch)
    test_whole_step(variant, PRUNED, False, monkeypatch)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_whole_step_with_a_head_of_another_type(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft in fp32: p is as fine as its logits, whatever the target's type; by kernels as in torch."""
    found = []
    for usable in (False, True):
        made, conversations = made_for("plain", PRUNED)
        made.draft.compute_dtype = torch.float32
        made.float().to(cases.DEVICE)
        made.head.to(kind)
        made.loss = LossWeights(forward_kl=1.0, reverse_kl=0.5, tv=0.5)
        monkeypatch.setattr(kernels, "usable", lambda t, answer=usable: answer)
        step = made(pack(made.draft.config, conversations, STEPS, dtype=torch.float32).to(cases.DEVICE), measure=True)
        step.loss.backward()
        found.append((step.loss.detach(), step.sums["alpha"], *[p.grad for p in made.draft.parameters()]))
    for slow, fast in zip(*found, strict=True):
        assert float((slow - fast).norm() / slow.norm()) < 1e-4


@pytest.mark.parametrize(("variant", "draft_ids", "recompute"), STEPS_SEEN)
def test_whole_step(variant: str, draft_ids: list[int] | None, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step with every kernel in fp32 against the torch path in fp64: loss, metrics and gradients. A second backward is refused."""
    slow, conversations = made_for(variant, draft_ids)
    batch = pack(slow.draft.config, conversations, STEPS)
    expected = slow(batch, measure=True)
    expected.loss.backward()
    fast, _ = made_for(variant, draft_ids)
    fast.draft.compute_dtype, fast.draft.recompute = torch.float32, recompute
    fast.float().to(cases.DEVICE)
    monkeypatch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
    narrow = pack(fast.draft.config, conversations, STEPS, dtype=torch.float32).to(cases.DEVICE)
    found = fast(narrow, measure=True)
    (found.loss * 3.0).backward(retain_graph=True)
    assert len(WEIGHTS) == STEPS
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.equal(found.accepted.cpu(), expected.accepted) and torch.equal(found.followed.cpu(), expected.followed)
    for name, values in expected.sums.items():
        torch.testing.assert_close(found.sums[name].double().cpu(), values.double(), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(slow.draft.named_parameters(), fast.draft.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        difference = float((q.grad.double().cpu() / 3.0 - p.grad).norm() / p.grad.norm())
        assert difference < 2e-4, (name, difference)
    with pytest.raises(RuntimeError, match="runs once"):
        found.loss.backward()


@pytest.mark.parametrize(
    ("level", "layers", "recompute", "pruned"), [(Fp8.ROWS, 1, False, False), (Fp8.ROWS, 1, False, True), (Fp8.ALL, 1, True, False), (Fp8.ALL, 2, False, True)]
)
def test_whole_step_in_8_bits(level: Fp8, layers: int, recompute: bool, pruned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss within 2 % and gradients in the direction of the exact step's; validation asks the target exactly. On a GPU without 8-bit products scaled by row
    there is none."""
    if REAL and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no 8-bit products scaled by row")
    ids = list(range(1, 65, 2)) if pruned else None
    sizes = {"hidden_size": 32, "target_hidden_size": 32, "intermediate_size": 48, "vocab_size": 69 if pruned else 48, "draft_vocab_size": 32 if pruned else 48}
    config = draft_config(**sizes, num_layers=layers, initializer_range=0.1)
    conversations = [conversation(config, mask, seed) for seed, mask in enumerate(([0, 1, 1, 1, 1, 1], [0, 1, 1, 1]))]
    slow = task(config, draft_ids=ids, step_weights=WEIGHTS)
    expected = slow(pack(config, conversations, STEPS))
    expected.loss.backward()
    fast = task(config, draft_ids=ids, step_weights=WEIGHTS)
    fast.draft.compute_dtype, fast.draft.recompute, fast.draft.fp8 = torch.float32, recompute, level
    fast.float().to(cases.DEVICE)
    monkeypatch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
    monkeypatch.setattr(mlp, "_SLICE", 3)
    asked: list[bool] = []
    own = TargetHead.parts
    monkeypatch.setattr(TargetHead, "parts", lambda self, normed, *, rounded: asked.append(rounded) or own(self, normed, rounded=rounded))
    batch = pack(config, conversations, STEPS, dtype=torch.float32).to(cases.DEVICE)
    found = fast(batch)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    with torch.no_grad():
        assert fast(batch, measure=True).loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    assert asked == [True, False]
    for (name, p), q in zip(slow.draft.named_parameters(), fast.draft.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.double().cpu().flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("level", list(Fp8))
def test_frozen_head_leaves_out_its_gradient_and_changes_no_other(level: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:
    if REAL and level and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no 8-bit products scaled by row")
    monkeypatch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
    config = draft_config(hidden_size=32, target_hidden_size=32, intermediate_size=48, vocab_size=69, draft_vocab_size=32, initializer_range=0.1)
    conversations = [conversation(config, mask, seed) for seed, mask in enumerate(([0, 1, 1, 1, 1, 1], [0, 1, 1, 1]))]
    batch = pack(config, conversations, STEPS, dtype=torch.float32).to(cases.DEVICE)
    found = []
    for trained in (True, False):
        made = task(config, draft_ids=list(range(1, 65, 2)), step_weights=WEIGHTS)
        made.draft.compute_dtype, made.draft.fp8 = torch.float32, level
        made.float().to(cases.DEVICE)
        made.draft.lm_head.weight.requires_grad_(trained)
        if not trained:
            monkeypatch.setattr(head_loss_fused, "_add_product", None)  # calling it fails
        step = made(batch, measure=True)
        step.loss.backward()
        found.append((step, {name: p.grad for name, p in made.draft.named_parameters()}))
    (one, ours), (other, theirs) = found
    assert torch.equal(one.loss, other.loss) and torch.equal(one.accepted, other.accepted)
    assert ours.pop("lm_head.weight") is not None and theirs.pop("lm_head.weight") is None
    for name, gradient in ours.items():
        assert gradient is not None and torch.equal(gradient, theirs[name]), name


def test_nothing_without_cuda() -> None:
    assert not kernels.usable(torch.zeros(2))
