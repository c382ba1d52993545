"""README.md of an exported draft: what it drafts for, how to serve it, and how it was trained, from facts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchspec import __version__
from torchspec.models.eagle3.config import DraftConfig
from torchspec.models.eagle3.formats import Format
from torchspec.models.training import recipe
from torchspec.target import Target

_LIBRARY = {"vllm": "vllm", "speculators": "speculators", "sglang": "sglang"}


def model_card(
    config: DraftConfig, target: Target, *, form: Format, dtype: str, parameters: int, target_name: str | None = None, training: Mapping[str, Any] | None = None
) -> str:
    """The card.

    Args:
        config: the draft's architecture.
        target: what it drafts for.
        form: of the directory.
        dtype: of the tensors.
        parameters: number of trained values.
        target_name: hub id of the target, where it is known by another name than ``target.config.path``.
        training: facts by their name (``unroll_steps``, ``step_weights``, ``optimizer_steps``, ``recipe``); what is missing is left out.
    """
    facts = dict(training or {})
    name = target_name or target.config.path
    hub = target_name is not None or not Path(target.config.path).is_dir()
    lines = ["---", f"library_name: {_LIBRARY[form]}", "pipeline_tag: text-generation", "tags:", "- speculative-decoding", "- eagle3"]
    lines += [f"base_model: {name}", "base_model_relation: adapter"] if hub else []
    lines += ["---", "", f"# EAGLE-3 draft of {name}", ""]
    lines += [f"A draft for speculative decoding (EAGLE-3, arXiv 2503.01840): the target `{name}` verifies what it proposes.", "", "## Serve", ""]
    lines += ["```", _serve(form, name, int(facts.get("unroll_steps") or 3)), "```", "", "## Draft", ""]
    lines += _table(_architecture(config, target, dtype, parameters))
    rows = _training(facts)
    if rows:
        lines += ["", "## Training", ""] + _table(rows)
    lines += ["", f"Written by TorchSpec {__version__}. Layer indices are Transformers' `hidden_states` indices.", ""]
    return "\n".join(lines)


def _serve(form: Format, target: str, proposals: int) -> str:
    if form == "sglang":
        words = f"--speculative-algorithm EAGLE3 --speculative-num-steps {proposals} --speculative-eagle-topk 1 --speculative-num-draft-tokens {proposals + 1}"
        return f"python -m sglang.launch_server --model {target} --speculative-draft-model-path THIS_DIRECTORY {words}"
    speculative = {"method": "eagle3", "model": "THIS_DIRECTORY", "num_speculative_tokens": proposals}
    return f"vllm serve {target} --speculative-config '{json.dumps(speculative)}'"


def _architecture(config: DraftConfig, target: Target, dtype: str, parameters: int) -> list[tuple[str, str]]:
    kind = "latent (DeepSeek)" if config.mla is not None else "grouped-query with q/k norms (Qwen3)" if config.qk_norm else "grouped-query (Llama)"
    options = [flag for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias") if getattr(config, flag)]
    whole = config.draft_vocab_size == config.vocab_size
    return [
        ("trained parameters", f"{parameters:,}"),
        ("layers, hidden size, attention", f"{config.num_layers}, {config.hidden_size}, {kind}"),
        ("options", ", ".join(options) or "none"),
        ("aux layers", f"{list(config.aux_layers)} of 0..{target.num_layers}"),
        ("draft vocabulary", f"{config.draft_vocab_size:,} of {config.vocab_size:,}" + (" (whole)" if whole else "")),
        ("RoPE", ", ".join(f"{name} {value}" for name, value in config.rope_parameters.items())),
        ("tensors", dtype),
        ("target fingerprint", f"`{target.fingerprint}`"),
    ]


def _training(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if facts.get("unroll_steps") is not None:
        rows.append(("unroll steps", str(facts["unroll_steps"])))
    if facts.get("step_weights") is not None:
        rows.append(("step weights", ", ".join(f"{weight:.4g}" for weight in facts["step_weights"])))
    if facts.get("optimizer_steps") is not None:
        rows.append(("optimizer steps", f"{facts['optimizer_steps']:,}" + _epochs(facts)))
    return rows + recipe.rows(facts.get("recipe") or {})


def _epochs(facts: Mapping[str, Any]) -> str:
    """How often the data were seen, where it is known how many steps that takes."""
    steps = (facts.get("recipe") or {}).get("data", {}).get("steps_per_epoch")
    return f" ({facts['optimizer_steps'] / steps:.3g} epochs)" if steps else ""


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
