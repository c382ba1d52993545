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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.ops.attention.dispatch import PackBounds, Queries, UnrollCache
from torchspec.models.ops.attention.fused import FusedCache, remember
from torchspec.models.ops.dense_projections import DenseAttention, Projections, Rotation
from torchspec.models.ops.embedding import lookup
from torchspec.models.ops.fp8 import Fp8
from torchspec.models.ops.latent_projections import LatentAttention, softmax_scale
from torchspec.models.ops.layer_input import LayerInput, LayerInputs
from torchspec.models.ops.mlp import MLP, mlp_block
from torchspec.models.ops.norm import Norm, RMSNorm
from torchspec.models.ops.rope import check_reach, frequencies, tables
from torchspec.models.ops.shared_rows import Addend, Residual, SharedRows, linear, take
from torchspec.models.ops.shared_weight import Weight
from torchspec.supervision import as_unroll


class DraftLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DraftConfig, *, first: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if first:
            self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention(config, 2 * config.hidden_size if first else config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)


def _attention(config: DraftConfig, width: int) -> DenseAttention | LatentAttention:
    """Of a layer whose input is ``width`` wide."""
    hidden, heads, eps = config.hidden_size, config.num_heads, config.rms_norm_eps
    if config.mla is not None:
        scale = softmax_scale(config.mla, config.rope_parameters)
        return LatentAttention(width, hidden_size=hidden, heads=heads, sizes=config.mla, norm_eps=eps, scale=scale)
    norm_eps = eps if config.qk_norm else None
    return DenseAttention(
        width, hidden_size=hidden, heads=heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim, bias=config.attention_bias, norm_eps=norm_eps
    )  # fmt: skip


class _Layer:
    """A layer during one forward pass: weights in the compute type, fused where one product serves, and what its attention has seen."""

    def __init__(self, layer: DraftLayer, dtype: torch.dtype, *, normed_residual: bool, fp8: Fp8) -> None:
        first = hasattr(layer, "hidden_norm")
        self.norm, self.mlp_norm = layer.input_layernorm.cast(), layer.post_attention_layernorm.cast()
        self.entrance = LayerInput(layer.hidden_norm.cast() if first else self.norm, normed_residual=first and normed_residual)
        self.attention: Projections = layer.self_attn.cast(dtype)
        self.gate_up = Weight.of([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight], dtype, fp8=fp8)
        self.down = Weight.of([layer.mlp.down_proj.weight], dtype, fp8=fp8, slim_out=True)
        if fp8:  # the embedding's half serves every step with one product, which stays as it is
            width = self.gate_up.store.shape[1]
            self.attention.round(slice(width, None) if first else slice(None), gradient=fp8 == Fp8.ALL)
        self.memory: UnrollCache | FusedCache | None = None


_NEARLY_ALL = 7 / 8
"""Share of a pack's rows from which on a step-0 entry's query gets its embedding from a product over all rows."""


@dataclass(frozen=True)
class _Embedded:
    """The first layer's input projection of normed embeddings. Row j of step k embeds the token that row j+k of step 0 does, so one product serves every
    step."""

    rows: SharedRows
    """[N, query and key-value part] at all rows, or the key-value part alone."""
    query: SharedRows | None
    """[M, query part] at the step-0 entries, where they are few."""
    query_size: int

    def first_query(self, base: Tensor | None) -> Addend:
        """Of step 0: at its entries, or at all rows where ``base`` is None."""
        return Addend(self.rows, base, columns=slice(0, self.query_size)) if self.query is None else Addend(self.query, None)

    def first_key_value(self) -> Addend:
        """Of step 0, at all rows."""
        return Addend(self.rows, None, columns=slice(self.query_size if self.query is None else 0, None))

    def later(self, queries: Queries, step: int) -> list[Addend]:
        """Of a later step, the whole projection."""
        whole = Addend(self.rows, queries.at, step)
        return [whole] if self.query is None else [Addend(self.query, queries.entries, step), whole]


