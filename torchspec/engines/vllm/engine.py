"""``data.engine: vllm``: vLLM in this worker. Its engine core is a process of its own, which the worker feeds through vLLM's asynchronous interface."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch

from torchspec.engines.arguments import own_devices
from torchspec.engines.capture.engine import PrefillEngine
from torchspec.engines.capture.requests import TOKEN_VARIABLE
from torchspec.engines.engine import Sampling
from torchspec.engines.table import ENGINES
from torchspec.engines.vllm.options import (
    OWNED,
    capture_arguments,
    model_arguments,
    refuse_random_on_cpu,
    refuse_without_states,
    sampling_params,
    set_environment,
    vllm_config_of,
)
from torchspec.errors import UserError
from torchspec.imports import heavy_imports

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)


class VLLMEngine(PrefillEngine):
    """See the module."""

    owned = OWNED
    _llm: Any = None

    def launch(self) -> dict[str, Any]:
        config, device = self.job.config, self.job.device
        if self.job.on_policy is not None and not self.job.on_policy.answer_workers:
            refuse_random_on_cpu(self.job.on_policy.temperature, device=device, field="data.on_policy.temperature")
        set_environment(config, device=device)
        with heavy_imports():
            import vllm
            from vllm.v1.engine.async_llm import AsyncLLM

            from torchspec.engines.vllm.checks import check

        ENGINES["vllm"].check_version(vllm.__version__, allow_unknown=config.allow_unknown_version)
        self.token = os.environ.setdefault(TOKEN_VARIABLE, os.urandom(16).hex())
        arguments = model_arguments(self.target, config, max_length=self.max_tokens, device=device, images=self.job.images)
        if device != "cpu":
            arguments.setdefault("tensor_parallel_size", own_devices(device))
        if vllm.__version__.startswith("0.26."):
            arguments.setdefault("async_scheduling", False)  # there, a request preempted in mid-flight may end without all of its states
        arguments |= capture_arguments(self.target, self.spec.aux_layers, allow_unknown_version=config.allow_unknown_version, owner=os.getpid())
        vllm_config = vllm_config_of(arguments, given=config.engine_args)
        check(vllm_config)
        refuse_without_states(vllm_config)
        if self.job.on_policy is not None and not self.job.on_policy.answer_workers and vllm_config.model_config.is_hybrid:
            problem = "is off for a target with recurrent layers: as vLLM answers and captures in one pass, their states went wrong (docs/engines.md)"
            raise UserError("data.on_policy.answer_workers", 0, problem, "set it to 1 or more")
        if not vllm_config.scheduler_config.enable_chunked_prefill and int(arguments["max_num_batched_tokens"]) < self.max_tokens:
            log.info("vLLM does not cut prefills of this target: steps of %d tokens, data.max_length", self.max_tokens)
            arguments["max_num_batched_tokens"] = self.max_tokens
            vllm_config = vllm_config_of(arguments, given=config.engine_args)
        # in this thread: the engine core dies with the one that started it
        self._llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=bool(arguments["disable_log_stats"]))
        self.capacity = (int(arguments["max_num_seqs"]), int(arguments["max_num_batched_tokens"]))
        return {
            "engine": "vllm",
            "versions": {"vllm": vllm.__version__, "torch": str(torch.__version__)},
            "device": device,
            "dtype": arguments["dtype"],
            "tensor_parallel_size": int(arguments.get("tensor_parallel_size", 1)),
        }

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        asked = sampling_params(sampling, ends=self.ends, kv_transfer_params=parameters)
        said: dict[str, Any] | None = None
        async for output in self._llm.generate(prompt, asked, request_id=key):
            said = output.kv_transfer_params
        return said

    def gone(self) -> bool:
        return self._llm is None or bool(self._llm.errored)

    def end(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
