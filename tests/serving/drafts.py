"""Random block drafts written as an export is, what a server proposes with them, and ours beside it.

Ours come from training's own forward: for a proposal at anchor a the conversation is x_0 .. x_a, its auxiliary states
are Transformers' ``hidden_states``, and the slots of one block give the logits; DSpark's and DFlash 2's walks are made
here, token by token. So one comparison covers layer ids, norms, RoPE, masks, the vocabulary mapping and every tensor.
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
from safetensors.torch import save_file
from torch import Tensor

from tests.forks import cold
from tests.parity.vllm import random_prompts, target_states
from tests.tiny import save_target
from torchspec.batch import PackedBatch
from torchspec.blocks import BlockRows
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.formats import describe, write_mask, written
from torchspec.models.blocks.network import BlockDraft
from torchspec.models.family import Draft, Format
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target, TargetConfig

LAYERS = 8
MASK_TOKEN = 383
TIE = 1e-4
"""Logits nearer than this may be ordered either way in fp32."""


@dataclass(frozen=True)
class Case:
    """A draft to serve."""

    changes: dict[str, Any]
    pruned: int | None = None
    form: Format = "vllm"
    aux_layers: tuple[int, ...] = (2, 4, 7)


@dataclass(frozen=True, eq=False)
class Served:
    """A draft and where it is."""

    draft: BlockDraft
    head: Tensor
    """[W, H] the target's rows."""
    kept: list[int]
    folder: Path


@dataclass(frozen=True)
class Agreement:
    """Of one served draft with ours."""

    proposals: int
    tokens: int
    """Compared; what follows a tie in its proposal is not."""
    ties: int
    different: int
    accepted: int
    logit_difference: float
    """Largest between the logit of the server's token and ours of the same one, where its tokens before are ours."""


def make(case: Case, target: Target, folder: Path) -> Served:
    """Random weights of a fair size, every norm with weights of its own, nothing at its neutral start."""
    changes = {"num_layers": 1, "block_size": 8, "mask_token_id": MASK_TOKEN, "initializer_range": 0.1, **case.changes}
    config = BlockConfig.from_target(target, aux_layers=case.aux_layers, **changes)
    kept = list(range(config.vocab_size))
    if case.pruned is not None:
        kept = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))[: case.pruned].sort().values.tolist()
        config = config.with_draft_vocabulary(case.pruned)
    torch.manual_seed(0)
    draft = BlockDraft(config)
    draft.set_embedding(read_embedding(target).float())
    draft.initialise()
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            spread = 0.2 if parameter.ndim == 1 or "kernel" in name or "codebook" in name else 0.3 if "markov" in name else 0.0
            parameter.add_(spread * torch.randn_like(parameter))
    head = TargetHead.of(target).weight.float()
    folder.mkdir(parents=True)
    described = describe(config, target, form=case.form, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(described))
    vocabulary = None if case.pruned is None else VocabularyMapping(torch.tensor(kept), config.vocab_size)
    made = Draft(config, {name: parameter.detach().contiguous() for name, parameter in draft.named_parameters()}, vocabulary)
    write_mask(folder, made)
    save_file(written(made, target, dtype=torch.float32), folder / "model.safetensors")
    return Served(draft, head[kept], kept, folder)


def serve(folder: Path, target: Path, drafts: list[Served], prompts: list[list[int]], *, tokens: int, newer: bool) -> list[dict[str, Any]]:
    """Run ``tests.serving.child`` in a process of its own; one result a draft."""
    jobs = [{"folder": str(d.folder), "method": "dspark" if d.draft.config.kind == "dspark" else "dflash", "k": d.draft.config.horizon} for d in drafts]
    job = {"target": str(target), "drafts": jobs, "prompts": prompts, "tokens": tokens, "newer": newer}
    (folder / "job.json").write_text(json.dumps(job))
    with (folder / "vllm.log").open("w") as log:
        command = [sys.executable, "-m", "tests.serving.child", str(folder / "job.json"), str(folder / "out.json")]
        with cold():  # Triton's interpreter is chosen before Triton is imported
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=1500, check=False).returncode
    if code:
        lines = (folder / "vllm.log").read_text(errors="replace").splitlines()
        raise RuntimeError("vLLM ended with:\n" + "\n".join(lines[-40:]))
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


