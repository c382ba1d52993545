"""Reading a Transformers model's residual stream at chosen indices, without keeping the rest and without computing logits.

Index i is ``hidden_states[i]``: what enters block i; 0 is the embedding output, L is what enters the final norm. Where a model adds something between two
blocks (Qwen3-VL: features of images, which Transformers' own ``hidden_states`` show one index later) it is in, as it is in vLLM. Blocks after the last wanted
index are skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.stack import text_stack


class _Enough(Exception):
    """Everything wanted has been seen."""


class HiddenStateHooks:
    """Captures states of forwards of ``model``.

    Args:
        model: a causal LM of Transformers.
        indices: what to keep.
        num_layers: L of the target's configuration.

    Raises:
        UserError: when the stack of blocks or the final norm is not found.
    """

    def __init__(self, model: nn.Module, indices: tuple[int, ...], *, num_layers: int) -> None:
        stack = text_stack(model, num_layers=num_layers)
        self.inner, self.blocks, self.norm = stack.owner, stack.blocks, stack.norm
        self._whole: nn.Module = getattr(model, "model", model)
        self._takes_ids = "input_ids" in inspect.signature(self.inner.forward).parameters
        self.indices = indices
        self.num_layers = num_layers

    @contextmanager
    def capturing(self) -> Iterator[dict[int, Tensor]]:
        """Inside, each forward of the model fills the dictionary, index → [B, T, D]. Use :meth:`run` to forward."""
        states: dict[int, Tensor] = {}
        last = max(self.indices)
        entered: list[bool] = []  # NanoChat calls the final norm before its blocks too

        def keep(index: int, value: Any) -> None:
            states[index] = value[0] if isinstance(value, tuple) else value
            if index == last:
                raise _Enough

        handles = []
        for index in self.indices:
            if index == self.num_layers:
                # any block: Mllama leaves those out that would look at images
                handles += [block.register_forward_pre_hook(lambda *_: entered.append(True)) for block in self.blocks]
                handles.append(self.norm.register_forward_pre_hook(lambda _, args, i=index: keep(i, args) if entered else None))
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

        Raises:
            UserError: a wanted index was not come by.
        """
        with self.capturing() as states:
            try:
                if seen or not self._takes_ids:
                    self._whole(input_ids=input_ids, use_cache=False, **(seen or {}))
                else:
                    self.inner(input_ids=input_ids, use_cache=False)
            except _Enough:
                pass
        missing = [index for index in self.indices if index not in states]
        if missing:
            raise UserError("data.target.path", type(self.inner).__name__, f"runs without coming by hidden states {missing}", "report this architecture")
        for index, state in states.items():
            if state.shape[:-1] != input_ids.shape:  # several streams (Gemma-3n), or tokens of its own (CPM-Ant)
                problem = f"has hidden states {index} of {list(state.shape)} for ids of {list(input_ids.shape)}: not one a token"
                raise UserError("data.target.path", type(self.inner).__name__, problem, "choose a target of another architecture")
        return states