@dataclass(frozen=True)
class StepQueries:
    """The rows that a step computes."""

    queries: Queries
    rotation: Rotation


class Eagle3Draft(nn.Module):
    """The draft network.

    Args:
        config: its architecture.
        compute_dtype: type of activations and of the cast weights.
        recompute: make the MLP's inner activations again in the backward instead of keeping them.
        fp8: 8-bit products in the MLP, the head and ordinary attention's projections (:mod:`torchspec.models.ops.fp8`).
    """

    inverse_frequencies: Tensor

    def __init__(self, config: DraftConfig, *, compute_dtype: torch.dtype = torch.float32, recompute: bool = False, fp8: Fp8 = Fp8.NONE) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.fp8 = fp8
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
        inverse, self.rope_factor = frequencies(config.rope_parameters, size=config.rotary_dim, max_positions=config.max_position_embeddings)
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

    def forward(self, batch: PackedBatch, final: Norm | None = None) -> list[Tensor]:
        """Unroll over the supervised rows of a pack.

        Args:
            batch: its ``rows`` are consecutive inside a turn: ``base[j] + k == base[j + k]`` for every entry j of step k (asserted on a CPU). Embeddings
                and targets of step k are those of entry j + k.
            final: the final norm of this forward pass, where the caller applies it to the result, so that its gradients are one sum; None makes it here.

        Returns:
            K tensors: the layer stack's output h'' of step k at rows ``base[index[k]]``, [R_k, H] in the compute type, before the final norm.
        """
        rows = as_unroll(batch.rows)
        assert rows.base.is_cuda or rows.consecutive(), "rows that some step supervises are not consecutive: make them with Unroll"
        longest = int(batch.cu_seqlens.diff().max()) + rows.steps - 1 if batch.num_tokens else 0
        check_reach(self.config.rope_parameters, max_positions=self.config.max_position_embeddings, longest=longest)
        layers = [_Layer(layer, self.compute_dtype, normed_residual=self.config.norm_before_residual, fp8=self.fp8) for layer in self.layers]  # type: ignore[arg-type]
        hidden = self._project_aux(batch.aux)
        embedded = self._embed(batch, layers[0])
        final = self.norm.cast() if final is None else final
        asking = self._step_queries(batch)
        outputs: list[Tensor] = []
        for step in range(rows.steps):
            if step == 0:
                hidden = self._first_step(hidden, embedded, batch, layers, asking[0])
            else:
                entered = layers[0].entrance(hidden, rows.keep[step], rows.onto[step])
                if not self.config.norm_output:
                    outputs[-1] = entered.state
                hidden = self._later_step(entered, embedded, layers, asking[step], step)
            outputs.append(hidden)
            if self.config.norm_output:
                hidden = final(hidden)
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
        return linear(aux, Weight.of([self.fc.weight], self.compute_dtype))

    def _embed(self, batch: PackedBatch, first: _Layer) -> _Embedded:
        """Project the embedding of the token after each row; past the pack's end any token serves, no supervised row reads it."""
        ids = torch.cat([batch.input_ids[1:], batch.input_ids[-1:]])
        table = self.embed_tokens.weight if self.config.owns_embedding else self.embedding_table
        normed, attention = first.norm(lookup(table, ids).to(self.compute_dtype)), first.attention  # type: ignore[arg-type]
        half = attention.inputs.part(columns=slice(0, self.config.hidden_size))
        base, bias = batch.rows.base, attention.bias
        if len(self.layers) > 1 or base.shape[0] >= _NEARLY_ALL * batch.num_tokens:
            return _Embedded(SharedRows.of(linear(normed, half, bias=bias)), None, attention.query_size)
        query, key_value = slice(0, attention.query_size), slice(attention.query_size, None)
        parts = [(key_value, normed), (query, take(normed, base))]
        made = [SharedRows.of(linear(x, half.part(rows=part, columns=half.columns), bias=None if bias is None else bias[part])) for part, x in parts]
        return _Embedded(made[0], made[1], attention.query_size)

    def _project(self, index: int, attention: Projections, x: Tensor, part: slice, addends: list[Addend]) -> Tensor:
        """Rows ``part`` of a layer's input projection, [R, part]; in the first layer x is the hidden half and the addends are the other."""
        if index:
            return linear(x, attention.inputs.part(rows=part), bias=None if attention.bias is None else attention.bias[part])
        return linear(x, attention.inputs.part(rows=part, columns=slice(self.config.hidden_size, None)), addends=addends)

    def _rotation(self, position: Tensor) -> Rotation:
        """cos and sin of RoPE positions [R]."""
        inverse = self.inverse_frequencies
        wide = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        return tables(inverse.to(wide), self.rope_factor, position, wide)

    def _step_queries(self, batch: PackedBatch) -> list[StepQueries]:
        """The rows of each step, their angles in one go."""
        rows = as_unroll(batch.rows)
        sizes = [entries.shape[0] for entries in rows.index]
        cos, sin = (table.split(sizes) for table in self._rotation(batch.position[rows.at] + rows.step))
        steps = zip(rows.at.split(sizes), rows.index, rows.where, [*rows.onto[1:], None], cos, sin, strict=True)
        return [StepQueries(Queries(at, entries, where, onto), (c, s)) for at, entries, where, onto, c, s in steps]

    def _finish(self, layer: _Layer, attended: Tensor, residual: Residual) -> Tensor:
        """Output projection, residual, MLP."""
        hidden = layer.attention.output(attended, residual)
        return mlp_block(hidden, layer.mlp_norm.weight, layer.gate_up, layer.down, eps=layer.mlp_norm.eps, recompute=self.recompute)

    def _first_step(self, hidden: Tensor, embedded: _Embedded, batch: PackedBatch, layers: list[_Layer], asking: StepQueries) -> Tensor:
        """Step 0: keys and values of all rows in every layer; the last layer's queries and MLP for supervised rows alone."""
        rows = as_unroll(batch.rows)
        rotation = self._rotation(batch.position)
        conversations = PackBounds.of(batch.cu_seqlens, batch.sequence)
        for index, layer in enumerate(layers):
            attention = layer.attention
            query, key_value = slice(0, attention.query_size), slice(attention.query_size, None)
            last = index == len(layers) - 1
            if last:
                entered = layer.entrance(hidden, rows.base, rows.onto[0], every=True)
                every_x, x, residual = entered.every, entered.normed, entered.residual
            else:
                every_x = x = layer.entrance.norm(hidden)
                residual = Residual(x if layer.entrance.normed_residual else hidden)
                every = torch.arange(batch.num_tokens, device=hidden.device)
            assert every_x is not None
            flat = self._project(index, attention, every_x, key_value, [embedded.first_key_value()])
            layer.memory = remember(attention, flat, rotation, conversations, entries=rows.base.shape[0], slots=rows.steps - 1)
            asks = asking if last else StepQueries(Queries(every, every, every), rotation)
            flat = self._project(index, attention, x, query, [embedded.first_query(rows.base if last else None)])
            hidden = self._finish(layer, layer.memory.first(attention, flat, asks.rotation, asks.queries), residual)
        return hidden

    def _later_step(self, entered: LayerInputs, embedded: _Embedded, layers: list[_Layer], asking: StepQueries, step: int) -> Tensor:
        """Step k >= 1 on the rows that it supervises, R_k of them, entered into the first layer."""
        addends = embedded.later(asking.queries, step)
        hidden = entered.state
        for index, layer in enumerate(layers):
            x, residual = (layer.entrance.norm(hidden), Residual(hidden)) if index else (entered.normed, entered.residual)
            assert layer.memory is not None
            flat = self._project(index, layer.attention, x, slice(None), addends)
            hidden = self._finish(layer, layer.memory.later(layer.attention, flat, asking.rotation, asking.queries), residual)
        return hidden
