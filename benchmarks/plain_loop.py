"""A plain EAGLE-3 training loop in one process, as one would write it from the paper: the yardstick for TorchSpec's speed.

Padded batches of 4 conversations; the target runs inside the loop with ``output_hidden_states``; K unroll steps over an explicitly growing list of
keys with an explicit mask; soft cross-entropy on a pruned vocabulary; AdamW; PyTorch's own kernels everywhere, and nothing slowed down on purpose:
the target runs in bfloat16 where this machine has instructions for it, batches are padded only to their longest row, attention is
``scaled_dot_product_attention``. Only reading and rendering of conversations is shared with TorchSpec. It prints one JSON line; tokens are real ones,
padding is not counted, the time covers the target.

    python benchmarks/plain_loop.py --target outputs/quickstart/target --data examples/hf-quickstart/data/train.jsonl --seconds 60
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchspec.data.conversations import RowError, parse
from torchspec.data.render import Renderer
from torchspec.data.sources import find_sources, read_rows
from torchspec.files import dumps
from torchspec.hardware import working_dtype
from torchspec.paths import expand_all
from torchspec.target import Target, TargetConfig


class PlainDraft(nn.Module):
    """One EAGLE-3 block; shapes: B batch, T tokens, H hidden, W draft vocabulary."""

    def __init__(self, config: LlamaConfig, aux_layers: int, draft_vocab_size: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or hidden // self.heads
        self.fc = nn.Linear(aux_layers * hidden, hidden, bias=False)
        self.embed_norm, self.hidden_norm = LlamaRMSNorm(hidden, eps), LlamaRMSNorm(hidden, eps)
        self.q = nn.Linear(2 * hidden, self.heads * self.head_dim, bias=False)
        self.k = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.mlp_norm = LlamaRMSNorm(hidden, eps)
        self.gate = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)
        self.norm = LlamaRMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def step(self, embedded: Tensor, hidden: Tensor, k: int, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
        """Unroll step k: ``embedded`` and ``hidden`` [B, T, H] to hidden [B, T, H]; appends its keys and values; ``mask`` [B, 1, T, (k+1)T]."""
        b, t, _ = hidden.shape
        both = torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        q = self.q(both).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        key = self.k(both).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.v(both).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary(hidden, torch.arange(k, t + k, device=hidden.device)[None])
        q, key = apply_rotary_pos_emb(q, key, cos, sin)
        keys.append(key)
        values.append(value)
        mixed = F.scaled_dot_product_attention(q, torch.cat(keys, dim=2), torch.cat(values, dim=2), attn_mask=mask, enable_gqa=True)
        hidden = hidden + self.o(mixed.transpose(1, 2).reshape(b, t, -1))
        normed = self.mlp_norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


def step_masks(valid: Tensor, steps: int) -> list[Tensor]:
    """Who sees whom: step 0's keys causally, each later step's key only at its own position. ``valid`` [B, T] bool; entry k is [B, 1, T, (k+1)T]."""
    b, t = valid.shape
    causal = torch.ones(t, t, dtype=torch.bool, device=valid.device).tril() & valid[:, None, :]
    diagonal = torch.eye(t, dtype=torch.bool, device=valid.device).expand(b, t, t)
    causal = causal | diagonal  # a padded row must see something
    return [torch.cat([causal, *[diagonal] * k], dim=-1)[:, None] for k in range(steps)]


def shift(tensor: Tensor, by: int) -> Tensor:
    """``tensor`` [B, T, ...] moved ``by`` places to the left, zeros behind."""
    return torch.cat([tensor[:, by:], torch.zeros_like(tensor[:, :by])], dim=1)


def batch_loss(
    draft: PlainDraft, target: PreTrainedModel, ids: Tensor, loss_mask: Tensor, valid: Tensor, draft_ids: Tensor, in_draft: Tensor, steps: int, aux: list[int]
) -> Tensor:
    """Loss of one padded batch: ``ids``, ``loss_mask``, ``valid`` [B, T]; ``draft_ids`` [W]; ``in_draft`` [V]."""
    with torch.inference_mode():
        out = target(input_ids=ids, attention_mask=valid.long(), output_hidden_states=True, use_cache=False)
        states = torch.cat([out.hidden_states[i] for i in aux], dim=-1).float()
        learnable = in_draft[out.logits.argmax(-1)]  # positions whose best token the draft can say
        probabilities = out.logits[..., draft_ids].float().softmax(-1)
    embedding = target.get_input_embeddings()
    hidden = draft.fc(states.clone())
    probabilities, learnable = probabilities.clone(), learnable.clone()
    supervised = shift(loss_mask, 1).bool()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    total = torch.zeros((), device=ids.device)
    for k, mask in enumerate(step_masks(valid, steps)):
        with torch.no_grad():
            embedded = embedding(shift(ids, 1 + k)).float()
        hidden = draft.step(embedded, hidden, k, keys, values, mask)
        supervised = supervised & shift(loss_mask, 2 + k).bool()
        wanted = supervised & shift(learnable, 1 + k)
        log_q = draft.lm_head(draft.norm(hidden)).log_softmax(-1)
        cross_entropy = -(shift(probabilities, 1 + k) * log_q).sum(-1)
        total = total + 0.8**k * (cross_entropy * wanted).sum() / supervised.sum().clamp(min=1)
    return total


def load(data: str, target: str, max_length: int) -> list[tuple[Tensor, Tensor]]:
    """(ids, loss mask) of every conversation, cut to ``max_length``; those without a supervised token are left out."""
    renderer = Renderer(Target(TargetConfig(target)).tokenizer(), name=target)
    rows = []
    for source in find_sources(data, config_key="--data"):
        for text, _ in read_rows(source, config_key="--data"):
            try:
                shown = renderer.render(parse(text))
            except RowError:
                continue
            ids, mask = torch.from_numpy(shown.ids[:max_length]).long(), torch.from_numpy(shown.mask[:max_length]).long()
            if mask.sum() >= 2:
                rows.append((ids, mask))
    return rows


def batches(rows: list[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches for ever: ids, loss mask and validity, each [size, T] padded to the longest row."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            chosen = [rows[i] for i in order[start : start + size]]
            ids = nn.utils.rnn.pad_sequence([r[0] for r in chosen], batch_first=True)
            mask = nn.utils.rnn.pad_sequence([r[1] for r in chosen], batch_first=True)
            valid = nn.utils.rnn.pad_sequence([torch.ones(len(r[0]), dtype=torch.bool) for r in chosen], batch_first=True)
            yield ids, mask, valid


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--target", required=True, help="model directory or hub id")
    parser.add_argument("--data", required=True, help="conversation file")
    parser.add_argument("--seconds", type=float, default=60.0, help="training time, after one untimed step")
    parser.add_argument("--unroll_steps", type=int, default=4)
    parser.add_argument("--draft_vocab_size", type=int, default=8192)
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a conversation that are used")
    parser.add_argument("--batch_size", type=int, default=4, help="conversations a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--target_dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="type the target runs in (auto: bfloat16 where this device has instructions for it); the draft is float32",
    )
    args = expand_all(parser.parse_args())

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = load(args.data, args.target, args.max_length)
    if len(rows) < args.batch_size:
        raise SystemExit(f"error: {args.data} holds {len(rows)} usable conversations, fewer than --batch_size {args.batch_size}")
    dtype = working_dtype(torch.bfloat16, device) if args.target_dtype == "auto" else getattr(torch, args.target_dtype)
    facts = Target(TargetConfig(args.target))
    target = facts.auto_class().from_pretrained(args.target, dtype=dtype, **facts.model_files)
    target = target.eval().requires_grad_(False).to(device)
    layers = target.config.num_hidden_layers
    aux = [2, layers // 2, layers - 3]

    said = torch.cat([ids[mask.bool()] for ids, mask in rows])
    counts = torch.bincount(said, minlength=target.config.vocab_size)
    draft_ids = counts.topk(min(args.draft_vocab_size, len(counts))).indices.sort().values.to(device)
    in_draft = torch.zeros(len(counts), dtype=torch.bool, device=device)
    in_draft[draft_ids] = True

    draft = PlainDraft(target.config, len(aux), len(draft_ids)).to(device)
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.get_output_embeddings().weight[draft_ids].float())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    losses: list[float] = []
    tokens = 0
    started = 0.0
    bar = tqdm(total=round(args.seconds), desc="plain loop", unit="s", bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} s")
    for step, (ids, mask, valid) in enumerate(batches(rows, args.batch_size)):
        loss = batch_loss(draft, target, ids.to(device), mask.to(device), valid.to(device), draft_ids, in_draft, args.unroll_steps, aux)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step == 0:  # first step: allocator and kernels warm up
            started = time.perf_counter()
            continue
        tokens += int(valid.sum())
        seconds = time.perf_counter() - started
        bar.update(min(seconds, args.seconds) - bar.n)
        if seconds >= args.seconds:
            break
    bar.close()
    tenth = max(1, len(losses) // 10)
    report = {
        "tokens_per_s": round(tokens / seconds, 1),
        "steps": len(losses),
        "seconds": round(seconds, 1),
        "loss_start": round(sum(losses[:tenth]) / tenth, 4),  # means of the first and the last tenth of the steps
        "loss_end": round(sum(losses[-tenth:]) / tenth, 4),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    print(dumps(report), flush=True)


if __name__ == "__main__":
    main()
