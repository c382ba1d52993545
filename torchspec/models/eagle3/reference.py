"""EAGLE-3's training as the paper has it (arXiv 2503.01840, training-time test), in plain torch: slow, to be read, and what the fast path is tested against.

One conversation x_0 .. x_{T-1}; everything at all positions t at once, whether a step supervises them or not. At step k position t embeds the token
x_{t+1+k} and predicts x_{t+2+k}, as a server does that has just been given x_{t+1} and has drafted k tokens:

    t                        0    1    2    3    4        T = 5
    step 0   embeds          x1   x2   x3   x4   -        hidden: h_0[t] = fc(aux[t])
             target from     l1   l2   l3   l4   -        l = the target's last hidden states: row t + 1 is the distribution of x_{t+2}
    step 1   embeds          x2   x3   x4   -    -        hidden: the draft's own output of step 0 at the same t
             target from     l2   l3   l4   -    -
    keys of t = 2, step 1    K0[0]     K0[1]     K0[2]    and its own k1[2]: what it would have in its cache when served

Letters: T tokens, D target hidden, H draft hidden, h heads of d, V target vocabulary, W draft vocabulary, K steps, n aux layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchspec.models.eagle3.config import DraftConfig

Weights = dict[str, Tensor]
"""The draft's tensors by their name in ``Eagle3Draft``."""
Heads = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, its normed input [T, 2H or H], RoPE positions [T]) -> queries, keys [T, h, d], and values [T, h, d_v], a key and a value for each query head."""


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T, with its bias where there is one."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def unroll(c: DraftConfig, w: Weights, table: Tensor, ids: Tensor, aux: Tensor, steps: int, *, heads: Heads, scale: float) -> list[Tensor]:
    """The draft's output h'' of each step, before the final norm.

    Args:
        c: the draft's architecture.
        w: its weights.
        table: [V, H] embeddings.
        ids: [T] int64.
        aux: [T, n*D] the target's auxiliary hidden states.
        steps: K.
        heads: the attention's projections with RoPE.
        scale: of scores.

    Returns:
        K tensors [T, H]; row t of step k means something where x_{t+1+k} exists.
    """
    T, eps = ids.shape[0], c.rms_norm_eps
    t = torch.arange(T)
    if c.norm_before_fc:
        aux = rms(aux, w["input_norm.weight"], eps)
    if c.fc_norm:
        aux = torch.cat([rms(a, w[f"fc_norm.{i}.weight"], eps) for i, a in enumerate(aux.split(c.target_hidden_size, -1))], -1)
    hidden = aux @ w["fc.weight"].T  # [T, H]
    cache: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(c.num_layers)]  # of each layer: (keys [T, h, d], values [T, h, d_v]) of each step
    outputs = []
    for k in range(steps):
        embedded = table[ids[(t + 1 + k).clamp(max=T - 1)]]  # [T, H]; past the end any token: no row that counts sees it
        for layer in range(c.num_layers):
            p = f"layers.{layer}."
            residual = hidden
            if layer == 0:
                normed = rms(hidden, w[p + "hidden_norm.weight"], eps)  # [T, H]
                residual = normed if c.norm_before_residual else hidden
                x = torch.cat([rms(embedded, w[p + "input_layernorm.weight"], eps), normed], -1)  # [T, 2H]
            else:
                x = rms(hidden, w[p + "input_layernorm.weight"], eps)  # [T, H]
            query, key, value = heads(layer, x, t + k)
            cache[layer].append((key, value))
            hidden = residual + linear(w, p + "self_attn.o_proj", attention(query, cache[layer], scale))  # [T, H]
            z = rms(hidden, w[p + "post_attention_layernorm.weight"], eps)
            gated = torch.nn.functional.silu(z @ w[p + "mlp.gate_proj.weight"].T) * (z @ w[p + "mlp.up_proj.weight"].T)  # [T, I]
            hidden = hidden + gated @ w[p + "mlp.down_proj.weight"].T
        outputs.append(hidden)
        if c.norm_output:
            hidden = rms(hidden, w["norm.weight"], eps)
    return outputs


def attention(query: Tensor, cache: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Step k's rows see the step-0 keys up to their own position, and their own keys of steps 1 to k, in one softmax: [T, h*d_v]."""
    (first_key, first_value), own = cache[0], cache[1:]
    T = query.shape[0]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)  # [t, s]: s > t
    scores = [torch.einsum("thd,shd->hts", query, first_key).masked_fill(later, -torch.inf)]  # [h, T, T]
    scores += [torch.einsum("thd,thd->ht", query, key)[..., None] for key, _ in own]  # k of [h, T, 1]
    share = torch.softmax(torch.cat(scores, -1) * scale, -1)  # [h, T, T + k]
    out = torch.einsum("hts,shd->thd", share[..., :T], first_value)  # [T, h, d_v]
    for i, (_, value) in enumerate(own):
        out = out + share[..., T + i].T[..., None] * value
    return out.flatten(1)


def supervised(mask: Tensor, k: int) -> Tensor:
    """[T] bool: x_{t+1} .. x_{t+2+k} exist and all are the assistant's (1 in the loss mask [T]), so that they are of one turn."""
    T = mask.shape[0]
    return torch.tensor([t + 2 + k < T and bool(mask[t + 1 : t + 3 + k].all()) for t in range(T)])


def loss(
    c: DraftConfig, w: Weights, states: list[Tensor], *, mask: Tensor, logits: Tensor, draft_ids: Tensor, step_weights: list[float], counts: list[float]
) -> tuple[Tensor, dict[str, list[float]]]:
    """One conversation's share of a step's loss, sum_k w_k / count_k * sum_t KL(p || q), and its metric sums.

    Args:
        c, w: as of :func:`unroll`.
        states: its result.
        mask: [T] loss mask.
        logits: [T, V] the target's, of its last hidden states.
        draft_ids: [W] target token of each draft row.
        step_weights: [K] w_k.
        counts: [K] supervised positions of the whole optimizer step.
    """
    total = torch.zeros((), dtype=logits.dtype)
    T, K = mask.shape[0], len(step_weights)
    so_far, chance = torch.ones(T, dtype=torch.bool), torch.ones(T, dtype=logits.dtype)
    sums: dict[str, list[float]] = {name: [] for name in ("rows", "loss", "correct", "correct_so_far", "alpha", "alpha_so_far")}
    for k in range(K):
        at = supervised(mask, k)  # [T]
        target = logits[(torch.arange(T) + 1 + k).clamp(max=T - 1)]  # [T, V]
        p, log_q = torch.softmax(target[:, draft_ids], -1), torch.log_softmax(rms(states[k], w["norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T, -1)
        best = target.argmax(-1)  # [T] over the whole vocabulary: one outside the draft's is a miss, and adds nothing to the loss
        inside = torch.isin(best, draft_ids)
        each = torch.where(at & inside, -(p * log_q).sum(-1), 0.0)  # [T] cross-entropy with p: the forward KL but for a constant
        alpha = torch.minimum(torch.softmax(target, -1)[:, draft_ids], log_q.exp()).sum(-1).detach()  # [T] how likely sampling accepts
        hit = inside & (draft_ids[log_q.argmax(-1)] == best)
        so_far, chance = so_far & hit, chance * alpha
        total = total + step_weights[k] / counts[k] * each.sum()
        found = {"rows": at, "loss": each.detach(), "correct": at & hit, "correct_so_far": at & so_far}
        for name, values in {**found, "alpha": alpha * at, "alpha_so_far": chance * at}.items():
            sums[name].append(float(values.sum()))
    return total, sums
