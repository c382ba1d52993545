"""The backbone of block drafts (DFlash, arXiv 2602.06036) over a pack, with the heads of DSpark (2607.05147) and DFlash 2.

    c_s  = hidden_norm(fc(aux_s))                       context: keys and values of every layer, never changed by them
    e_j  = embedding of slot j                          x_a in slot 0, the mask token in slots 1 .. S-1
    q from the slots; k, v by the same projections of [c_s, s < a ; the slots of the block]; slot j at position a + j
    z_j  = head(norm(h_j))                              the target's own head, frozen

The context goes into the projections as it is, the slots after input_layernorm. Parameter names are those of vLLM's plain export. Masters are fp32; each
weight is cast once a forward.

Letters: A blocks, S slots of each, N tokens of the pack, H hidden size, g key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchspec.batch import PackedBatch
from torchspec.blocks import BlockRows
from torchspec.models.blocks.attention import BlockAttention, BlockMask
from torchspec.models.blocks.confidence import ConfidenceHead
from torchspec.models.blocks.config import BlockConfig
from torchspec.models.blocks.convolution import Convolution, GroupedConvolution
from torchspec.models.blocks.markov import MarkovHead
from torchspec.models.blocks.selector import CandidateSelector
from torchspec.models.ops.dense_projections import DenseAttention, DenseProjections
from torchspec.models.ops.mlp import MLP, mlp_block, swiglu
from torchspec.models.ops.norm import RMSNorm
from torchspec.models.ops.rope import check_reach, frequencies, tables
from torchspec.models.ops.shared_rows import Residual, linear
from torchspec.models.ops.shared_weight import Weight, wide

Rotation = tuple[Tensor, Tensor]


class BlockLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DenseAttention(
            config.hidden_size, hidden_size=config.hidden_size, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            bias=config.attention_bias, norm_eps=config.rms_norm_eps,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        if config.kind == "dflash2":
            self.attention_conv = GroupedConvolution(config.hidden_size, taps=config.conv_taps, group=config.conv_group)
            self.mlp_conv = GroupedConvolution(config.hidden_size, taps=config.conv_taps, group=config.conv_group)


class _Layer:
    """A layer during one forward pass: weights in the compute type, and keys and values of the context."""

    def __init__(self, layer: BlockLayer, dtype: torch.dtype) -> None:
        self.norm, self.mlp_norm = layer.input_layernorm.cast(), layer.post_attention_layernorm.cast()
        self.attention = DenseProjections(layer.self_attn, dtype)
        self.gate_up = Weight.of([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight], dtype)
        self.down = Weight.of([layer.mlp.down_proj.weight], dtype)
        convolved = hasattr(layer, "attention_conv")
        self.convolutions = (layer.attention_conv.cast(dtype), layer.mlp_conv.cast(dtype)) if convolved else None

    def mlp(self, x: Tensor) -> Tensor:
        """Of rows as they are."""
        return linear(swiglu(linear(x, self.gate_up)), self.down)


@dataclass(frozen=True)
class Context:
    """What the blocks of a pack read, made once a forward."""

    layers: list[_Layer]
    keys_values: list[tuple[Tensor, Tensor]]
    """Of each layer: [N, g, d] after norm and rotation, and [N, g, d]."""


class BlockDraft(nn.Module):
    """The draft network.

    Args:
        config: its architecture.
        compute_dtype: type of activations and of the cast weights.
        recompute: make the MLP's inner activations again in the backward instead of keeping them.
    """

    inverse_frequencies: Tensor
    embedding_table: Tensor

    def __init__(self, config: BlockConfig, *, compute_dtype: torch.dtype = torch.float32, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.recompute = config, compute_dtype, recompute
        hidden = config.hidden_size
        self.register_buffer("embedding_table", None, persistent=False)
        if config.learned_mask:
            self.mask_embedding = nn.Parameter(torch.zeros(hidden))
        self.fc = nn.Linear(len(config.aux_layers) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        if config.kind == "dspark":
            self.markov_head = MarkovHead(vocab_size=config.vocab_size, draft_vocab_size=config.draft_vocab_size, rank=config.markov_rank)
            if config.confidence:
                self.confidence_head = ConfidenceHead(hidden_size=hidden, rank=config.markov_rank)
        if config.kind == "dflash2":
            self.candidate_selector = CandidateSelector(
                vocab_size=config.vocab_size, hidden_size=hidden, rank=config.selector_rank, candidates=config.selector_candidates
            )  # fmt: skip
        inverse, self.rope_factor = frequencies(config.rope_parameters, size=config.rotary_dim, max_positions=config.max_position_embeddings)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        self.mask = BlockMask(config.causal, config.sliding_window)

    def set_embedding(self, table: Tensor) -> None:
        """Use the target's frozen embedding table [V, H]."""
        assert table.shape == (self.config.vocab_size, self.config.hidden_size)
        self.embedding_table = table

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Normal weights with the configuration's standard deviation, norms at one, biases at zero, a learned mask at the mask token's own row; the added
        parts so that they change nothing yet."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name == "mask_embedding":
                parameter.copy_(self.embedding_table[self.config.mask_token_id])
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        for module in self.modules():
            if isinstance(module, GroupedConvolution):
                module.initialise()
            elif isinstance(module, MarkovHead):
                module.initialise(generator)

    # -- the two halves of a forward pass

    def context(self, batch: PackedBatch) -> Context:
        """Keys and values of the target states of a pack, in every layer."""
        longest = int(batch.cu_seqlens.diff().max()) + self.config.block_size if batch.num_tokens else 0
        check_reach(self.config.rope_parameters, max_positions=self.config.max_position_embeddings, longest=longest)
        state = linear(batch.aux.to(self.compute_dtype), Weight.of([self.fc.weight], self.compute_dtype))
        state = self.hidden_norm(state)
        rotation = self._rotation(batch.position)
        layers, keys_values = [_Layer(layer, self.compute_dtype) for layer in self.layers], []  # type: ignore[arg-type]
        for layer in layers:
            attention = layer.attention
            part = slice(attention.query_size, None)
            bias = None if attention.bias is None else attention.bias[part]
            keys_values.append(attention.keys_values(linear(state, attention.inputs.part(rows=part), bias=bias), rotation))
        return Context(layers, keys_values)

    def blocks(self, batch: PackedBatch, rows: BlockRows, context: Context) -> Tensor:
        """States of all slots before the final norm, [A * S, H]."""
        slots = self.config.block_size
        hidden = self._embed(batch, rows)
        position = (batch.position[rows.base] + 1)[:, None] + torch.arange(slots, device=rows.base.device)
        rotation, attend = self._rotation(position.flatten()), BlockAttention(rows, self.mask)
        for layer, (key, value) in zip(context.layers, context.keys_values, strict=True):
            x = layer.norm(hidden)
            if layer.convolutions is None:
                attended = self._attend(layer, x, rotation, key, value, attend)
                hidden = layer.attention.output(attended, Residual(hidden))
                hidden = mlp_block(hidden, layer.mlp_norm.weight, layer.gate_up, layer.down, eps=layer.mlp_norm.eps, recompute=self.recompute)
                continue
            around_attention, around_mlp = layer.convolutions
            inner = partial(self._project_attended, layer, rotation=rotation, key=key, value=value, attend=attend)
            hidden = hidden + self._convolved(around_attention, x, inner)
            hidden = hidden + self._convolved(around_mlp, layer.mlp_norm(hidden), partial(self._mlp, layer))
        return hidden

    # -- pieces

    def _embed(self, batch: PackedBatch, rows: BlockRows) -> Tensor:
        """[A * S, H]: the anchor's token, then masks. A learned row stands for the mask token wherever it is."""
        config, table = self.config, self.embedding_table
        tokens = torch.full((rows.base.shape[0], config.block_size), config.mask_token_id, dtype=torch.int64, device=rows.base.device)
        tokens[:, 0] = batch.input_ids[rows.base + 1]
        embedded = F.embedding(tokens.flatten(), table).to(self.compute_dtype)
        if not config.learned_mask:
            return embedded
        return torch.where((tokens.flatten() == config.mask_token_id)[:, None], self.mask_embedding.to(self.compute_dtype), embedded)

    def _rotation(self, position: Tensor) -> Rotation:
        inverse = self.inverse_frequencies
        kind = wide(self.compute_dtype)
        return tables(inverse.to(kind), self.rope_factor, position, kind)

    def _attend(self, layer: _Layer, x: Tensor, rotation: Rotation, key: Tensor, value: Tensor, attend: BlockAttention) -> Tensor:
        """[A * S, h, d]."""
        heads = layer.attention.all(linear(x, layer.attention.inputs, bias=layer.attention.bias), rotation)
        return attend(*heads, key, value)

    def _project_attended(self, layer: _Layer, x: Tensor, *, rotation: Rotation, key: Tensor, value: Tensor, attend: BlockAttention) -> Tensor:
        attended = self._attend(layer, x, rotation, key, value, attend)
        return linear(attended.flatten(1), layer.attention.o, bias=layer.attention.o_bias)

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return layer.mlp(x)
        again: Tensor = checkpoint(layer.mlp, x, use_reentrant=False)
        return again

    def _convolved(self, convolution: Convolution, x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """``inner`` between the two sides of a convolution."""
        coefficients = convolution.coefficients(x, self.config.block_size)
        return convolution.apply(1, coefficients, inner(convolution.apply(0, coefficients, x)))
