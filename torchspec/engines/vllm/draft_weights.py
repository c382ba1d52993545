"""New weights for the draft of a running vLLM, in place: mixed into vLLM's worker (``worker_extension_cls``) and called over its own RPC.

vLLM repacks weights after it loaded them and restores the original layout for a reload; the same calls serve its reload of targets. Names and calls were read
in vLLM 0.32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXTENSION = "torchspec.engines.vllm.draft_weights.DraftWeights"


class DraftWeights:
    """See the module."""

    model_runner: Any
    vllm_config: Any

    def take_draft(self, path: str) -> str:
        """Load an exported draft of the same architecture.

        Args:
            path: its directory.

        Returns:
            "" when it speculates from now on, else why it cannot be loaded in place.
        """
        from safetensors.torch import load_file

        runner = self.model_runner
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        model = getattr(drafter, "model", None)
        if model is None:
            return "this vLLM keeps its draft elsewhere"
        try:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
        except ImportError:
            return "this vLLM cannot reload weights in place"
        target = runner.get_model()
        tensors = {name: tensor for file in sorted(Path(path).glob("*.safetensors")) for name, tensor in load_file(file).items()}
        if not tensors:
            return f"there are no weights in {path}"
        head = getattr(model, "lm_head", None)
        if "lm_head.weight" in tensors and head is not None and getattr(target, "lm_head", None) is head:
            return "vLLM found the first draft's head equal to the target's, and lets them share it"
        shared = getattr(getattr(target, "model", None), "embed_tokens", None) is getattr(model.model, "embed_tokens", None)
        if shared:
            tensors.pop("embed_tokens.weight", None)
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(model, self.vllm_config.speculative_config.draft_model_config)
        return ""
