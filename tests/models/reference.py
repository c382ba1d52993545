"""RoPE of every kind and the two kinds of attention, one position at a time, from their papers, fp64: what the reference of the unroll is given here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec.models.eagle3 import reference
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


# -- the unroll: torchspec/models/eagle3/reference.py, with these projections


def unroll(c: DraftConfig, w: Weights, table: Tensor, ids: list[int], aux: Tensor, steps: int) -> list[Tensor]:
    """h''_k [T, H] before the final norm; row t counts where x_{t+1+k} exists."""

    def of(layer: int) -> Dense | Latent:
        return (Dense if c.mla is None else Latent)(c, w, f"layers.{layer}.self_attn.")

    def heads(layer: int, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = [(of(layer).query(row, p), *of(layer).key_value(row, p)) for row, p in zip(x, position.tolist(), strict=True)]
        query, key, value = (torch.stack([torch.stack(row[part]) for row in rows]) for part in range(3))
        return query, key, value

    return reference.unroll(c, w, table, torch.tensor(ids), aux, steps, heads=heads, scale=of(0).scale)


def loss(
    c: DraftConfig, w: Weights, table: Tensor, *, ids: list[int], mask: list[int], aux: Tensor, last: Tensor, head: Tensor, head_norm: Tensor, head_eps: float,
    draft_ids: list[int], step_weights: list[float], counts: list[float],
) -> tuple[Tensor, dict[str, list[float]]]:  # fmt: skip
    """One conversation's share of the loss, and its metric sums by step."""
    states = unroll(c, w, table, ids, aux, len(step_weights))
    logits = torch.stack([head @ rms(row, head_norm, head_eps) for row in last])
    kept = torch.tensor(draft_ids)
    return reference.loss(c, w, states, mask=torch.tensor(mask), logits=logits, draft_ids=kept, step_weights=step_weights, counts=counts)
