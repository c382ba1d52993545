"""``main.py sglang_command``: the command line of an SGLang server that engine sglang_remote can use."""

from __future__ import annotations

import sys

from torchspec.target import Target, TargetConfig


def sglang_command(
    target: str, aux_layers: list[int] | None = None, family: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Print how to start an SGLang server that engine sglang_remote can use.

    Args:
        target: hub id or directory of the target, as the server sees it.
        aux_layers: hidden-state indices of the draft; empty takes the default of model.aux_layers.
        family: whose default, as model.family.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.engines.sglang.options import serve_command
    from torchspec.models.families import DEFAULT, family_named

    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    made = family_named(DEFAULT if family is None else family, field="family")
    print(serve_command(facts, made.aux_layers(facts) if aux_layers is None else facts.aux_layers(aux_layers)))
    print("TorchSpec must be importable where it runs. A prompt may have 7 tokens less than --context-length.", file=sys.stderr)
