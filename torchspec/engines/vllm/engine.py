"""The target run by vLLM, stock: requests are in flight all the time, and the connector inside vLLM writes the records.

Each lease is a request for one token on all but the last token of its conversation (the state at the last one is never read). vLLM's engine core is a process
of its own; an event loop in a thread here feeds it and takes its answers. A lease is finished when the connector reports its record as written, which comes
after vLLM's answer. An engine core that dies takes this worker along: the supervisor starts another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease
from torchspec.engines.record_writer import one_line
from torchspec.engines.vllm.options import (
    capture_arguments,
    check_arguments,
    check_version,
    model_arguments,
    refuse_without_states,
    set_environment,
    vllm_config_of,
)
from torchspec.engines.vllm.orders import PARAMETER, TOKEN_VARIABLE, Destination, Order, Wrote
from torchspec.engines.vllm.sink import ReportListener
from torchspec.target import Target
from torchspec.transfer.record import RecordSpec

log = logging.getLogger(__name__)
_REPORT_WAIT = 120.0
"""Seconds for a record to be written after vLLM answered (a full store is waited for, a minute)."""
_AHEAD = 2
"""Times what vLLM runs at once that is asked for, so that its batch stays full."""


class VLLMEngine:
    """See the module.

    Args:
        job: what to run.

    Raises:
        UserError: an engine argument that TorchSpec owns.
    """

    def __init__(self, job: Job) -> None:
        check_arguments(job.config)
        self.job = job
        self.target = Target(job.target)
        limit = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**31)
        self.max_tokens = min(max(job.max_length, 2), limit)
        self.spec = RecordSpec(
            target=self.target.fingerprint,
            tokenizer=job.spec.tokenizer,
            aux_layers=job.spec.aux_layers,
            hidden_size=self.target.hidden_size,
            dtype=str(self.target.dtype).removeprefix("torch."),
        )
        self._llm: Any = None
        self._listener: ReportListener | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-requests", daemon=True)
        self._results: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()
        self._reports: dict[str, asyncio.Future[Wrote]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._held: dict[int, int] = {}  # tokens of each lease in flight
        self._fatal: BaseException | None = None
        self._stats = EngineStats(0, 0, 0.0, 0.0)
        self._busy_since = 0.0
        self._run: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        config = self.job.config
        set_environment(config, device=self.job.device)
        import vllm
        from vllm.v1.engine.async_llm import AsyncLLM

        check_version(vllm.__version__, allow_unknown=config.allow_unknown_version)
        token = os.environ.setdefault(TOKEN_VARIABLE, os.urandom(16).hex())
        self._listener = ReportListener("127.0.0.1", token=token, on_report=self._on_report)
        self._run = Destination(self.job.store, self.spec, ("127.0.0.1", self._listener.port)).to_dict()
        arguments = model_arguments(self.target, config, max_length=self.max_tokens, device=self.job.device)
        if self.job.device != "cpu":
            arguments.setdefault("tensor_parallel_size", torch.cuda.device_count())
        arguments |= capture_arguments(self.target, self.spec.aux_layers, config)
        vllm_config = vllm_config_of(arguments)
        refuse_without_states(vllm_config)
        if not vllm_config.scheduler_config.enable_chunked_prefill and int(arguments["max_num_batched_tokens"]) < self.max_tokens:
            log.info("vLLM does not cut prefills of this target: steps of %d tokens, data.max_length", self.max_tokens)
            arguments["max_num_batched_tokens"] = self.max_tokens
            vllm_config = vllm_config_of(arguments)
        self._llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True)  # in this thread: the engine core dies with the one that started it
        self._capacity = (int(arguments["max_num_seqs"]), int(arguments["max_num_batched_tokens"]))
        self._thread.start()
        return {
            "engine": "vllm",
            "versions": {"vllm": vllm.__version__, "torch": str(torch.__version__)},
            "device": self.job.device,
            "num_layers": self.target.num_layers,
            "dtype": arguments["dtype"],
            "tensor_parallel_size": int(arguments.get("tensor_parallel_size", 1)),
        }

    def room(self) -> tuple[int, int]:
        samples, tokens = self._capacity
        return max(_AHEAD * samples - len(self._held), 0), max(_AHEAD * tokens - sum(self._held.values()), 0)

    def submit(self, leases: Sequence[Lease]) -> None:
        if not self._held:
            self._busy_since = time.monotonic()
        for lease in leases:
            self._held[lease.id] = len(lease.ids) // 4
            asyncio.run_coroutine_threadsafe(self._begin(lease), self._loop)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        return []  # all of them have started; what a revoked lease writes is deleted by the coordinator

    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        finished: list[Finished] = []
        failed: list[Failed] = []
        wait = timeout
        while True:
            try:
                result = self._results.get(timeout=wait) if wait > 0 else self._results.get_nowait()
            except queue.Empty:
                break
            wait = 0.0
            self._take(result)
            (finished if isinstance(result, Finished) else failed).append(result)  # type: ignore[arg-type]
        if self._fatal is not None and not finished and not failed:
            raise RuntimeError(f"vLLM ended: {one_line(self._fatal)}") from self._fatal
        return finished, failed

    def stats(self) -> EngineStats:
        s = self._stats
        running = time.monotonic() - self._busy_since if self._held else 0.0
        return EngineStats(s.samples, s.tokens, s.busy_s + running, s.write_s)

    def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            llm.shutdown()
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(5.0)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _take(self, result: Finished | Failed) -> None:
        """Count a result."""
        tokens = self._held.pop(result.lease)
        s = self._stats
        now = time.monotonic()
        busy = 0.0 if self._held else now - self._busy_since
        self._stats = EngineStats(s.samples + 1, s.tokens + tokens, s.busy_s + busy, s.write_s)

    # -- in the event loop

    async def _begin(self, lease: Lease) -> None:
        self._tasks[lease.id] = asyncio.create_task(self._capture(lease))

    async def _capture(self, lease: Lease) -> None:
        """One lease, from request to result."""
        report: asyncio.Future[Wrote] = self._loop.create_future()
        self._reports[lease.key] = report
        try:
            result = await self._request(lease, report)
        except Exception as error:  # of vLLM, whatever it is
            if self._llm is None or self._llm.errored:
                self._fatal = error
                return  # not this sample's fault: the lease goes back with the worker
            result = Failed(lease.id, one_line(error))
        finally:
            self._reports.pop(lease.key, None)
            self._tasks.pop(lease.id, None)
        self._results.put(result)

    async def _request(self, lease: Lease, report: asyncio.Future[Wrote]) -> Finished | Failed:
        from vllm import SamplingParams

        ids = torch.frombuffer(bytearray(lease.ids), dtype=torch.int32).tolist() if lease.ids else []
        if not 0 < len(ids) <= self.max_tokens:
            return Failed(lease.id, f"{len(ids)} tokens; vLLM takes 1 to {self.max_tokens} here", retry=False)
        if min(ids) < 0 or max(ids) >= self.target.vocab_size:
            return Failed(lease.id, f"token ids {min(ids)} to {max(ids)}; the target's vocabulary has {self.target.vocab_size}", retry=False)
        tail = ids[-1:] if len(ids) > 1 else []
        order = Order(key=lease.key, tail=tail, run=self._run, token=os.environ[TOKEN_VARIABLE])
        sampling = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args={"kv_transfer_params": {PARAMETER: order.to_dict()}})
        said: Any = None
        async for output in self._llm.generate({"prompt_token_ids": ids[: len(ids) - len(tail)]}, sampling, request_id=lease.key):
            said = output.kv_transfer_params
        answer = (said or {}).get(PARAMETER) or {}
        if "error" in answer:
            return Failed(lease.id, answer["error"])
        wrote = await self._written(report)
        s = self._stats
        self._stats = EngineStats(s.samples, s.tokens, s.busy_s, s.write_s + wrote.seconds)
        return Failed(lease.id, wrote.error) if wrote.error else Finished(lease.id, wrote.nbytes, wrote.rows)

    async def _written(self, report: asyncio.Future[Wrote]) -> Wrote:
        """The connector's word on a record.

        Raises:
            RuntimeError: vLLM ended first.
            TimeoutError: it takes too long.
        """
        deadline = time.monotonic() + _REPORT_WAIT
        while not (await asyncio.wait({report}, timeout=1.0))[0]:
            if self._llm is None or self._llm.errored:
                raise RuntimeError("vLLM ended before the record was written")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no word of the record {_REPORT_WAIT:.0f} s after vLLM's answer")
        return report.result()

    # -- in threads of the listener

    def _on_report(self, report: Wrote) -> None:
        self._loop.call_soon_threadsafe(self._settle, report)

    def _settle(self, report: Wrote) -> None:
        waiting = self._reports.get(report.key)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)
