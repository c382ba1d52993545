"""What a running vLLM must be like for the states in its cache to be those of the target, whole and unrounded.

``options.py`` refuses the wrong arguments of a vLLM that we start; the connector asks this of any vLLM that loads it, also one that somebody else started.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

_WHOLE = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")
"""Sizes of vLLM's parallel configuration that would leave the writing rank with a part of the states."""


def check(vllm_config: Any) -> None:
    """Refuse a vLLM whose states would be wrong.

    Args:
        vllm_config: its whole configuration.

    Raises:
        UserError: naming what it was started with.
    """
    for field, value, problem, fix in _wrong(vllm_config):
        raise UserError(f"vllm.{field}", value, problem, fix)


def check_target(vllm_config: Any, *, promised: str | None) -> Target:
    """The target that this vLLM has loaded, its fingerprint taken from the files themselves.

    Args:
        vllm_config: vLLM's configuration.
        promised: fingerprint in the command that started it; None where it holds none.

    Raises:
        UserError: the command was made for another target, or the model's files cannot be read.
    """
    model = vllm_config.model_config
    target = Target(TargetConfig(path=model.model, revision=model.revision, trust_remote_code=model.trust_remote_code))
    if promised is not None and promised != target.fingerprint:
        problem = f"has the fingerprint {target.fingerprint}, but vLLM was started with a command made for {promised}"
        raise UserError("vllm.model", model.model, problem, "serve that target, or print the command anew: main.py vllm_command")
    return target


def check_cache(cache: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a cache that does not keep states as the model computes them.

    Raises:
        UserError: its type is another one.
    """
    if cache.dtype != dtype:
        problem = f"makes vLLM keep hidden states as {str(cache.dtype).removeprefix('torch.')}; the model computes {str(dtype).removeprefix('torch.')}"
        raise UserError("vllm.kv_cache_dtype", "auto", problem, "leave kv_cache_dtype alone, or use data.engine transformers")


def _wrong(vllm_config: Any) -> Iterator[tuple[str, Any, str, str]]:
    """(field, value, problem, fix) of everything that is wrong."""
    import vllm

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    dtype = str(model.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype):
        fix = f"start it with --kv-cache-dtype auto or {dtype}; where vLLM itself chose another one, use data.engine transformers"
        yield "kv_cache_dtype", cache.cache_dtype, f"would round the hidden states, which the model computes in {dtype}", fix
    if cache.enable_prefix_caching:
        yield "enable_prefix_caching", True, "leaves tokens found in the cache without states (vLLM issue 44485)", "start it with --no-enable-prefix-caching"
    if vllm.__version__.startswith("0.26.") and vllm_config.scheduler_config.async_scheduling:
        problem = "may leave a request that is preempted without all of its states in this vLLM"
        yield "async_scheduling", True, problem, "start it with --no-async-scheduling (engine_args: async_scheduling false), or take a later vLLM"
    for name in _WHOLE:
        if (size := getattr(parallel, name, 1)) > 1:
            yield name, size, "leaves the rank that writes with a part of the states", "use tensor parallelism alone"
    if vllm_config.load_config.load_format == "dummy":
        yield "load_format", "dummy", "makes random weights", "leave it out"
    if model.hf_overrides:
        yield "hf_overrides", model.hf_overrides, "makes another model of the target than its files describe", "leave it out"
    configs = (model.hf_config, model.hf_text_config)
    if model.quantization is not None and not any(getattr(c, name, None) for c in configs for name in ("quantization_config", "compression_config")):
        yield "quantization", model.quantization, "rounds weights that the target keeps whole", "leave it out, or train on a target that is quantised"
