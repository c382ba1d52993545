"""Loss and every gradient of block drafts against the plain reference, in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.blocks.packs import Setting, V, block_config, conversations, difference, pack
from torchspec.blocks import BlockRows, as_blocks
from torchspec.models.blocks import attention

KEPT = [i for i in range(V) if i % 3]
EXACT = 1e-9

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dflash": ({}, {}),
    "decay, argmax": ({}, {"weights": "decay", "gamma": 4.0, "label": "argmax"}),
    "causal": ({"causal": True}, {"weights": "uniform"}),
    "window": ({"sliding_window": 3}, {}),
    "window, causal": ({"sliding_window": 3, "causal": True}, {}),
    "window inside the block": ({"sliding_window": 2, "block_size": 6}, {}),
    "three layers, bias, learned mask": ({"num_layers": 3, "attention_bias": True, "learned_mask": True}, {}),
    "pruned": ({}, {"kept": KEPT}),
    "pruned, soft": ({}, {"kept": KEPT, "losses": {"forward_kl": 1.0, "tv": 0.5, "cross_entropy": 0.3}}),
    "every soft loss": ({}, {"losses": {"reverse_kl": 0.7, "jsd": 0.5, "lk_alpha": 0.3, "lk_lambda": 1.0}, "weights": "decay"}),
    "logit scale": ({"logit_scale": 0.6}, {"losses": {"forward_kl": 1.0, "cross_entropy": 0.5}}),
    "one token": ({"block_size": 2}, {}),
    "dspark": ({"kind": "dspark"}, {}),
    "dspark as published": ({"kind": "dspark"}, {"losses": {"cross_entropy": 0.1, "tv": 1.8}, "weights": "decay", "gamma": 4.0, "confidence": 1.0}),
    "dspark, pruned, argmax confidence": ({"kind": "dspark", "logit_scale": 0.7}, {"kept": KEPT, "confidence_target": "argmax", "confidence": 0.5}),
    "dspark without confidence": ({"kind": "dspark", "confidence": False}, {"label": "argmax"}),
    "dflash2": ({"kind": "dflash2"}, {}),
    "dflash2, three taps": ({"kind": "dflash2", "conv_taps": 3, "logit_scale": 0.8}, {"losses": {"forward_kl": 1.0}, "weights": "decay", "selector": 0.7}),
    "dflash2, argmax, causal": ({"kind": "dflash2", "causal": True}, {"label": "argmax"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_the_references(name: str) -> None:
    changes, given = CASES[name]
    setting = Setting.of(block_config(**changes), **given)
    texts = conversations(setting.config)
    found = difference(setting.ours(pack(setting.config, texts)), setting.expected(texts))
    assert found < (EXACT if setting.config.logit_scale == 1.0 else 1e-6), found  # the target's own scale is applied in fp32


@pytest.mark.parametrize("slip", ["context sees the anchor", "labels one late", "windows of the anchor"])
def test_planted_slips_are_seen(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting.of(block_config(sliding_window=3))
    texts = conversations(setting.config)
    batch = pack(setting.config, texts)
    if slip == "context sees the anchor":
        batch = replace(batch, rows=replace(as_blocks(batch.rows), spans=as_blocks(batch.rows).spans + torch.tensor([0, 1])))
        hidden = attention._hidden

        def late(tile: Any, rows: BlockRows, mask: Any) -> Tensor:
            return hidden(tile, replace(rows, base=rows.base + 1), mask)

        monkeypatch.setattr(attention, "_hidden", late)
    elif slip == "labels one late":
        draft_rows = setting.task._draft_rows
        monkeypatch.setattr(setting.task, "_draft_rows", lambda tokens: draft_rows(tokens.roll(1)))
    else:
        monkeypatch.setattr(attention, "_hidden", _window_of_the_anchor)
    assert difference(setting.ours(batch), setting.expected(texts)) > 1e-3


def _window_of_the_anchor(tile: Any, rows: BlockRows, mask: Any) -> Tensor:
    """As speculators trains: the same context for every slot of a block."""
    anchor = rows.base[tile.low : tile.high] + 1
    context = torch.arange(tile.start, tile.end)
    outside = (context >= anchor[:, None]) | (context < anchor[:, None] - mask.window)
    block = torch.zeros(tile.high - tile.low, rows.slots, rows.slots, dtype=torch.bool)
    return torch.cat([outside[:, None].expand(-1, rows.slots, -1), block], dim=-1)
