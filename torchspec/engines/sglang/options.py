"""Arguments of SGLang: what TorchSpec sets and what users may set."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from torchspec.engines.capture.requests import TOKEN_VARIABLE
from torchspec.engines.engine import EngineConfig
from torchspec.engines.sglang.collector import captured_ids
from torchspec.engines.sglang.hooks import hook_entries
from torchspec.engines.sglang.launch import ON_CPU
from torchspec.hardware import working_dtype
from torchspec.target import Target

OWNED = {
    "model_path": "data.target.path names the target",
    "tokenizer_path": "requests are token ids",
    "skip_tokenizer_init": "requests are token ids",
    "revision": "data.target.revision sets it",
    "dtype": "data.target.dtype sets it",
    "trust_remote_code": "data.target.trust_remote_code sets it",
    "device": "data.engines.devices sets it",
    "context_length": "it follows from data.max_length",
    "allow_auto_truncate": "conversations would be cut without a word",
    "forward_hooks": "hidden states leave SGLang through them",
    "speculative_algorithm": "hidden states leave SGLang through it",
    "enable_return_aux_hidden_states": "hidden states leave SGLang through it",
    "return_aux_hidden_state_layer_ids": "hidden states leave SGLang through it",
    "enable_return_hidden_states": "hidden states leave SGLang through hooks",
    "disable_radix_cache": "tokens found in the cache would have no states",
    "disable_cuda_graph": "hooks do not see what a graph replays",
    "pp_size": "one rank writes, and must have the states of all blocks",
    "attn_cp_size": "one rank writes, and must have the states of all tokens",
    "dp_size": "use data.engines.workers: each worker is a replica",
    "enable_dp_attention": "one rank writes, and must have the states of all requests",
    "enable_two_batch_overlap": "a forward's rows must be together",
    "enable_mixed_chunk": "a forward's rows must be of prompts alone",
    "kv_cache_dtype": "a quantised cache would change the hidden states",
    "quantization": "states of a target that SGLang quantises are not the target's; give a quantised target where that is served",
    "json_model_override_args": "the target's own configuration describes it",
    "enable_lora": "the target is taken as it is",
    "lora_paths": "the target is taken as it is",
    "disaggregation_mode": "prompts must be computed where the hooks are",
    "custom_sigquit_handler": "the worker watches SGLang's processes",
}
"""Arguments that are refused in ``data.engines.engine_args``, each with the reason."""

GENERATES = {
    name: OWNED[name]
    for name in (
        "model_path",
        "tokenizer_path",
        "skip_tokenizer_init",
        "revision",
        "dtype",
        "trust_remote_code",
        "device",
        "quantization",
        "json_model_override_args",
    )
}
"""Of these, what is refused where SGLang only generates."""

MARGIN = 7
"""Tokens of SGLang's context that a prompt may not fill."""


def server_arguments(
    target: Target, config: EngineConfig, *, aux_layers: tuple[int, ...], max_length: int, device: str, own_capture: bool = True
) -> dict[str, Any]:
    """Arguments of an SGLang that captures for us.

    Args:
        target: the model.
        config: of the engines; its ``engine_args`` win where TorchSpec has only a default.
        aux_layers: states fed to the draft.
        max_length: tokens of a request, at most.
        device: torch device of the worker.
        own_capture: as of :func:`capture_arguments`.
    """
    on_cpu = device == "cpu"
    arguments: dict[str, Any] = {
        **generating_arguments(target, config, device=device),
        "context_length": max_length + MARGIN + 1,
        **capture_arguments(target, aux_layers, own_capture=own_capture, allow_unknown_version=config.allow_unknown_version),
    }
    if on_cpu:
        arguments.setdefault("max_total_tokens", 4 * config.batch_tokens + 4 * max_length)
    if config.deterministic:
        arguments |= {"prefill_max_requests": 1, "chunked_prefill_size": -1, "max_prefill_tokens": max(config.batch_tokens, max_length)}
    return arguments


def generating_arguments(target: Target, config: EngineConfig, *, device: str) -> dict[str, Any]:
    """Arguments of any SGLang that runs the target for us; see :func:`server_arguments`."""
    on_cpu = device == "cpu"
    return {
        "chunked_prefill_size": config.batch_tokens,
        "max_prefill_tokens": config.batch_tokens,
        "max_running_requests": config.batch_samples,
        "sleep_on_idle": True,  # an idle scheduler would keep a core busy
        "log_level": "warning",
        "grammar_backend": "none",
        **({"attention_backend": "torch_native", "sampling_backend": "pytorch"} if on_cpu else {}),
        **config.engine_args,
        "model_path": target.config.path,
        "revision": target.config.revision,
        "trust_remote_code": target.custom_model,
        "skip_tokenizer_init": True,
        "dtype": str(working_dtype(target.dtype, device)).removeprefix("torch."),
        "device": "cpu" if on_cpu else "cuda",
    }


def capture_arguments(target: Target, aux_layers: tuple[int, ...], *, own_capture: bool = True, **facts: Any) -> dict[str, Any]:
    """Arguments that make SGLang call our hooks.

    Args:
        target: the model.
        aux_layers: states fed to the draft.
        own_capture: whether the release has the arguments that make a model capture states itself (0.5.23 does).
        facts: of ``hooks.hook_entries``.
    """
    layer_ids = tuple(sorted({*aux_layers, target.num_layers}))
    arguments: dict[str, Any] = {
        "forward_hooks": hook_entries(layer_ids, target=target.fingerprint, **facts),
        "disable_radix_cache": True,
        "disable_cuda_graph": True,
    }
    if (captured := captured_ids(layer_ids)) and own_capture:
        arguments |= {
            "enable_return_aux_hidden_states": True,
            "speculative_algorithm": "EAGLE3",  # names how blocks are counted; no draft is loaded
            "return_aux_hidden_state_layer_ids": [i - 1 for i in captured],
        }
    return arguments


def set_environment(config: EngineConfig, *, device: str, tp_size: int) -> None:
    """Environment variables of SGLang that this process and its children need; those the user set stay."""
    os.environ.setdefault("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")  # for the margin
    if device != "cpu":
        return
    os.environ[ON_CPU] = "1"
    if config.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    if tp_size > 1:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // tp_size)
        parts = [",".join(str(core) for core in cores[rank * share % len(cores) :][:share]) for rank in range(tp_size)]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(parts))


def serve_command(target: Target, aux_layers: tuple[int, ...]) -> str:
    """The shell line of an SGLang server that engine sglang_remote can use; TorchSpec must be importable there."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", target.config.path]
    words += ["--revision", target.config.revision] if target.config.revision else []
    words += ["--trust-remote-code"] if target.config.trust_remote_code and (target.custom_model or target.custom_tokenizer) else []
    words += ["--dtype", str(target.dtype).removeprefix("torch.")]
    for name, value in capture_arguments(target, aux_layers).items():
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list) and value and isinstance(value[0], int):
            words += [str(one) for one in value]
        elif not isinstance(value, bool):
            words.append(value if isinstance(value, str) else json.dumps(value))
    return f"{TOKEN_VARIABLE}=SECRET {shlex.join(words)}"
