"""The EAGLE-3 draft (arXiv 2503.01840) and its unroll over a pack.

Parameter names are those of vLLM's plain export. One decoder layer takes [embedding; hidden] (2H wide); further layers, if any, take H. At unroll step k,
position t embeds
x_{t+1+k} at RoPE position t+k and attends to step-0 keys s <= t and its own later keys:

    position          0    1    2    3    4
    token embedded    x1   x2   x3   x4   -      step 0
    aux state         a0   a1   a2   a3   a4     h_0 = fc(aux)
    token embedded    x2   x3   x4   -    -      step 1, hidden = own output of step 0
    target (step 0)   x2   x3   x4   -    -      distribution of x_{t+2+k} = head(norm(last_{t+1+k}))

Only rows that some step supervises are computed beyond their step-0 key and value (``UnrollRows``). Masters are fp32; each weight is cast once a forward
and reused over the steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.attention import unroll_attention
from torchspec.models.dense_attention import DenseAttention, Projections, Turn, cast_linears
from torchspec.models.draft_config import DraftConfig
from torchspec.models.mla import LatentAttention
from torchspec.models.norm import RMSNorm
from torchspec.models.rope import check_reach, frequencies, tables


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(z)) * up(z)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class DraftLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DraftConfig, *, first: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if first:
            self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = DenseAttention if config.mla is None else LatentAttention
        self.self_attn = kind(config, 2 * config.hidden_size if first else config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class _CastLayer:
    """A layer's weights in the compute type, fused where one product serves."""

    def __init__(self, layer: DraftLayer, dtype: torch.dtype) -> None:
        self.attention: Projections = layer.self_attn.cast(dtype)
        self.gate_up, _ = cast_linears([layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
        self.down, _ = cast_linears([layer.mlp.down_proj], dtype)


class _Memory:
    """Keys and values of one layer over the unroll: step 0 for all rows, later steps for the rows that are still there."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self.extra_key: Tensor | None = None
        self.extra_value: Tensor | None = None

    def narrow(self, keep: Tensor) -> None:
        """Keep the later keys of these rows only."""
        if self.extra_key is not None and self.extra_value is not None:
            self.extra_key, self.extra_value = self.extra_key[keep], self.extra_value[keep]

    def append(self, key: Tensor, value: Tensor) -> None:
        """A later step's key and value, [R, g, d]."""
        key, value = key[:, None], value[:, None]
        self.extra_key = key if self.extra_key is None else torch.cat([self.extra_key, key], dim=1)
        self.extra_value = value if self.extra_value is None else torch.cat([self.extra_value, value], dim=1)


class Eagle3Draft(nn.Module):
    """The draft network.

    Args:
        config: its architecture.
        compute_dtype: type of activations and of the cast weights.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: DraftConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        hidden, width, n = config.hidden_size, config.target_hidden_size, len(config.aux_layers)
        if config.owns_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        else:
            self.register_buffer("embedding_table", None, persistent=False)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(n * width, config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(width, config.rms_norm_eps) for _ in range(n))
        self.fc = nn.Linear(n * width, hidden, bias=False)
        self.layers = nn.ModuleList(DraftLayer(config, first=i == 0) for i in range(config.num_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        inverse, self.rope_factor = frequencies(config)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    def set_embedding(self, table: Tensor) -> None:
        """Use the target's frozen embedding table [V, H] (only where H equals D)."""
        assert not self.config.owns_embedding and table.shape == (self.config.vocab_size, self.config.hidden_size)
        self.embedding_table = table

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Normal weights with the configuration's standard deviation, norms at one, biases at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, batch: PackedBatch) -> list[Tensor]:
        """Unroll over the supervised rows of a pack.

        Returns:
            K tensors: the layer stack's output h'' of step k at rows ``base[index[k]]``, [R_k, H] in the compute type, before the final norm.
        """
        rows = batch.rows
        check_reach(self.config, int(batch.cu_seqlens.diff().max()) + rows.steps - 1 if batch.num_tokens else 0)
        layers = [_CastLayer(layer, self.compute_dtype) for layer in self.layers]  # type: ignore[arg-type]
        hidden = self._project_aux(batch.aux)
        outputs: list[Tensor] = []
        memories: list[_Memory] = []
        for step in range(rows.steps):
            if step == 0:
                at = rows.base
                hidden, memories = self._first_step(hidden, batch, layers)
            else:
                keep = rows.keep[step]
                at = rows.base[rows.index[step]]
                hidden = self._later_step(hidden[keep], batch, layers, memories, at=at, keep=keep, step=step)
            outputs.append(hidden)
            if self.config.norm_output:
                hidden = self.norm(hidden)
        return outputs

    # -- pieces

    def _project_aux(self, aux: Tensor) -> Tensor:
        """h_0 = fc(aux), [N, H]."""
        aux = aux.to(self.compute_dtype)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            chunks = aux.split(self.config.target_hidden_size, dim=-1)
            aux = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return F.linear(aux, self.fc.weight.to(self.compute_dtype))

    def _embed(self, batch: PackedBatch, at: Tensor, step: int) -> Tensor:
        """Embeddings of x_{t+1+step}; past the pack's end any token serves, no supervised row reads it."""
        ids = batch.input_ids[(at + (1 + step)).clamp_(max=batch.num_tokens - 1)]
        table = self.embed_tokens.weight if self.config.owns_embedding else self.embedding_table
        return F.embedding(ids, table).to(self.compute_dtype)

    def _inputs(self, index: int, hidden: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Input of a layer's attention and its residual."""
        layer: DraftLayer = self.layers[index]  # type: ignore[assignment]
        if index:
            return layer.input_layernorm(hidden), hidden
        normed = layer.hidden_norm(hidden)
        return torch.cat([layer.input_layernorm(embedded), normed], dim=-1), normed if self.config.norm_before_residual else hidden

    def _turn(self, position: Tensor) -> Turn:
        """cos and sin of RoPE positions [R]."""
        inverse = self.inverse_frequencies
        wide = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        return tables(inverse.to(wide), self.rope_factor, position, wide)

    def _finish(self, index: int, attended: Tensor, residual: Tensor, weights: _CastLayer) -> Tensor:
        """Output projection, residual, MLP."""
        hidden = residual + weights.attention.output(attended)
        gate, up = F.linear(self.layers[index].post_attention_layernorm(hidden), weights.gate_up).chunk(2, dim=-1)  # type: ignore[operator, union-attr]
        return hidden + F.linear(F.silu(gate) * up, weights.down)

    def _first_step(self, hidden: Tensor, batch: PackedBatch, layers: list[_CastLayer]) -> tuple[Tensor, list[_Memory]]:
        """Step 0: keys and values of all rows in every layer; the last layer's queries and MLP for supervised rows alone."""
        every = torch.arange(batch.num_tokens, device=hidden.device)
        embedded = self._embed(batch, every, 0)
        turn = self._turn(batch.position)
        memories = []
        for index, weights in enumerate(layers):
            at = batch.rows.base if index == len(layers) - 1 else every
            x, residual = self._inputs(index, hidden, embedded)
            memory = _Memory(*weights.attention.keys_values(x, turn))
            memories.append(memory)
            if at is not every:
                x, residual, turn = x[at], residual[at], (turn[0][at], turn[1][at])
            query = weights.attention.queries(x, turn)
            attended = unroll_attention(query, memory.key, memory.value, None, None, rows=at, cu_seqlens=batch.cu_seqlens)
            hidden = self._finish(index, attended, residual, weights)
        return hidden, memories

    def _later_step(
        self, hidden: Tensor, batch: PackedBatch, layers: list[_CastLayer], memories: list[_Memory], *, at: Tensor, keep: Tensor, step: int
    ) -> Tensor:
        """Step k >= 1 on the rows that it supervises; hidden [R_k, H] is their output of the step before."""
        embedded = self._embed(batch, at, step)
        turn = self._turn(batch.position[at] + step)
        for index, (weights, memory) in enumerate(zip(layers, memories, strict=True)):
            x, residual = self._inputs(index, hidden, embedded)
            query, key, value = weights.attention.all(x, turn)
            memory.narrow(keep)
            memory.append(key, value)
            attended = unroll_attention(query, memory.key, memory.value, memory.extra_key, memory.extra_value, rows=at, cu_seqlens=batch.cu_seqlens)
            hidden = self._finish(index, attended, residual, weights)
        return hidden
