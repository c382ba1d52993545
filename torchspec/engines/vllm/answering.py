"""Workers that only answer (``data.on_policy.answer_workers``): a vLLM of their own, with the draft in training as its speculator.

vLLM starts when the first draft is there; later ones are loaded into it, or, where that cannot be, into a vLLM that is started anew. An answer is what the
target alone would say, whatever the draft is worth: how many of its tokens are taken is the acceptance that serving will see, and is counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import torch

from torchspec.engines.arguments import check_arguments, own_devices
from torchspec.engines.asynchronous import AsynchronousEngine
from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Answered, Failed, Lease
from torchspec.engines.table import ANSWERER, ENGINES
from torchspec.engines.vllm.draft_weights import EXTENSION
from torchspec.engines.vllm.options import (
    ANSWERS,
    model_arguments,
    refuse_random_on_cpu,
    sampling_params,
    set_environment,
    vllm_config_of,
)

log = logging.getLogger(__name__)
_LOADS = 120.0
"""Seconds for new weights."""


class AnsweringEngine(AsynchronousEngine[Answered]):
    """See the module.

    Args:
        job: what to run; its ``on_policy`` says how.

    Raises:
        UserError: an engine argument that TorchSpec owns.
    """

    def __init__(self, job: Job) -> None:
        assert job.on_policy is not None
        check_arguments(job.config, field="data.on_policy.answer_args", owned=ANSWERS)
        super().__init__(job)
        self.spec = job.spec
        self.policy = job.on_policy
        self._llm: Any = None
        self._ends = False
        """The vLLM that runs takes no more: another one follows it."""

    def start(self) -> dict[str, Any]:
        refuse_random_on_cpu(self.policy.temperature, device=self.job.device, field="data.on_policy.temperature")
        set_environment(self.job.config, device=self.job.device)
        import vllm

        ENGINES[ANSWERER].check_version(vllm.__version__, allow_unknown=self.job.config.allow_unknown_version)
        self._thread.start()
        versions = {"vllm": vllm.__version__, "torch": str(torch.__version__)}
        return {"engine": "vllm, answers alone", "versions": versions, "device": self.job.device, "num_layers": self.target.num_layers}

    def room(self) -> tuple[int, int]:
        return super().room() if self._llm is not None and not self._ends else (0, 0)

    def take_draft(self, path: str, step: int, speculative: Mapping[str, Any]) -> bool:
        if self._llm is not None and not self._ends:
            problem = self._reload(path)
            if not problem:
                log.info("speculates with the draft of step %d", step)
                return True
            log.info("the draft of step %d goes into a new vLLM: %s", step, problem)
            self._ends = True
        if self._held:  # answers of the old one, which are reported as they come
            return False
        self.end()
        self._launch(speculative)
        self._ends = False
        log.info("vLLM is up with the draft of step %d", step)
        return True

    def _reload(self, path: str) -> str:
        """Weights into the running vLLM; why not, or ""."""
        said = asyncio.run_coroutine_threadsafe(self._llm.collective_rpc("take_draft", args=(path,)), self._loop).result(_LOADS)
        return next((str(problem) for problem in said if problem), "")

    def _launch(self, speculative: Mapping[str, Any]) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        config, device = self.job.config, self.job.device
        arguments = model_arguments(self.target, config, max_length=self.max_tokens, device=device)
        if device != "cpu":
            arguments.setdefault("tensor_parallel_size", own_devices(device))
        arguments |= {
            "speculative_config": dict(speculative),
            "worker_extension_cls": EXTENSION,
            "disable_log_stats": False,  # they count drafts
        }
        self._llm = AsyncLLM.from_vllm_config(vllm_config_of(arguments, given=config.engine_args, field="data.on_policy.answer_args"))
        self.capacity = (int(arguments["max_num_seqs"]), int(arguments["max_num_batched_tokens"]))

    async def work(self, lease: Lease, ids: list[int]) -> Answered | Failed:
        asked = sampling_params(self.sampling(lease.generate_from), ends=self.ends)
        said: Any = None
        async for output in self._llm.generate({"prompt_token_ids": ids}, asked, request_id=str(lease.id)):
            said = output.outputs[0]
        if said is None or said.finish_reason not in ("stop", "length") or not said.token_ids:
            return Failed(lease.id, f"vLLM ended the answer early ({None if said is None else said.finish_reason})")
        whole = torch.tensor([*ids, *said.token_ids], dtype=torch.int32)
        return Answered(lease.id, whole.numpy().astype("<i4").tobytes())

    def tokens_of(self, done: Answered) -> int:
        return len(done.ids) // 4

    def stats(self) -> EngineStats:
        s = super().stats()
        if self._llm is None:
            return s
        from vllm.v1.metrics.reader import get_metrics_snapshot

        counters = {metric.name: getattr(metric, "value", 0) for metric in get_metrics_snapshot()}
        drafts, accepted = (int(counters.get(f"vllm:spec_decode_num_{what}", 0)) for what in ("drafts", "accepted_tokens"))
        return EngineStats(s.samples, s.tokens, s.busy_s, 0.0, drafts=drafts, accepted=accepted)

    def gone(self) -> bool:
        return self._llm is None or bool(self._llm.errored)

    def end(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
