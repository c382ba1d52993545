"""Reading a Transformers model's residual stream at chosen indices, without keeping the rest and without computing logits.

Index i is ``hidden_states[i]``: what enters block i; 0 is the embedding output, L is what enters the final norm. Where a model adds something between two
blocks (Qwen3-VL: features of images, which Transformers' own ``hidden_states`` show one index later) it is in, as it is in vLLM. Blocks after the last wanted
index are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.errors import UserError


class _Enough(Exception):
    """Everything wanted has been seen."""


class HiddenStates:
    """Captures states of forwards of ``model``.

    Args:
        model: a causal LM of Transformers.
        indices: what to keep.
        num_layers: L of the target's configuration.

    Raises:
        UserError: when the stack of blocks or the final norm is not found.
    """

    def __init__(self, model: nn.Module, indices: tuple[int, ...], *, num_layers: int) -> None:
        self.inner = self._stack_owner(model, num_layers)
        self._whole: nn.Module = getattr(model, "model", model)
        lists = [child for child in self.inner.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
        self.blocks: nn.ModuleList = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
        self.norm = self._final_norm()
        self.indices = indices
        self.num_layers = num_layers

    @staticmethod
    def _stack_owner(model: nn.Module, num_layers: int) -> nn.Module:
        """The module whose forward runs the blocks: of those that own a list of so many, the one whose list is the largest (a vision tower may have
        as many blocks, a mixture as many experts)."""

        def stack(module: nn.Module) -> int:
            lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) == num_layers]
            return max((sum(p.numel() for p in found.parameters()) for found in lists), default=0)

        owner = max(model.modules(), key=stack)
        if not stack(owner):
            raise UserError("data.target.path", type(model).__name__, f"has no list of {num_layers} blocks that we can find", "report this architecture")
        return owner

    def _final_norm(self) -> nn.Module:
        """The norm among the children of the stack's owner: the one after the blocks, else one that is named final."""
        names = [(name, child) for name, child in self.inner.named_children() if "norm" in type(child).__name__.lower()]
        children = list(self.inner.children())
        after = children[next(i for i, child in enumerate(children) if child is self.blocks) :]
        for _, child in [pair for pair in names if any(pair[1] is later for later in after)] + [pair for pair in names if "final" in pair[0]]:
            return child
        problem = "has no final norm beside its blocks that we can find"
        raise UserError("data.target.path", type(self.inner).__name__, problem, "report this architecture")

    @contextmanager
    def capturing(self) -> Iterator[dict[int, Tensor]]:
        """Inside, each forward of the model fills the dictionary, index → [B, T, D]. Use :meth:`run` to forward."""
        states: dict[int, Tensor] = {}
        last = max(self.indices)

        def keep(index: int, value: Any) -> None:
            states[index] = value[0] if isinstance(value, tuple) else value
            if index == last:
                raise _Enough

        handles = []
        for index in self.indices:
            if index == self.num_layers:
                handles.append(self.norm.register_forward_pre_hook(lambda _, args, i=index: keep(i, args)))
            else:
                handles.append(
                    self.blocks[index].register_forward_pre_hook(lambda _, args, kwargs, i=index: keep(i, args or kwargs["hidden_states"]), with_kwargs=True)
                )
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def run(self, input_ids: Tensor, seen: Mapping[str, Tensor] | None = None) -> dict[int, Tensor]:
        """States of one forward: index → [B, T, D].

        Args:
            input_ids: [B, T], padded on the right with any valid id. States of real tokens do not depend on the padding.
            seen: of images, by the names that the model's forward has; empty for text alone.
        """
        with self.capturing() as states:
            try:
                if seen:
                    self._whole(input_ids=input_ids, use_cache=False, **seen)
                else:
                    self.inner(input_ids=input_ids, use_cache=False)
            except _Enough:
                pass
        return states
