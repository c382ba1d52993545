"""The unroll and its loss, slow and obvious: one conversation, one position, one key at a time, fp64. What the fast path is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchspec.models.draft_config import DraftConfig

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x: Tensor, position: int, base: float) -> Tensor:
    """x [heads, d]; dimension i turns with i + d/2."""
    d = x.shape[-1]
    out = x.clone()
    for i in range(d // 2):
        angle = position * base ** (-2 * i / d)
        out[:, i] = x[:, i] * math.cos(angle) - x[:, i + d // 2] * math.sin(angle)
        out[:, i + d // 2] = x[:, i + d // 2] * math.cos(angle) + x[:, i] * math.sin(angle)
    return out


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def unroll(c: DraftConfig, w: Weights, table: Tensor, ids: list[int], aux: Tensor, steps: int) -> list[list[Tensor | None]]:
    """h''_k[t] before the final norm for every t where x_{t+1+k} exists, else None."""
    T, eps, D = len(ids), c.rms_norm_eps, c.target_hidden_size
    base = float(c.rope_parameters["rope_theta"])

    def project(t: int) -> Tensor:
        a = aux[t]
        if c.norm_before_fc:
            a = rms(a, w["input_norm.weight"], eps)
        if c.fc_norm:
            a = torch.cat([rms(a[i * D : (i + 1) * D], w[f"fc_norm.{i}.weight"], eps) for i in range(len(c.aux_layers))])
        return w["fc.weight"] @ a

    hidden: list[Tensor | None] = [project(t) for t in range(T)]
    keys: list[list[list[tuple[Tensor, Tensor]]]] = [[] for _ in range(c.num_layers)]  # layer, step, position
    outputs = []
    for k in range(steps):
        new: list[Tensor | None] = list(hidden)
        for layer in range(c.num_layers):
            p = f"layers.{layer}."
            keys[layer].append([None] * T)  # type: ignore[list-item]
            inputs: list[tuple[Tensor, Tensor] | None] = []
            for t in range(T):
                if t + 1 + k >= T and not (k == 0):
                    inputs.append(None)
                    continue
                h = new[t]
                if h is None:
                    inputs.append(None)
                    continue
                e = table[ids[min(t + 1 + k, T - 1)]]
                residual = h
                if layer == 0:
                    n = rms(h, w[p + "hidden_norm.weight"], eps)
                    residual = n if c.norm_before_residual else h
                    x = torch.cat([rms(e, w[p + "input_layernorm.weight"], eps), n])
                else:
                    x = rms(h, w[p + "input_layernorm.weight"], eps)
                key = linear(w, p + "self_attn.k_proj", x).view(c.num_kv_heads, c.head_dim)
                if c.qk_norm:
                    key = torch.stack([rms(row, w[p + "self_attn.k_norm.weight"], eps) for row in key])
                keys[layer][k][t] = (rope(key, t + k, base), linear(w, p + "self_attn.v_proj", x).view(c.num_kv_heads, c.head_dim))
                inputs.append((x, residual))
            for t in range(T):
                given = inputs[t]
                if given is None:
                    new[t] = None
                    continue
                x, residual = given
                query = linear(w, p + "self_attn.q_proj", x).view(c.num_heads, c.head_dim)
                if c.qk_norm:
                    query = torch.stack([rms(row, w[p + "self_attn.q_norm.weight"], eps) for row in query])
                query = rope(query, t + k, base)
                seen = [keys[layer][0][s] for s in range(t + 1)] + [keys[layer][i][t] for i in range(1, k + 1)]
                heads = []
                for i in range(c.num_heads):
                    g = i // (c.num_heads // c.num_kv_heads)
                    p_i = torch.softmax(torch.stack([query[i] @ key[g] / math.sqrt(c.head_dim) for key, _ in seen]), dim=0)
                    heads.append(sum(p_i[j] * value[g] for j, (_, value) in enumerate(seen)))
                h = residual + linear(w, p + "self_attn.o_proj", torch.cat(heads))  # type: ignore[arg-type]
                z = rms(h, w[p + "post_attention_layernorm.weight"], eps)
                gate = w[p + "mlp.gate_proj.weight"] @ z
                new[t] = h + w[p + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[p + "mlp.up_proj.weight"] @ z))
        outputs.append(new)
        hidden = [None if h is None else (rms(h, w["norm.weight"], eps) if c.norm_output else h) for h in new]
    return outputs


def loss(
    c: DraftConfig, w: Weights, table: Tensor, *, ids: list[int], mask: list[int], aux: Tensor, last: Tensor, head: Tensor, head_norm: Tensor, head_eps: float,
    draft_ids: list[int], step_weights: list[float], counts: list[float],
) -> tuple[Tensor, dict[str, list[float]]]:  # fmt: skip
    """One conversation's share of the loss, and its metric sums by step."""
    T, K = len(ids), len(step_weights)
    states = unroll(c, w, table, ids, aux, K)
    total = torch.zeros((), dtype=torch.float64)
    sums: dict[str, list[float]] = {name: [0.0] * K for name in ("rows", "loss", "correct", "correct_so_far", "alpha", "alpha_so_far")}
    for t in range(T):
        right, chance = True, 1.0
        for k in range(K):
            if not (t + 2 + k < T and all(mask[t + 1 : t + 3 + k])):
                break
            whole = head @ rms(last[t + 1 + k], head_norm, head_eps)
            full = torch.softmax(whole, 0)
            p = torch.softmax(whole[draft_ids], 0)
            h = states[k][t]
            assert h is not None
            z = w["lm_head.weight"] @ rms(h, w["norm.weight"], c.rms_norm_eps)
            best = int(whole.argmax())
            inside = best in draft_ids
            value = torch.logsumexp(z, 0) - (p * z).sum()
            hit = inside and draft_ids[int(z.argmax())] == best
            alpha = float(torch.minimum(full[draft_ids], torch.softmax(z, 0)).sum().detach())
            right, chance = right and hit, chance * alpha
            if inside:
                total = total + step_weights[k] * value / counts[k]
                sums["loss"][k] += float(value.detach())
            sums["rows"][k] += 1
            sums["correct"][k] += hit
            sums["correct_so_far"][k] += right
            sums["alpha"][k] += alpha
            sums["alpha_so_far"][k] += chance
    return total, sums
