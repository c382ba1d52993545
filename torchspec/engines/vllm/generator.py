"""Answers by the target with vLLM: all prompts are given at once, and vLLM keeps its batch full."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torchspec.engines.arguments import check_arguments
from torchspec.engines.engine import Answer, EngineConfig, Sampling
from torchspec.engines.vllm.options import GENERATES, model_arguments, sampling_params, set_environment
from torchspec.engines.vllm.refusals import refusals
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig


class VLLMGenerator:
    """See the module.

    Args:
        config: the target.
        batch_size: answers generated at once, at most.
        device: auto, cpu or cuda.
        engine_args: of vLLM, passed on.

    Raises:
        UserError: an argument that TorchSpec owns, a device that this vLLM is not built for, or what vLLM itself refuses.
    """

    def __init__(self, config: TargetConfig, *, batch_size: int = 256, device: str = "auto", engine_args: dict[str, Any] | None = None) -> None:
        self.target = Target(config)
        engines = EngineConfig(batch_samples=batch_size, batch_tokens=max(8192, batch_size), engine_args=engine_args or {})
        check_arguments(engines, field="engine_args", owned=GENERATES)
        set_environment(engines, device=device)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: it ends with us
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        built_for = "cpu" if current_platform.is_cpu() else "cuda"
        if device != "auto" and device.split(":")[0] != built_for:
            raise UserError("device", device, f"is not what this vLLM is built for ({built_for})", "set device to auto")
        set_environment(engines, device=built_for)
        arguments = model_arguments(self.target, engines, max_length=None, device=built_for)
        with refusals(engines.engine_args, field="engine_args", engine=("engine", "vllm")):
            self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._longest = int(self._engine.model_config.max_model_len)
        self._ends = self.target.end_ids()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        """Answers in the order they finish. A prompt that leaves no room for a token gets an empty one, finish ``length``."""
        for i, prompt in enumerate(prompts):
            room = self._longest - len(prompt)
            if room < 1:
                yield Answer(i, [], "length")
                continue
            its_own = replace(sampling, seed=sampling.seed + i, max_new_tokens=min(sampling.max_new_tokens, room))
            parameters = sampling_params(its_own, ends=self._ends)
            self._engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, parameters)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    answer = output.outputs[0]
                    yield Answer(int(output.request_id), list(answer.token_ids), "stop" if answer.finish_reason == "stop" else "length")

    def close(self) -> None:
        """Free the model. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
