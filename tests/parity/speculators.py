"""Our draft and the ``speculators`` package's on the same exported directory: logits of every unroll step.

speculators' own unroll runs in fp32 with its plain attention; its forward returns tokens alone, so the logits are read at its ``lm_head``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models.exports import Exported, export_variant
from tests.models.packs import Conversation, pack
from torchspec.target import Target

LENGTH = 14
STEPS = 4
SPREAD = 0.02 * (2048 / 16) ** 0.5
"""Standard deviation of the drafts' matrices, 0.23: at their H = 16 a product then has the gain, deviation x sqrt(H), that Llama's 0.02 gives at H = 2048.
Logits reach 3.7. At 0.3 what either side rounds in fp32 grows to 1.1e-5 over four steps of EAGLE-3.1."""


def exported(variant: str, target: Target, folder: Path, *, draft_ids: list[int] | None = None) -> Exported:
    """A random draft of a variant in speculators' format.

    Raises:
        UserError: the format cannot say it.
    """
    return export_variant(variant, target, folder, form="speculators", draft_ids=draft_ids, spread=SPREAD)


def conversation_for(made: Exported, seed: int = 0) -> Conversation:
    """Random tokens and states, all supervised."""
    generator = torch.Generator().manual_seed(seed)
    D, n = made.config.target_hidden_size, len(made.config.aux_layers)
    ids = torch.randint(0, made.config.vocab_size, (LENGTH,), generator=generator).tolist()
    return Conversation(ids, [1] * LENGTH, torch.randn(LENGTH, n * D, generator=generator), torch.randn(LENGTH, D, generator=generator))


def our_logits(made: Exported, given: Conversation) -> list[Tensor]:
    """Per step, [R_k, W] at the supervised rows; row r is position ``r`` of the conversation."""
    batch = pack(made.config, [given], STEPS, dtype=torch.float32)
    with torch.no_grad():
        states = made.draft(batch)
        assert all(torch.equal(batch.rows.base[index], torch.arange(len(index))) for index in batch.rows.index)
        return [made.draft.lm_head(made.draft.norm(state)) for state in states]


def their_logits(folder: Path, given: Conversation) -> list[Tensor]:
    """Per step, [T - 1, W] of speculators' teacher-forced unroll."""
    from speculators.config import SpeculatorModelConfig
    from speculators.models.eagle3 import Eagle3DraftModel

    config: Any = SpeculatorModelConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(str(folder), config=config, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    length = len(given.ids) - 1
    with torch.no_grad():
        model(
            given.aux[None, :-1].float(), torch.tensor(given.ids)[None, 1:], torch.zeros(1, length, dtype=torch.int64),
            position_ids=torch.arange(length)[None], ttt_steps=STEPS,
        )  # fmt: skip
    return seen


def largest_difference(made: Exported, given: Conversation) -> float:
    """Over steps, rows and draft rows."""
    ours, theirs = our_logits(made, given), their_logits(made.folder, given)
    assert len(ours) == len(theirs) == STEPS
    return max(float((mine - other[: len(mine)]).abs().max()) for mine, other in zip(ours, theirs, strict=True))
