"""vLLM's cache of hidden states: which of its groups it is, how it is laid out, and reading one request out of it.

With ``extract_hidden_states`` vLLM keeps the wanted states of every token in a paged cache of its own, in a layer that computes nothing. Seen so far:

==============  ============================================
vLLM            shape of that layer's cache
==============  ============================================
0.26            [blocks, block size, layers, D]
0.32            [blocks, layers, block size, D]
==============  ============================================

The layout is found from the sizes (where they do not tell, from where vLLM's own code writes), never assumed from the version; what fits neither is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError

_LAYER = "cache_only_layers"
"""Part of the name of vLLM's layer that keeps the states."""


def find_group(kv_cache_config: Any) -> tuple[int, int]:
    """(index of the cache group that holds the hidden states, its block size).

    Found by the type of its spec. A target whose own caches are like it may share the group: then the group holds one spec a layer, or one for all of them, and
    the name of the layer tells.

    Raises:
        UserError: there is none, or more than one.
    """
    from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

    found: list[tuple[int, int]] = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        specs = list(of_layers.values()) if of_layers else [group.kv_cache_spec]
        of_states = [spec for spec in specs if isinstance(spec, HiddenStateCacheSpec)]
        if not of_states and any(_LAYER in name for name in group.layer_names):
            of_states = [group.kv_cache_spec]
        found += [(index, int(spec.block_size)) for spec in of_states]
    if len(found) != 1:
        groups = ", ".join(type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups)
        raise UserError("data.engine", "vllm", f"has {len(found)} caches of hidden states among its groups ({groups})", "use engine transformers")
    return found[0]


class HiddenStateCache:
    """Reads requests out of the cache layer.

    Args:
        cache: the layer's tensor, 4-dimensional.
        layers: states kept for each token.
        block_size: tokens of a block, by the group's spec.

    Raises:
        UserError: the layout is none that is known.
    """

    def __init__(self, cache: Tensor, *, layers: int, block_size: int) -> None:
        shape = tuple(cache.shape)
        layers_first = shape[1:3] == (layers, block_size)
        tokens_first = shape[1:3] == (block_size, layers)
        if cache.dim() != 4 or not (layers_first or tokens_first):
            problem = f"keeps hidden states as {list(shape)}; known are [blocks, {layers}, {block_size}, D] and [blocks, {block_size}, {layers}, D]"
            raise UserError("data.engine", "vllm", problem, "use a version listed in docs/engines.md")
        if layers_first and tokens_first:  # a block as long as there are states: sizes do not tell
            layers_first = _writes_layers_first(layers, block_size)
        self._by_token = cache.transpose(1, 2) if layers_first else cache
        self.block_size = block_size

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._by_token.device

    def read(self, blocks: Sequence[int], rows: int) -> Tensor:
        """States [rows, layers, D] of a request, in the order of the configured layer ids.

        Args:
            blocks: ids of its blocks in this group, in order.
            rows: tokens computed.

        Raises:
            ValueError: the blocks hold fewer tokens.
        """
        needed = -(-rows // self.block_size)
        if len(blocks) < needed:
            raise ValueError(f"{len(blocks)} blocks of {self.block_size} tokens for {rows} states")
        index = torch.tensor(blocks[:needed], dtype=torch.int64)
        if self.device.type == "cuda":
            index = index.pin_memory().to(self.device, non_blocking=True)
        return self._by_token.index_select(0, index).flatten(0, 1)[:rows]


def split(states: Tensor, layer_ids: Sequence[int], aux_layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """aux [R, n, D] and last [R, D] of states [R, layers, D].

    Args:
        states: as :meth:`HiddenStateCache.read` gives them.
        layer_ids: which they are, by Transformers' index.
        aux_layers: those that records hold beside the last one.
    """
    chosen = [layer_ids.index(i) for i in aux_layers]
    leading = chosen == list(range(len(chosen)))  # as a rule: then nothing is copied
    return states[:, : len(chosen)] if leading else states[:, chosen], states[:, layer_ids.index(max(layer_ids))]


def _writes_layers_first(layers: int, block_size: int) -> bool:
    """Whether vLLM's own update of such a cache puts the states of a token at [block, :, place] (else at [block, place, :])."""
    from vllm.model_executor.models.extract_hidden_states import basic_cache

    cache = torch.zeros(1, layers, block_size, 1)
    basic_cache(torch.ones(1, layers, 1), cache, torch.tensor([1]))
    return bool(cache[0, :, 1].eq(1).all())
