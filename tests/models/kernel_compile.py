"""Compiles for an H100 every Triton kernel that a training step launches in bf16 and in 8 bits, on a machine without a GPU. Nothing is run.

The interpreter, in which the other tests run kernels, knows no types: what Triton refuses (a pointer of another type in each branch, say) only shows here.
The backward of the norms is also compiled at widths of models, where its registers have to allow as many programs at a time as it starts. Prints a line a
compiled variant; ``test_kernels.py`` runs it, by hand: ``python -m tests.models.kernel_compile``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.models.blocks.anchors import drawn
from tests.models.packs import conversation, draft_config, pack, task
from torchspec.models.ops import head_loss_fused, kernels
from torchspec.models.ops.attention import flash as attention_flash
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.kernels import layer_input, norm

STEPS = 3
MEMORY = 227 * 2**10
"""Bytes of shared memory that a program may have."""
TARGET = GPUTarget("cuda", 90, 32)
FIRST = [[[0, 0, 1, 1, 1, 1, 1, 1]], [[1] * 120, [0, 1, 1, 1, 1]]]
"""Masks of packs of which few and nearly all rows are supervised: with them everything is compiled."""
OTHERS = [[[0] * 9 + [1] * 24], [[0] * 14 + [1] * 3], [[1] * 17], [[1] * 49], [[1] * 64]]
"""Of packs for which nothing is: counts that are multiples of 16 and that are not, a single row in a last step or chunk."""


class _NoDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _NoAttention:
    """Stands for the library's flash kernel; shapes and strides as it has them."""

    def __init__(self, like: Tensor, *, total: int, bounds: Tensor, longest: int) -> None:
        self.rows = total + 8

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0]).t()

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, ...]:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _product(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.mm or torch.addmm with ``out_dtype``, which a CPU does not know."""

    def made(*given: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        found = real(*(t.to(given[-1].dtype) for t in given))
        return found.to(out_dtype or found.dtype) if out is None else out.copy_(found)

    return made


def _narrow_product(x: Tensor, y: Tensor, *, out_dtype: torch.dtype, **scales: Any) -> Tensor:
    """torch._scaled_mm as far as its shape and type go."""
    return torch.zeros(x.shape[0], y.shape[1], dtype=out_dtype)


def compiled(patch: pytest.MonkeyPatch, level: Fp8, *, train_head: bool = True, **options: Any) -> set[tuple[str, str]]:
    """(kernel, hash) of each that a step of a draft compiles."""
    found: set[tuple[str, str]] = set()
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **more)
        found.add((f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}", kernel.hash))
        return kernel

    patch.setattr(JITFunction, "run", only_compile)
    patch.setattr(kernels, "usable", lambda t: t.dtype != torch.float64)
    patch.setattr(attention_flash, "Causal", _NoAttention)
    patch.setattr(head_loss_fused, "_CHUNK_ROWS", 16)
    patch.setattr(torch, "mm", _product(torch.mm))
    patch.setattr(torch, "addmm", _product(torch.addmm))
    patch.setattr(torch, "_scaled_mm", _narrow_product)
    config = draft_config(hidden_size=64, target_hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, **options)
    made = task(config.with_draft_vocabulary(32), draft_ids=list(range(3, 35)), step_weights=[1.0] * STEPS, dtype=torch.bfloat16)
    made.head.to(torch.bfloat16)
    made.draft.fp8 = level
    made.draft.lm_head.weight.requires_grad_(train_head)
    for masks in (*FIRST, *OTHERS):
        if masks is OTHERS[0]:
            known = frozenset(found)
        conversations = [conversation(config, mask, seed) for seed, mask in enumerate(masks)]
        made(pack(config, conversations, STEPS, dtype=torch.bfloat16), measure=True).loss.backward()
    again = sorted(name for name, _ in found - known)
    assert not again, f"compiled again for packs of other sizes: {again}"
    return found


def compiled_for_blocks(patch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(kernel, hash) of each that the attention of block drafts compiles, at sizes of models."""
    from torchspec.models.blocks import attention_triton

    found: set[tuple[str, str]] = set()
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **more)
        assert kernel.metadata.shared <= MEMORY, (self.fn.__name__, kernel.metadata.shared)
        found.add((f"block_attention.{self.fn.__name__}", kernel.hash))
        return kernel

    patch.setattr(JITFunction, "run", only_compile)
    for slots, heads, groups, size, causal, window in ((16, 32, 8, 128, True, None), (7, 9, 3, 64, False, 512), (16, 8, 4, 256, True, None)):
        sizes = attention_triton.kernel.Sizes(slots, heads, groups, size, causal, window)
        known: frozenset[tuple[str, str]] = frozenset()
        for number in (1, 5):
            rows = drawn([40, 9], [number, 2], slots, seed=1)
            shapes = [(rows.base.shape[0] * slots, heads), *[(rows.base.shape[0] * slots, groups)] * 2, *[(49, groups)] * 2]
            given = [torch.zeros(*shape, size, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
            attention_triton.attend(attention_triton.Plan(rows, sizes), *given).sum().backward()
            assert not known or not found - known, "compiled again for packs of other sizes"
            known = frozenset(found)
    return found


def registers(patch: pytest.MonkeyPatch, width: int) -> list[tuple[str, int, int]]:
    """(kernel, registers a thread, warps) of the norms' backward variants for bf16 rows of a width."""
    found: list[tuple[str, int, int]] = []
    run = JITFunction.run

    def look(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **more)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            told = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        number = re.search(r"REG:(\d+)", told)
        assert number is not None, told
        found.append((f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}", int(number[1]), kernel.metadata.num_warps))
        return kernel

    patch.setattr(JITFunction, "run", look)
    x, weight, inverse = torch.zeros(4, width, dtype=torch.bfloat16), torch.zeros(width), torch.zeros(4, 1)
    norm.backward(x, x, weight, inverse, more=x)
    norm.backward(x, x, weight, inverse, place=torch.arange(4), out=x)
    for every, state in ((None, x), (x, None)):
        to, partial = torch.arange(4, dtype=torch.int32), layer_input.sums(width, x.device)
        layer_input.backward(x, x, every, state, x, weight, to, inverse[:, 0], partial, normed_residual=every is not None)
    return found


def main() -> None:
    driver.set_active(_NoDriver())
    for width in (576, 2048, 4096, 7168):
        with pytest.MonkeyPatch.context() as patch:
            for name, used, warps in registers(patch, width):
                resident = 65536 // (-(-used // 8) * 8 * 32 * warps) * 132
                assert resident >= norm.programs(width), (name, width, used, warps)
                print(f"{name} of {width} in {used} registers and {warps} warps: {resident} programs at a time, of {norm.programs(width)}", flush=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, which in sorted(compiled_for_blocks(patch)):
            print(f"{name} {which[:12]} for sm_{TARGET.arch} by Triton {triton.__version__}", flush=True)
    two: dict[str, Any] = {"norm_before_residual": True, "num_layers": 2}
    frozen: dict[str, Any] = {"train_head": False}
    cases = [(Fp8.NONE, {}), (Fp8.NONE, two), (Fp8.NONE, {"qk_norm": True}), (Fp8.ROWS, two), (Fp8.ALL, {}), *((level, frozen) for level in Fp8)]
    for level, options in cases:
        with pytest.MonkeyPatch.context() as patch:
            for name, which in sorted(compiled(patch, level, **options)):
                print(f"{name} {which[:12]} for sm_{TARGET.arch} by Triton {triton.__version__}", flush=True)


if __name__ == "__main__":
    main()
