"""How often ranks talk in an optimizer step, and that what they compute is what one rank computes over all packs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.scaling import Case
from tests.distributed.ranks import on_ranks
from torchspec.models.eagle3.config import DraftConfig

CONFIG = DraftConfig(
    hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=96, draft_vocab_size=96, target_hidden_size=32,
    aux_layers=(1, 2, 3), rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=256,
)  # fmt: skip
ARGUMENTS = Namespace(accumulate=3, lengths="dense", unroll_steps=2)


def _talk(rank: int, strategy: str) -> None:
    case = Case(strategy, CONFIG, 24, ARGUMENTS, torch.device("cpu"))
    for _ in range(2):
        case.step()  # DDP sets up its buckets anew in the second one
    with profile(activities=[ProfilerActivity.CPU]) as found:
        case.step()
    calls = sorted(e.name for e in found.events() if e.name.startswith("gloo:"))
    reductions = [name for name in calls if "reduce" in name]
    if strategy == "ddp":
        assert reductions == ["gloo:all_reduce"] and calls == reductions, calls  # one bucket; no buffers
    else:
        assert len([name for name in calls if "gather" in name]) == 1, calls
        assert len(reductions) == 2, calls  # gradients, and the norm they are clipped by
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm([p.grad for p in case.trained if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    others = [torch.zeros_like(norm) for _ in range(2)]
    torch.distributed.all_gather(others, norm)
    assert torch.equal(others[0], others[1]) and float(norm) > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_optimizer_step_of_three_micro_batches_talks_once(strategy: str, tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _talk, strategy)
