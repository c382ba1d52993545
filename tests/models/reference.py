"""The unroll and its loss, slow and obvious: one conversation, one position, one key at a time, fp64. What the fast path is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.models.eagle3.config import DraftConfig

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


# -- RoPE, each kind from its paper


def angles_per_position(rope: dict[str, object], d: int) -> tuple[list[float], float]:
    """By how much dimension pair i turns a position, and the factor on cosine and sine."""
    get = lambda name, default=None: float(rope.get(name, default))  # type: ignore[arg-type]  # noqa: E731
    base, kind = get("rope_theta"), rope["rope_type"]
    plain = [base ** (-2 * i / d) for i in range(d // 2)]
    if kind in ("default", "dynamic"):  # dynamic: the same up to the trained length
        return plain, 1.0
    factor = get("factor")
    if kind == "linear":  # positions divided by the factor
        return [a / factor for a in plain], 1.0
    original = get("original_max_position_embeddings")
    if kind == "llama3":  # long waves slowed down, short ones kept, the ones between in between
        low, high = get("low_freq_factor"), get("high_freq_factor")
        slowed = []
        for a in plain:
            turns = original * a / (2 * math.pi)
            keep = min(max((turns - low) / (high - low), 0.0), 1.0)
            slowed.append(keep * a + (1 - keep) * a / factor)
        return slowed, 1.0
    assert kind == "yarn"  # arXiv 2309.00071, section 3.2: a ramp over the dimension index between beta_fast and beta_slow turns

    def dimension(turns: float) -> float:
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(dimension(get("beta_fast", 32))), 0)
    last = min(math.ceil(dimension(get("beta_slow", 1))), d - 1)
    ramp = [min(max((i - first) / (last - first if last > first else 0.001), 0.0), 1.0) for i in range(d // 2)]
    size = lambda m: 0.1 * m * math.log(factor) + 1.0  # noqa: E731
    scale = size(get("mscale")) / size(get("mscale_all_dim")) if rope.get("mscale") and rope.get("mscale_all_dim") else size(1.0)
    return [(1 - r) * a + r * a / factor for a, r in zip(plain, ramp, strict=True)], get("attention_factor", scale)


def turned(x: Tensor, position: int, rope: dict[str, object], *, neighbours: bool = False) -> Tensor:
    """x [d] turned to its position; dimension i with i + d/2, or 2i with 2i + 1."""
    d = x.shape[0]
    per_position, factor = angles_per_position(rope, d)
    out = x.clone()
    for i, a in enumerate(per_position):
        one, two = (2 * i, 2 * i + 1) if neighbours else (i, i + d // 2)
        cos, sin = math.cos(position * a) * factor, math.sin(position * a) * factor
        out[one] = x[one] * cos - x[two] * sin
        out[two] = x[two] * cos + x[one] * sin
    return out


# -- attention: what a position asks with, and what it answers with


@dataclass(frozen=True)
class Dense:
    """Llama's, and Qwen3's with norms on the heads of queries and keys."""

    c: DraftConfig
    w: Weights
    at: str

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.c.head_dim)

    def _heads(self, which: str, x: Tensor, position: int, norm: bool) -> list[Tensor]:
        heads = list(linear(self.w, f"{self.at}{which}_proj", x).split(self.c.head_dim))
        if norm and self.c.qk_norm:
            heads = [rms(head, self.w[f"{self.at}{which}_norm.weight"], self.c.rms_norm_eps) for head in heads]
        return heads if which == "v" else [turned(head, position, self.c.rope_parameters) for head in heads]

    def query(self, x: Tensor, position: int) -> list[Tensor]:
        return self._heads("q", x, position, True)

    def key_value(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """For each query head: the key and value heads are repeated over their group."""
        group = self.c.num_heads // self.c.num_kv_heads
        key, value = self._heads("k", x, position, True), self._heads("v", x, position, False)
        return [key[i // group] for i in range(self.c.num_heads)], [value[i // group] for i in range(self.c.num_heads)]


@dataclass(frozen=True)
class Latent:
    """DeepSeek's, arXiv 2405.04434, equations 9 to 19."""

    c: DraftConfig
    w: Weights
    at: str

    @property
    def scale(self) -> float:
        rope = self.c.rope_parameters
        m = 0.1 * rope.get("mscale_all_dim", 0.0) * math.log(rope["factor"]) + 1.0 if rope["rope_type"] == "yarn" else 1.0
        return m * m / math.sqrt(self.c.mla.qk_nope_head_dim + self.c.mla.qk_rope_head_dim)

    def query(self, x: Tensor, position: int) -> list[Tensor]:
        nope = self.c.mla.qk_nope_head_dim
        low = rms(linear(self.w, self.at + "q_a_proj", x), self.w[self.at + "q_a_layernorm.weight"], self.c.rms_norm_eps)
        heads = linear(self.w, self.at + "q_b_proj", low).split(nope + self.c.mla.qk_rope_head_dim)
        return [torch.cat([head[:nope], turned(head[nope:], position, self.c.rope_parameters, neighbours=True)]) for head in heads]

    def key_value(self, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor]]:
        rank, nope = self.c.mla.kv_lora_rank, self.c.mla.qk_nope_head_dim
        low = linear(self.w, self.at + "kv_a_proj_with_mqa", x)
        shared = turned(low[rank:], position, self.c.rope_parameters, neighbours=True)
        latent = rms(low[:rank], self.w[self.at + "kv_a_layernorm.weight"], self.c.rms_norm_eps)
        heads = linear(self.w, self.at + "kv_b_proj", latent).split(nope + self.c.mla.v_head_dim)
        return [torch.cat([head[:nope], shared]) for head in heads], [head[nope:] for head in heads]


