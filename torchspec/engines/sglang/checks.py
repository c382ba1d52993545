"""What a running SGLang must be like for the states that its hooks see to be those of the target, whole and unrounded.

``options.py`` refuses the wrong arguments of an SGLang that we start; this is asked in the scheduler of any SGLang, also of one that somebody else started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchspec.engines.sglang.collector import Facts
from torchspec.engines.sglang.families import FAMILIES, Family
from torchspec.engines.table import ENGINES
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "disable_radix_cache": ((True,), "leaves tokens found in the cache without states"),
    "pp_size": ((1,), "leaves the rank that writes with a part of the states"),
    "attn_cp_size": ((1,), "leaves the rank that writes with a part of the rows"),
    "dp_size": ((1,), "gives each rank other requests"),
    "enable_dp_attention": ((False,), "gives each rank other requests"),
    "enable_two_batch_overlap": ((False,), "splits a forward's rows"),
    "enable_mixed_chunk": ((False,), "mixes rows of prompts and answers"),
    "enable_lora": ((False, None), "may change the target"),
    "lora_paths": ((None, [], {}), "changes the target"),
    "kv_cache_dtype": (("auto", "bfloat16", "bf16", "float16", "float32"), "rounds what the states are computed from"),
    "disaggregation_mode": (("null",), "computes prompts elsewhere"),
    "load_format": (("auto", "safetensors", "pt"), "may not be the target's own weights"),
    "json_model_override_args": (("{}",), "makes another model of the target than its files describe"),
    "allow_auto_truncate": ((False,), "cuts conversations without a word"),
    "is_embedding": ((False,), "is no language model"),
}
"""Arguments, the values that are right, and what others do."""


def tensor_parallel_rank() -> int:
    """Of this process."""
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def wrong_arguments(arguments: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, value, problem) of each of SGLang's arguments with which states would be wrong; names that this release lacks are none."""
    for name, (right, problem) in _MUST_BE.items():
        value = getattr(arguments, name, right[0])
        if value not in right:
            yield name, value, problem


def family_of(hf_config: Any, *, max_length: int) -> tuple[str, Family | None]:
    """Architecture of a target, and what is known of it in SGLang.

    Args:
        hf_config: Transformers' configuration.
        max_length: tokens of the longest request.

    Raises:
        UserError: SGLang computes other states than the target has.
    """
    architecture = str((getattr(hf_config, "architectures", None) or ["unknown"])[0])
    family = FAMILIES.get(architecture)
    window = getattr(hf_config, "sliding_window", None)
    if family is not None and not family.window and window is not None and window < max_length:
        problem = f"is of {architecture} with sliding_window {window}, which SGLang does not obey: states of longer conversations are wrong"
        raise UserError("data.target.path", getattr(hf_config, "_name_or_path", architecture), problem, "lower data.max_length, or use another data.engine")
    return architecture, family


def check_running(config: Mapping[str, Any]) -> Facts:
    """The SGLang that this scheduler process belongs to.

    Args:
        config: of the hooks.

    Raises:
        UserError: it is not one that can be served, or its states would be wrong.
    """
    import sglang

    allow_unknown = bool(config.get("allow_unknown_version", False))
    ENGINES["sglang"].check_version(sglang.__version__, allow_unknown=allow_unknown)
    arguments = _arguments()
    for name, value, problem in wrong_arguments(arguments):
        raise UserError(f"sglang.{name}", value, problem, "start it as main.py sglang_command says")
    target = Target(TargetConfig(path=arguments.model_path, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code))
    promised = config.get("target")
    if promised is not None and promised != target.fingerprint:
        problem = f"has the fingerprint {target.fingerprint}, but SGLang was started with a command made for {promised}"
        raise UserError("sglang.model_path", arguments.model_path, problem, "serve that target, or print the command anew: main.py sglang_command")
    max_tokens = int(arguments.context_length or getattr(target.hf_config, "max_position_embeddings", 2**15))
    architecture, family = family_of(target.hf_config, max_length=max_tokens)
    dtype = str(arguments.dtype)
    return Facts(
        layer_ids=tuple(config["layer_ids"]),
        architecture=architecture,
        family=family,
        allow_unknown=allow_unknown,
        target=target.fingerprint,
        path=arguments.model_path,
        hidden_size=target.hidden_size,
        dtype=str(target.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        alone=getattr(arguments, "prefill_max_requests", None) == 1 and (arguments.chunked_prefill_size or -1) < 0,
        max_tokens=max_tokens,
        producer=f"sglang {sglang.__version__}",
    )


def _arguments() -> Any:
    """SGLang's own arguments, as it was started."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except ImportError:  # before 0.5.22
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
