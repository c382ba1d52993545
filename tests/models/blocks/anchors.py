"""Blocks at given or random anchors, for what reads nothing else of them. Imports no kernel: who asks for it decides whether Triton interprets."""

from __future__ import annotations

import torch

from torchspec.blocks import BlockRows


def blocks(anchors: list[list[int]], lengths: list[int], slots: int, device: torch.device | str = "cpu") -> BlockRows:
    """Blocks at these positions of conversations of these lengths; what the loss reads of them is left empty."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    spans = [[start, start + at] for start, chosen in zip(starts, anchors, strict=True) for at in chosen]
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return BlockRows((table[:, 1] - 1).to(device), torch.ones(len(table), dtype=torch.int64), table, none, none, none, none, slots)


def drawn(lengths: list[int], numbers: list[int], slots: int, *, seed: int, device: torch.device | str = "cpu") -> BlockRows:
    """So many random anchors in each conversation."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [sorted((1 + torch.randperm(length - 1, generator=generator)[:number]).tolist()) for length, number in zip(lengths, numbers, strict=True)]
    return blocks(chosen, lengths, slots, device)