# -- the unroll


def unroll(c: DraftConfig, w: Weights, table: Tensor, ids: list[int], aux: Tensor, steps: int) -> list[list[Tensor | None]]:
    """h''_k[t] before the final norm for every t where x_{t+1+k} exists, else None."""
    T, eps, D = len(ids), c.rms_norm_eps, c.target_hidden_size

    def project(t: int) -> Tensor:
        a = aux[t]
        if c.norm_before_fc:
            a = rms(a, w["input_norm.weight"], eps)
        if c.fc_norm:
            a = torch.cat([rms(a[i * D : (i + 1) * D], w[f"fc_norm.{i}.weight"], eps) for i in range(len(c.aux_layers))])
        return w["fc.weight"] @ a

    hidden: list[Tensor | None] = [project(t) for t in range(T)]
    memory: list[list[list[tuple[list[Tensor], list[Tensor]] | None]]] = [[] for _ in range(c.num_layers)]  # layer, step, position
    outputs = []
    for k in range(steps):
        new: list[Tensor | None] = list(hidden)
        for layer in range(c.num_layers):
            p = f"layers.{layer}."
            attention = (Dense if c.mla is None else Latent)(c, w, p + "self_attn.")
            memory[layer].append([None] * T)
            inputs: list[tuple[Tensor, Tensor] | None] = []
            for t in range(T):
                h = new[t]
                if h is None or (t + 1 + k >= T and k > 0):
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
                memory[layer][k][t] = attention.key_value(x, t + k)
                inputs.append((x, residual))
            for t in range(T):
                given = inputs[t]
                if given is None:
                    new[t] = None
                    continue
                x, residual = given
                seen = [memory[layer][0][s] for s in range(t + 1)] + [memory[layer][i][t] for i in range(1, k + 1)]
                heads = []
                for i, query in enumerate(attention.query(x, t + k)):
                    share = torch.softmax(torch.stack([query @ key[i] * attention.scale for key, _ in seen]), dim=0)  # type: ignore[misc]
                    heads.append(sum(share[j] * value[i] for j, (_, value) in enumerate(seen)))  # type: ignore[misc]
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
