"""Block drafts and their losses, slow and obvious: one conversation, one block, one query, one key at a time, in fp64. No code of the package's.

DFlash: arXiv 2602.06036. DSpark: 2607.05147. D-PACE: 2605.18810. Tensors go by their names in a served draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What a draft is beside its tensors."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    mask_token: int
    theta: float = 10000.0
    eps: float = 1e-6
    causal: bool = False
    window: int | None = None
    predicts_at_anchor: bool = False
    """DSpark."""
    taps: int = 0
    """DFlash 2: of its convolutions."""
    group: int = 0
    candidates: int = 0
    """DFlash 2: of the selector."""
    logit_scale: float = 1.0

    @property
    def drafted(self) -> int:
        return self.slots if self.predicts_at_anchor else self.slots - 1


def depths(mask: Sequence[int], shape: Shape) -> dict[int, int]:
    """Supervised draft tokens of every anchor that has any: x_a .. x_{a+depth} are generated tokens without a gap."""
    found = {}
    for a in range(1, len(mask)):
        depth = 0
        while mask[a] == 1 and depth < shape.drafted and a + depth + 1 < len(mask) and mask[a + depth + 1] == 1:
            depth += 1
        if depth:
            found[a] = depth
    return found


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """A head's dimension i with i + d/2."""
    d = x.shape[0]
    out = []
    for i in range(d):
        angle = position * theta ** (-2 * (i % (d // 2)) / d)
        other = -x[i + d // 2] if i < d // 2 else x[i - d // 2]
        out.append(x[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


def heads_of(w: Weights, layer: str, which: str, x: Tensor, shape: Shape, position: int) -> list[Tensor]:
    """Queries or keys after norm and rotation, or values."""
    heads = list(linear(w, f"{layer}.self_attn.{which}_proj", x).split(shape.head_dim))
    if which == "v":
        return heads
    norm = w[f"{layer}.self_attn.{which}_norm.weight"]
    return [turned(rms(head, norm, shape.eps), position, shape.theta) for head in heads]


def sees(query: int, key: int, *, in_block: bool, shape: Shape) -> bool:
    """Whether the row at one position sees a key at another; a window counts from the query's own position, as servers have it."""
    if in_block and shape.causal and key > query:
        return False
    if shape.window is None:
        return True
    behind = query - key <= shape.window - 1
    ahead = shape.causal or key - query <= shape.window - 1
    return behind and ahead


def attention(w: Weights, layer: str, context: list[Tensor], rows: list[Tensor], anchor: int, shape: Shape) -> list[Tensor]:
    """Each row over the context before the anchor and the rows of its own block, in one softmax."""
    keys = [(s, False, heads_of(w, layer, "k", c, shape, s), heads_of(w, layer, "v", c, shape, s)) for s, c in enumerate(context)]
    for j, x in enumerate(rows):
        keys.append((anchor + j, True, heads_of(w, layer, "k", x, shape, anchor + j), heads_of(w, layer, "v", x, shape, anchor + j)))
    out = []
    for j, x in enumerate(rows):
        queries, parts = heads_of(w, layer, "q", x, shape, anchor + j), []
        seen = [key for key in keys if sees(anchor + j, key[0], in_block=key[1], shape=shape)]
        for h, q in enumerate(queries):
            g = h // (shape.heads // shape.kv_heads)
            share = torch.softmax(torch.stack([q @ k[g] / math.sqrt(shape.head_dim) for _, _, k, _ in seen]), 0)
            parts.append(sum(share[i] * v[g] for i, (_, _, _, v) in enumerate(seen)))
        out.append(linear(w, f"{layer}.self_attn.o_proj", torch.cat(parts)))  # type: ignore[arg-type]
    return out


def convolved(w: Weights, name: str, side: int, sources: list[Tensor], x: list[Tensor], shape: Shape) -> list[Tensor]:
    """DFlash 2's grouped convolution over a block: tap t of channel c in row j is base + what row j's own source says for the channel's group."""
    size = x[0].shape[0]
    base, projection = w[f"{name}.base_kernel"], w[f"{name}.kernel_projection.weight"]
    out = []
    for j, source in enumerate(sources):
        said = (projection @ source).view(2, shape.taps, size // shape.group)
        total = torch.zeros_like(x[0])
        for tap in range(min(shape.taps, j + 1)):
            own = said[side, tap].repeat_interleave(shape.group)
            total = total + (base[side, tap] + own) * x[j - tap]
        out.append(total)
    return out


def mlp(w: Weights, layer: str, x: Tensor) -> Tensor:
    gate = linear(w, f"{layer}.mlp.gate_proj", x)
    return linear(w, f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * linear(w, f"{layer}.mlp.up_proj", x))


def block_states(w: Weights, shape: Shape, table: Tensor, ids: Sequence[int], aux: Tensor, anchor: int) -> list[Tensor]:
    """The S rows of one block after the final norm.

    Args:
        w: tensors of the draft.
        shape: of the draft.
        table: [V, H] the target's embedding.
        ids: of the conversation, up to the anchor at least.
        aux: [T, n*D] target states, of which those before the anchor are read.
        anchor: a.
    """
    context = [rms(linear(w, "fc", aux[s]), w["hidden_norm.weight"], shape.eps) for s in range(anchor)]
    mask = w.get("mask_embedding", table[shape.mask_token])
    h = [mask if token == shape.mask_token else table[token] for token in [ids[anchor]] + [shape.mask_token] * (shape.slots - 1)]
    for i in range(shape.layers):
        layer = f"layers.{i}"
        x = [rms(row, w[f"{layer}.input_layernorm.weight"], shape.eps) for row in h]
        before = convolved(w, f"{layer}.attention_conv", 0, x, x, shape) if shape.taps else x
        out = attention(w, layer, context, before, anchor, shape)
        out = convolved(w, f"{layer}.attention_conv", 1, x, out, shape) if shape.taps else out
        h = [row + more for row, more in zip(h, out, strict=True)]
        x = [rms(row, w[f"{layer}.post_attention_layernorm.weight"], shape.eps) for row in h]
        before = convolved(w, f"{layer}.mlp_conv", 0, x, x, shape) if shape.taps else x
        out = [mlp(w, layer, row) for row in before]
        out = convolved(w, f"{layer}.mlp_conv", 1, x, out, shape) if shape.taps else out
        h = [row + more for row, more in zip(h, out, strict=True)]
    return [rms(row, w["norm.weight"], shape.eps) for row in h]


def logits_at(w: Weights, shape: Shape, head: Tensor, state: Tensor, previous: int) -> Tensor:
    """[W] of one slot, the Markov bias among them where there is one; ``previous`` is the token before the predicted one."""
    z = head @ state
    if "markov_head.markov_w1.weight" in w:
        z = z + w["markov_head.markov_w2.weight"] @ w["markov_head.markov_w1.weight"][previous]
    return z * shape.logit_scale


def edge_score(w: Weights, z: Tensor, state: Tensor, previous: int, candidate: int) -> Tensor:
    """DFlash 2: what the selector thinks of a candidate after a token."""
    asked = w["candidate_selector.predecessor_codebook"][previous] * (w["candidate_selector.hidden_projection.weight"] @ state)
    return z[candidate] + asked @ w["candidate_selector.successor_codebook"][candidate]


def proposal(
    w: Weights, shape: Shape, table: Tensor, head: Tensor, ids: Sequence[int], aux: Tensor, anchor: int, kept: Sequence[int]
) -> tuple[list[int], list[Tensor]]:
    """What a server drafts after x_a, greedily, and the logits that it chose by; ``kept`` are the target ids of the head's rows."""
    states = block_states(w, shape, table, ids, aux, anchor)
    tokens, chosen_by, previous = [], [], ids[anchor]
    for state in states[0 if shape.predicts_at_anchor else 1 :]:
        z = logits_at(w, shape, head, state, previous)
        if shape.candidates:
            best = z.topk(shape.candidates).indices.tolist()
            scores = [float(edge_score(w, z, state, previous, c)) for c in best]
            previous = best[scores.index(max(scores))]
        else:
            previous = kept[int(z.argmax())]
        tokens.append(previous)
        chosen_by.append(z)
    return tokens, chosen_by


# -- losses


def loss_of(name: str, z: Tensor, full: Tensor, kept: Sequence[int], label: int, mean_alpha: float) -> Tensor:
    """One slot by one loss: draft logits z over ``kept``, the target's probabilities ``full`` over the vocabulary, ``label`` a token.

    Nothing where the target's most likely token (for cross-entropy: the label) is not among the kept.
    """
    if (label if name == "cross_entropy" else int(full.argmax())) not in kept:
        return z.sum() * 0.0
    q = torch.softmax(z, 0)
    true = full[list(kept)]
    p = true / true.sum()
    alpha = torch.minimum(true, q).sum()
    if name == "cross_entropy":
        return -q[list(kept).index(label)].log()
    if name == "forward_kl":
        return -(p * q.log()).sum()
    if name == "reverse_kl":
        return (q * (q / p).log()).sum()
    if name == "jsd":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    if name == "tv":
        return 1 - alpha
    if name == "lk_alpha":
        return -alpha.log()
    assert name == "lk_lambda"
    share = math.exp(-3.0 * mean_alpha)
    return share * loss_of("forward_kl", z, full, kept, label, 0.0) + (1 - share) * (1 - alpha)


def decay(slots: int, gamma: float) -> list[float]:
    return [math.exp(-j / gamma) for j in range(slots)]


def dpace(right: Sequence[float], alpha: float) -> list[float]:
    """Weight of each supervised slot from the probability of its label: the sum, over it and what follows, of the product of smoothed probabilities."""
    smooth = [(1 - alpha) * c + alpha for c in right]
    return [sum(math.prod(smooth[: i + 1]) for i in range(j, len(smooth))) for j in range(len(smooth))]


@dataclass(frozen=True)
class Objective:
    """How a block is judged."""

    losses: dict[str, float]
    weights: str = "decay"
    gamma: float = 7.0
    alpha: float = 0.5
    label: str = "data"
    confidence: float = 0.0
    confidence_target: str = "overlap"
    selector: float = 0.0
    mean_alpha: float = 0.0


@dataclass(frozen=True)
class Conversation:
    ids: list[int]
    mask: list[int]
    aux: Tensor
    last: Tensor


@dataclass(frozen=True)
class Target:
    """What of the target a block draft uses."""

    table: Tensor
    head: Tensor
    norm: Tensor
    scale: float = 1.0
    eps: float = 1e-5

    def probabilities(self, last: Tensor) -> Tensor:
        return torch.softmax(self.head @ rms(last, self.norm, self.eps) * self.scale, 0)


def block_loss(w: Weights, shape: Shape, target: Target, kept: Sequence[int], c: Conversation, anchor: int, depth: int, how: Objective) -> Tensor:
    """One block's share, before it is divided by the number of blocks."""
    states = block_states(w, shape, target.table, c.ids, c.aux, anchor)
    states = states if shape.predicts_at_anchor else states[1:]
    head = target.head[list(kept)]
    slots = []
    for i in range(depth):
        previous, token = c.ids[anchor + i], c.ids[anchor + i + 1]
        full = target.probabilities(c.last[anchor + i])
        label = token if how.label == "data" else int(full.argmax())
        slots.append((states[i], logits_at(w, shape, head, states[i], previous), full, label, previous))
    fixed = decay(shape.drafted, how.gamma) if how.weights != "uniform" else [1.0] * shape.drafted
    if how.weights == "dpace":
        right = [float(torch.softmax(z.detach(), 0)[list(kept).index(label)]) if label in kept else 0.0 for _, z, _, label, _ in slots]
        weights, norm = dpace(right, how.alpha), float(shape.drafted)
    else:
        weights, norm = fixed, sum(fixed)
    total = torch.zeros((), dtype=torch.float64)
    for i, (state, z, full, label, previous) in enumerate(slots):
        for name, share in how.losses.items():
            total = total + share * weights[i] / norm * loss_of(name, z, full, kept, label, how.mean_alpha)
        if how.confidence:
            said = torch.cat([state, w["markov_head.markov_w1.weight"][previous]])
            u = (w["confidence_head.proj.weight"] @ said + w["confidence_head.proj.bias"])[0]
            overlap = float(torch.minimum(full[list(kept)], torch.softmax(z.detach(), 0)).sum())
            wanted = overlap if how.confidence_target == "overlap" else float(kept[int(z.argmax())] == int(full.argmax()))
            yes, no = -torch.log(torch.sigmoid(u)), -torch.log(torch.sigmoid(-u))
            total = total + how.confidence * fixed[i] / sum(fixed) * (wanted * yes + (1 - wanted) * no)
        if how.selector:
            best = z.topk(shape.candidates).indices.tolist()
            if label not in best:
                best[-1] = label
            scores = torch.stack([edge_score(w, z, state, previous, candidate) for candidate in best])
            total = total - how.selector * fixed[i] / sum(fixed) * torch.log_softmax(scores, 0)[best.index(label)]
    return total


def objective(
    w: Weights,
    shape: Shape,
    target: Target,
    kept: Sequence[int],
    conversations: Sequence[Conversation],
    how: Objective,
    anchors: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Mean over the blocks of all conversations; ``anchors`` of each, or every candidate."""
    total, blocks = torch.zeros((), dtype=torch.float64), 0
    for number, c in enumerate(conversations):
        found = depths(c.mask, shape)
        for anchor in found if anchors is None else anchors[number]:
            total = total + block_loss(w, shape, target, kept, c, anchor, found[anchor], how)
            blocks += 1
    return total / max(blocks, 1)
