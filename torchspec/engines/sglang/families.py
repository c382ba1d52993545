"""Targets whose states SGLang was seen to give as Transformers does, and where the modules are that the hooks are on.

There are two ways to a state. *Entering* (``hooks.state``): what enters the norm before block i, which SGLang's fused norm returns beside the normed rows,
is state i. *Captured* (SGLang's ``enable_return_aux_hidden_states``): what the model's own EAGLE-3 capture hands to the logits processor. The first needs no
support of the model's; it is silent where a model computes a norm past its module. The second is wrong where a model's capture leaves out the residual. So
both are taken where both are there, and compared (``collector.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A class of models in SGLang."""

    captured: bool
    """Whether its own capture was seen to be right: where the norms are silent, it may be taken alone."""
    window: bool = True
    """Whether SGLang obeys ``sliding_window`` of its configuration."""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(captured=True),
    "Qwen3ForCausalLM": Family(captured=True),
    "Qwen3MoeForCausalLM": Family(captured=True),
    "Gemma3ForCausalLM": Family(captured=False),
    "MistralForCausalLM": Family(captured=True, window=False),
}
"""By architecture."""


def modules_of(index: int, *, last: int) -> list[str]:
    """Names of the modules, for ``forward_hooks``, that hidden state ``index`` enters.

    Args:
        index: Transformers'.
        last: the number of blocks.
    """
    return ["model.norm"] if index == last else [f"model.layers.{index}.input_layernorm"]
