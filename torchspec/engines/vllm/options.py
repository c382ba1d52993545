"""Engine arguments of vLLM: what TorchSpec sets, what users may set, and which versions are known."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from torchspec.engines.capture.requests import TOKEN_VARIABLE
from torchspec.engines.engine import EngineConfig, Sampling
from torchspec.engines.vllm.refusals import refusals
from torchspec.errors import UserError
from torchspec.hardware import working_dtype
from torchspec.target import Target

OWNED = {
    "model": "data.target.path names the target",
    "tokenizer": "requests are token ids",
    "skip_tokenizer_init": "requests are token ids",
    "revision": "data.target.revision sets it",
    "dtype": "data.target.dtype sets it",
    "trust_remote_code": "data.target.trust_remote_code sets it",
    "max_model_len": "it follows from data.max_length",
    "speculative_config": "hidden states leave vLLM through it",
    "kv_transfer_config": "hidden states leave vLLM through it",
    "enable_prefix_caching": "tokens found in the cache would have no states (vLLM issue 44485)",
    "pipeline_parallel_size": "vLLM keeps the hidden states of one pipeline stage only",
    "decode_context_parallel_size": "one rank writes, and must have the states of all tokens",
    "prefill_context_parallel_size": "one rank writes, and must have the states of all tokens",
    "data_parallel_size": "use data.engines.workers: each worker is a replica",
    "language_model_only": "it follows from data.media",
    "kv_cache_dtype": "a quantised cache would quantise the hidden states",
    "hf_overrides": "the target's own configuration describes it",
    "hf_config_path": "the target's own configuration describes it",
    "quantization": "states of a target that vLLM quantises are not the target's; give a quantised target where that is served",
}
"""Arguments that are refused in ``data.engines.engine_args``, each with the reason."""


GENERATES = {
    name: OWNED[name] for name in ("model", "tokenizer", "skip_tokenizer_init", "revision", "dtype", "trust_remote_code", "hf_overrides", "hf_config_path")
}
"""Of these, what is refused where vLLM only generates."""
ANSWERS = {
    **GENERATES,
    "max_model_len": OWNED["max_model_len"],
    "speculative_config": "the draft in training is the speculator",
    "pipeline_parallel_size": "new draft weights go to the ranks of one stage",
    "data_parallel_size": "use data.on_policy.answer_workers: each worker is a replica",
}
"""What is refused where it answers in a run."""


def layer_ids(target: Target, aux_layers: tuple[int, ...]) -> list[int]:
    """States that vLLM is to keep for each token: those fed to the draft, and the last before the final norm."""
    return sorted({*aux_layers, target.num_layers})


def model_arguments(target: Target, config: EngineConfig, *, max_length: int | None, device: str, images: bool = False) -> dict[str, Any]:
    """Arguments of any vLLM that runs the target for us.

    Args:
        target: the model.
        config: of the engines; its ``engine_args`` win where TorchSpec has only a default.
        max_length: tokens of a request with its answer, at most; None for what the target takes.
        device: torch device of the worker.
        images: whether requests may hold some; else the vision tower of a target that has one is not loaded.
    """
    on_cpu = device == "cpu"
    arguments: dict[str, Any] = {
        "max_num_seqs": config.batch_samples,
        "max_num_batched_tokens": max(config.batch_tokens, config.batch_samples),
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
        **({"mm_processor_cache_gb": 0} if images else {}),  # an image is seen once an epoch
        **config.engine_args,
        "model": target.config.path,
        "revision": target.config.revision,
        "trust_remote_code": target.custom_model or (images and target.config.trust_remote_code),  # of a processor and its tokenizer
        "dtype": str(working_dtype(target.dtype, device)).removeprefix("torch."),
        "skip_tokenizer_init": not images,  # vLLM finds the places of images with the tokenizer
    }
    if target.takes_images and not images:
        arguments["language_model_only"] = True
    if on_cpu and getattr(target.hf_config, "kv_lora_rank", None) is not None:
        arguments |= right_operators_for_latent_attention(arguments)
    if max_length is not None:
        arguments["max_model_len"] = max_length
    if config.deterministic:
        arguments["max_num_seqs"] = 1  # a record depends on what shares its batch
    return arguments


def right_operators_for_latent_attention(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The ``compilation_config`` with which vLLM's CPU build runs MLA.

    RoPE of vLLM 0.32's CPU operators is wrong for its 3-dimensional queries (states came out 70 % off); PyTorch's is right.
    """
    compilation = arguments.get("compilation_config") or {}
    return {"compilation_config": {**compilation, "custom_ops": ["none"]}} if isinstance(compilation, Mapping) else {}


