"""Greedy drafts of ours beside those of a served export, token by token.

Ours come from training's own forward: for a proposal at position t the conversation is x_0 .. x_{t+1} and the draft's own tokens, its aux states are
Transformers' ``hidden_states``, and step k's logits at t give the next token. So one comparison covers layer ids, norms, RoPE, the unroll, the vocabulary
mapping and every tensor that the export holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.models.exports import Exported
from torchspec.batch import PackedBatch
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.supervision import UnrollRows

TIE = 1e-4
"""Logits nearer than this may be ordered either way in fp32."""
K = 3


@dataclass(frozen=True)
class Agreement:
    """Of one served draft with ours."""

    proposals: int
    tokens: int
    """Compared; what follows a tie in its proposal is not."""
    ties: int
    different: int
    accepted: int
    """Draft tokens that vLLM's target took."""
    logit_difference: float
    """Largest between the logit of vLLM's token and ours of the same one, where the tokens before it are the same."""


def random_prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Of 2 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 31, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def serve(folder: Path, target: Path, drafts: list[Path], prompts: list[list[int]], *, tokens: int, **engine_args: Any) -> list[dict[str, Any]]:
    """Run ``vllm_proposals`` in a process of its own; one result a draft."""
    job = {"target": str(target), "drafts": [str(d) for d in drafts], "prompts": prompts, "tokens": tokens, "k": K, "engine_args": engine_args}
    (folder / "job.json").write_text(json.dumps(job))
    with (folder / "vllm.log").open("w") as log:
        command = [sys.executable, "-m", "tests.parity.vllm_proposals", str(folder / "job.json"), str(folder / "out.json")]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1500, check=False).returncode
    if code:
        lines = (folder / "vllm.log").read_text(errors="replace").splitlines()
        raise RuntimeError("vLLM ended with:\n" + "\n".join(lines[-40:]))
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def target_states(target: Path, sequences: list[list[int]], aux_layers: tuple[int, ...]) -> list[Tensor]:
    """Of each sequence [T, n*D]: Transformers' ``hidden_states``; the last index is what enters the final norm."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    found = []
    for ids in sequences:
        before: list[Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))  # noqa: B023
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        hook.remove()
        states = [*states[:-1], before[0]]
        found.append(torch.cat([states[i][0] for i in aux_layers], dim=-1))
    return found


def unrolled(base: Tensor, steps: int, total: int) -> UnrollRows:
    """Rows of an unroll of ``steps`` steps at each of ``base`` [P] in a pack of ``total`` tokens: a turn of that many tokens, of which the first
    alone lasts to the end.

    Rows of a turn follow each other (``UnrollRows``), so each proposal has ``steps`` of them; from step 1 on only its first is computed.
    """
    count = len(base)
    every, first = torch.arange(count * steps), steps * torch.arange(count)
    depth = torch.ones_like(every)
    depth[first] = steps
    return UnrollRows.of(
        (base[:, None] + torch.arange(steps)).flatten(),
        (every, *[first] * (steps - 1)),
        (every, *[first] * (steps > 1), *[torch.arange(count)] * (steps - 2)),
        depth=depth,
        total=total,
    )


def our_drafts(draft: Eagle3Draft, ids_of_rows: Tensor | None, prefixes: list[list[int]], states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy proposals.

    Args:
        draft: the network.
        ids_of_rows: [W] target ids of a pruned head.
        prefixes: x_0 .. x_{t+1} of each proposal.
        states: [t + 1 or more, n*D] aux states of each.

    Returns:
        tokens [P, K], logits [P, K, W].
    """
    lengths = [len(prefix) + K for prefix in prefixes]
    cu = np.cumsum([0, *lengths])
    count, width = len(prefixes), states[0].shape[1]
    ids, aux = torch.zeros(int(cu[-1]), dtype=torch.int64), torch.zeros(int(cu[-1]), width)
    for start, prefix, rows in zip(cu[:-1], prefixes, states, strict=True):
        ids[start : start + len(prefix)] = torch.tensor(prefix)
        aux[start : start + len(prefix) - 1] = rows[: len(prefix) - 1]
    base = torch.tensor([int(start) + len(prefix) - 2 for start, prefix in zip(cu[:-1], prefixes, strict=True)])
    tokens, logits = [], []
    for step in range(K):
        batch = PackedBatch(
            input_ids=ids,
            position=torch.cat([torch.arange(length) for length in lengths]),
            sequence=torch.repeat_interleave(torch.arange(count), torch.tensor(lengths)),
            turn=torch.zeros_like(ids),
            aux=aux,
            last=torch.zeros(len(ids), draft.config.target_hidden_size),
            cu_seqlens=torch.from_numpy(cu.astype(np.int32)),
            sample_ids=tuple(range(count)),
            counts=torch.ones(step + 1),
            rows=unrolled(base, step + 1, len(ids)),
        )
        with torch.no_grad():
            z = draft.lm_head(draft.norm(draft(batch)[step]))
        chosen = z.argmax(-1)
        tokens.append(chosen if ids_of_rows is None else ids_of_rows[chosen])
        logits.append(z)
        ids[base + 2 + step] = tokens[-1]
    return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)


def compare(made: Exported, target: Path, prompts: list[list[int]], served: dict[str, Any]) -> Agreement:
    """Every proposal of a served draft with ours."""
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, served["answers"], strict=True)]
    of_sequence = target_states(target, sequences, made.config.aux_layers)
    prefixes, states, theirs = [], [], list[tuple[list[int], list[float]]]()
    for ids, aux, proposals in zip(sequences, of_sequence, served["proposals"], strict=True):
        for position, following, tokens, their_logits in proposals:
            if position + 2 > len(ids):
                continue  # vLLM drafts once more after an answer's last token
            assert ids[position + 1] == following
            prefixes.append(ids[: position + 2])
            states.append(aux)
            theirs.append((tokens, their_logits))
    ids_of_rows = None if made.vocabulary is None else made.vocabulary.draft_ids
    ours, logits = our_drafts(made.draft, ids_of_rows, prefixes, states)
    row_of = {int(token): row for row, token in enumerate(range(made.config.vocab_size) if ids_of_rows is None else ids_of_rows)}
    compared = ties = different = 0
    largest = 0.0
    for mine, z, (other, their_logits) in zip(ours.tolist(), logits, theirs, strict=True):
        for step in range(K):
            row = row_of.get(other[step])
            largest = max(largest, abs(float(z[step, row]) - their_logits[step]) if row is not None else float("inf"))
            if mine[step] == other[step]:
                compared += 1
                continue
            tie = row is not None and float(z[step].max() - z[step, row]) < TIE
            ties, different = ties + tie, different + (not tie)
            break
    return Agreement(len(prefixes), compared, ties, different, int(served["accepted"]), largest)