@torch.no_grad()
def block_states(draft: BlockDraft, prefixes: list[list[int]], states: list[Tensor]) -> Tensor:
    """[P, S, H] after the final norm, one block at the last token of each prefix x_0 .. x_a.

    Args:
        draft: the network.
        prefixes: of each proposal.
        states: [a or more, n*D] auxiliary states of each.
    """
    lengths = [len(prefix) for prefix in prefixes]
    bounds = np.cumsum([0, *lengths])
    aux = torch.cat([rows[:length] if len(rows) >= length else torch.cat([rows, rows[:1] * 0]) for rows, length in zip(states, lengths, strict=True)])
    anchor = torch.from_numpy(bounds[1:] - 1)
    slots, ones = draft.config.block_size, torch.ones(len(prefixes), dtype=torch.int64)
    rows = BlockRows(
        base=anchor - 1,
        depth=ones,
        spans=torch.stack([torch.from_numpy(bounds[:-1]), anchor], dim=1),
        target=anchor,
        slot=torch.arange(len(prefixes)) * slots,
        unique=anchor,
        index=torch.arange(len(prefixes)),
        slots=slots,
    )
    batch = PackedBatch(
        input_ids=torch.tensor([token for prefix in prefixes for token in prefix]),
        position=torch.cat([torch.arange(length) for length in lengths]),
        sequence=torch.repeat_interleave(torch.arange(len(prefixes)), torch.tensor(lengths)),
        turn=torch.zeros(int(bounds[-1]), dtype=torch.int64),
        aux=aux,
        last=torch.zeros(int(bounds[-1]), draft.config.hidden_size),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        sample_ids=tuple(range(len(prefixes))),
        counts=torch.ones(1),
        rows=rows,
    )
    return draft.norm(draft.blocks(batch, rows, draft.context(batch))).view(len(prefixes), slots, -1)


@torch.no_grad()
def proposal(made: Served, states: Tensor, anchor: int, follow: list[int]) -> tuple[list[int], list[Tensor]]:
    """Greedy draft tokens of one block, and the scores over ``kept`` that each was chosen by.

    Args:
        made: the draft.
        states: [S, H] of the block.
        anchor: token x_a.
        follow: what the walk takes for its own tokens, so that one tie does not change the rest.
    """
    draft, config, previous = made.draft, made.draft.config, anchor
    tokens, scores = [], []
    for step, state in enumerate(states[config.shift :]):
        z = made.head @ state
        if config.kind == "dspark":
            z = z + draft.markov_head.markov_w2.weight @ draft.markov_head.markov_w1.weight[previous]
        if config.kind == "dflash2":
            selector = draft.candidate_selector
            best = z.topk(config.selector_candidates).indices
            asked = selector.predecessor_codebook[previous] * (selector.hidden_projection.weight @ state)
            z = torch.full_like(z, float("-inf")).index_copy(0, best, z[best] + selector.successor_codebook[best] @ asked)
        z = z * config.logit_scale
        tokens.append(made.kept[int(z.argmax())])
        scores.append(z)
        previous = follow[step]
    return tokens, scores


def compare(made: Served, target: Path, prompts: list[list[int]], served: dict[str, Any]) -> Agreement:
    """Every proposal of a served draft with ours."""
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, served["answers"], strict=True)]
    of_sequence = target_states(target, sequences, made.draft.config.aux_layers)
    prefixes: list[list[int]] = []
    states: list[Tensor] = []
    theirs: list[tuple[list[int], list[float]]] = []
    for ids, aux, proposals in zip(sequences, of_sequence, served["proposals"], strict=True):
        for position, anchor, tokens, logits in proposals:
            if position >= len(ids):
                continue  # vLLM drafts once more after an answer's last token
            assert ids[position] == anchor
            prefixes.append(ids[: position + 1])
            states.append(aux)
            theirs.append((tokens, logits))
    blocks = block_states(made.draft, prefixes, states)
    row_of = {token: row for row, token in enumerate(made.kept)}
    compared = ties = different = 0
    largest = 0.0
    for prefix, block, (other, their_logits) in zip(prefixes, blocks, theirs, strict=True):
        mine, scores = proposal(made, block, prefix[-1], other)
        for step, z in enumerate(scores):
            row = row_of.get(other[step])
            if their_logits:
                largest = max(largest, abs(float(z[row]) - their_logits[step]) if row is not None else float("inf"))
            if mine[step] == other[step]:
                compared += 1
                continue
            tie = row is not None and float(z.max() - z[row]) < TIE
            ties, different = ties + tie, different + (not tie)
    return Agreement(len(prefixes), compared, ties, different, int(served["accepted"]), largest)


def run(folder: Path, cases: dict[str, Case], *, prompts: int, tokens: int, newer: bool) -> dict[str, Agreement]:
    """Serve the cases in one vLLM process and compare each."""
    path = save_target(folder / "target", layers=LAYERS, spread=0.07)
    target = Target(TargetConfig(str(path), dtype="float32"))
    given = random_prompts(prompts, 380)
    drafts = {name: make(case, target, folder / f"draft-{number}") for number, (name, case) in enumerate(cases.items())}
    served = serve(folder, path, list(drafts.values()), given, tokens=tokens, newer=newer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: compare(made, path, given, found) for (name, made), found in zip(drafts.items(), served, strict=True)}
    finally:
        torch.set_num_threads(threads)