def capture_arguments(target: Target, aux_layers: tuple[int, ...], **connector: Any) -> dict[str, Any]:
    """Arguments that make vLLM keep hidden states and hand them to our connector.

    Args:
        target: the model.
        aux_layers: states fed to the draft.
        connector: ``allow_unknown_version``, and ``owner``, the process whose death is to end the engine core.
    """
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids(target, aux_layers)}},
        },
        "kv_transfer_config": {
            "kv_connector": "HiddenStatesConnector",
            "kv_connector_module_path": "torchspec.engines.vllm.connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"target": target.fingerprint, **connector},
        },
        "enable_prefix_caching": False,
    }


def answer_values(sampling: Sampling, *, ends: list[int]) -> dict[str, Any]:
    """How to answer, as ``SamplingParams`` and the server's completions API both call it.

    What could be changed by a server's own defaults (it takes them from the model's ``generation_config.json``) is named, so that every vLLM samples alike.

    Args:
        sampling: length, temperature, nucleus, seed (without meaning for greedy answers).
        ends: token ids after which the target has finished.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None if sampling.temperature == 0.0 else sampling.seed,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": ends,
    }


def sampling_params(sampling: Sampling, *, ends: list[int], kv_transfer_params: dict[str, Any] | None = None) -> Any:
    """vLLM's own form of how to answer.

    Args:
        sampling, ends: as of :func:`answer_values`.
        kv_transfer_params: for the connector.
    """
    from vllm import SamplingParams

    return SamplingParams(
        **answer_values(sampling, ends=ends),
        detokenize=False,
        extra_args=None if kv_transfer_params is None else {"kv_transfer_params": kv_transfer_params},
    )


def serve_command(target: Target, aux_layers: tuple[int, ...]) -> str:
    """The shell line of a ``vllm serve`` that engine vllm_remote can use; TorchSpec must be importable there."""
    arguments = capture_arguments(target, aux_layers)
    words = ["vllm", "serve", target.config.path]
    words += ["--revision", target.config.revision] if target.config.revision else []
    words += ["--trust-remote-code"] if target.config.trust_remote_code and (target.custom_model or target.custom_tokenizer) else []
    words += ["--dtype", str(target.dtype).removeprefix("torch."), "--no-enable-prefix-caching"]
    words += ["--speculative-config", json.dumps(arguments["speculative_config"]), "--kv-transfer-config", json.dumps(arguments["kv_transfer_config"])]
    return f"{TOKEN_VARIABLE}=SECRET {shlex.join(words)}"


def vllm_config_of(arguments: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, field: str = "data.engines.engine_args") -> Any:
    """vLLM's own configuration for these arguments.

    Args:
        arguments: all of them.
        given: those that the user set.
        field: how the user calls them.

    Raises:
        UserError: vLLM does not take them, or not this target.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    with refusals(given or {}, field=field):
        return AsyncEngineArgs(**arguments).create_engine_config()


def refuse_without_states(vllm_config: Any) -> None:
    """Refuse a target whose vLLM model cannot hand out states of its blocks, before it is loaded.

    Raises:
        UserError: naming the architecture.
    """
    import vllm
    from vllm.model_executor.model_loader.utils import get_model_architecture
    from vllm.model_executor.models.interfaces import supports_eagle3

    found, name = get_model_architecture(vllm_config.model_config)
    if not supports_eagle3(found):
        problem = f"cannot hand out hidden states of {name} (its model in vLLM {vllm.__version__} lacks the EAGLE-3 interface)"
        raise UserError("data.engine", "vllm", problem, "set data.engine to transformers")


def refuse_random_on_cpu(temperature: float, *, device: str, field: str) -> None:
    """Refuse random sampling beside speculation on a CPU: vLLM 0.32's CPU build leaves the temperatures of drafted positions unset (its ``expand`` kernel
    writes into a copy), and what it says is noise. Greedy answers are right there, and so is random sampling on a GPU.

    Raises:
        UserError: naming the field.
    """
    if device == "cpu" and temperature > 0.0:
        problem = "is random sampling, which vLLM's CPU build does wrongly while it speculates (docs/engines.md)"
        raise UserError(field, temperature, problem, "set it to 0 on a CPU")


def set_environment(config: EngineConfig, *, device: str) -> None:
    """Environment variables of vLLM that this process and its children need; those the user set stay."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        if config.threads is not None:
            os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
