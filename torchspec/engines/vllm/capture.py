"""What every engine made of vLLM has in common: leases become requests, the connector's reports become results.

Each lease is a request for one token on all but the last token of its conversation (the state at the last one is never read). An event loop in a thread feeds
vLLM and takes its answers. A lease is finished when the connector reports its record as written, which comes after vLLM's answer. When vLLM is gone this
worker ends: the supervisor starts another, and the leases go with it, not as failures of their samples.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease
from torchspec.engines.record_writer import one_line
from torchspec.engines.vllm.options import check_arguments
from torchspec.engines.vllm.orders import PARAMETER, Destination, Order, Wrote, prove
from torchspec.engines.vllm.reports import ReportServer
from torchspec.errors import UserError
from torchspec.target import Target
from torchspec.transfer import StoreError, open_store

log = logging.getLogger(__name__)
_REPORT_WAIT = 120.0
"""Seconds for a record to be written after vLLM answered (a full store is waited for, a minute)."""
_AHEAD = 2
"""Times what vLLM runs at once that is asked for, so that its batch stays full."""


class CapturingEngine(ABC):
    """See the module.

    Args:
        job: what to run.

    Raises:
        UserError: an engine argument that TorchSpec owns.
    """

    known_arguments: tuple[str, ...] | None = None
    """Names in ``engine_args``; None for all of vLLM's that TorchSpec does not own."""

    def __init__(self, job: Job) -> None:
        if self.known_arguments is None:
            check_arguments(job.config)
        elif unknown := sorted(set(job.config.engine_args) - set(self.known_arguments)):
            problem = f"is unknown to engine {type(self).__name__}"
            raise UserError(
                f"data.engines.engine_args.{unknown[0]}", job.config.engine_args[unknown[0]], problem, f"known are {', '.join(self.known_arguments)}"
            )
        self.job = job
        self.target = Target(job.target)
        limit = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**31)
        self.max_tokens = min(max(job.max_length, 2), limit)
        self.spec = self.target.record_spec(job.spec.aux_layers, tokenizer=job.spec.tokenizer)
        self.capacity = (job.config.batch_samples, job.config.batch_tokens)
        """Samples and tokens that vLLM runs at once."""
        self.token = ""
        """Shown to the connector, and by it."""
        self.report_host = "127.0.0.1"
        """Address under which the connector reaches this process."""
        self._server: ReportServer | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-requests", daemon=True)
        self._results: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()
        self._reports: dict[str, asyncio.Future[Wrote]] = {}
        self._held: dict[int, int] = {}  # tokens of each lease in flight
        self._running: set[Future[None]] = set()  # the loop alone would let go of them
        self._deletions: set[asyncio.Task[None]] = set()
        self._fatal: BaseException | None = None
        self._samples = self._tokens = 0
        self._busy_s = 0.0
        self._write_s = 0.0  # of the loop's thread; the others are of the worker's
        self._busy_since = 0.0
        self._run: dict[str, Any] = {}

    # -- what differs

    @abstractmethod
    def launch(self) -> dict[str, Any]:
        """Bring vLLM up, set ``capacity``, ``token`` and ``report_host``; returns facts for the ready message."""

    @abstractmethod
    async def ask(self, ids: list[int], parameters: dict[str, Any], key: str) -> dict[str, Any] | None:
        """One token after ``ids``, with these ``kv_transfer_params``; returns those of the answer. ``key`` is unique."""

    @abstractmethod
    def gone(self) -> bool:
        """Whether vLLM cannot serve any more."""

    @abstractmethod
    def end(self) -> None:
        """Let go of vLLM. Idempotent."""

    # -- the engine's interface

    def start(self) -> dict[str, Any]:
        info = self.launch()
        self._thread.start()
        self._server = ReportServer(token=self.token, on_report=self._settle)
        port = asyncio.run_coroutine_threadsafe(self._server.start(self.report_host), self._loop).result()
        self._run = Destination(self.job.store, self.spec, (self.report_host, port)).to_dict()
        return {**info, "num_layers": self.target.num_layers}

    def room(self) -> tuple[int, int]:
        samples, tokens = self.capacity
        return max(_AHEAD * samples - len(self._held), 0), max(_AHEAD * tokens - sum(self._held.values()), 0)

    def submit(self, leases: Sequence[Lease]) -> None:
        if not self._held:
            self._busy_since = time.monotonic()
        for lease in leases:
            self._held[lease.id] = len(lease.ids) // 4
            self._running.add(running := asyncio.run_coroutine_threadsafe(self._capture(lease), self._loop))
            running.add_done_callback(self._running.discard)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        return []  # all of them have started; what a revoked lease writes is deleted by the coordinator

    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        results: list[Finished | Failed] = []
        try:
            results.append(self._results.get(timeout=timeout) if timeout > 0 else self._results.get_nowait())
            while True:
                results.append(self._results.get_nowait())
        except queue.Empty:
            pass
        if self._fatal is not None and not results:
            raise RuntimeError(f"vLLM ended: {one_line(self._fatal)}") from self._fatal
        for result in results:
            self._samples += 1
            self._tokens += self._held.pop(result.lease)
        if results and not self._held:
            self._busy_s += time.monotonic() - self._busy_since
        return [r for r in results if isinstance(r, Finished)], [r for r in results if isinstance(r, Failed)]

    def stats(self) -> EngineStats:
        running = time.monotonic() - self._busy_since if self._held else 0.0
        return EngineStats(self._samples, self._tokens, self._busy_s + running, self._write_s)

    def close(self) -> None:
        self.end()
        if not self._thread.is_alive():
            return
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    # -- in the event loop

    async def _capture(self, lease: Lease) -> None:
        """One lease, from request to result."""
        report: asyncio.Future[Wrote] = self._loop.create_future()
        self._reports[lease.key] = report
        try:
            result = await self._request(lease, report)
        except Exception as error:  # of vLLM, whatever it is
            if self.gone():
                self._fatal = error
                return  # not this sample's fault: the lease goes back with the worker
            result = Failed(lease.id, one_line(error))
        finally:
            self._reports.pop(lease.key, None)
        self._results.put(result)

    async def _request(self, lease: Lease, report: asyncio.Future[Wrote]) -> Finished | Failed:
        ids = torch.frombuffer(bytearray(lease.ids), dtype=torch.int32).tolist() if lease.ids else []
        if not 0 < len(ids) <= self.max_tokens:
            return Failed(lease.id, f"{len(ids)} tokens; vLLM takes 1 to {self.max_tokens} here", retry=False)
        if min(ids) < 0 or max(ids) >= self.target.vocab_size:
            return Failed(lease.id, f"token ids {min(ids)} to {max(ids)}; the target's vocabulary has {self.target.vocab_size}", retry=False)
        tail = ids[-1:] if len(ids) > 1 else []
        order = Order(key=lease.key, tail=tail, run=self._run, proof=prove(self.token, lease.key))
        said = await self.ask(ids[: len(ids) - len(tail)], {PARAMETER: order.to_dict()}, lease.key)
        answer = (said or {}).get(PARAMETER) or {}
        if "error" in answer:
            return Failed(lease.id, answer["error"])
        wrote = await self._written(report)
        self._write_s += wrote.seconds
        return Failed(lease.id, wrote.error) if wrote.error else Finished(lease.id, wrote.nbytes, wrote.rows)

    async def _written(self, report: asyncio.Future[Wrote]) -> Wrote:
        """The connector's word on a record.

        Raises:
            RuntimeError: vLLM ended first.
            TimeoutError: it takes too long.
        """
        deadline = time.monotonic() + _REPORT_WAIT
        while not (await asyncio.wait({report}, timeout=1.0))[0]:
            if self.gone():
                raise RuntimeError("vLLM ended before the record was written")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no word of the record {_REPORT_WAIT:.0f} s after vLLM's answer")
        return report.result()

    def _settle(self, report: Wrote) -> None:
        """Hand a report to whom waits for it."""
        waiting = self._reports.get(report.key)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)
        elif not report.error:  # its lease was settled without it, and its credit is back: nobody else would delete it
            self._deletions.add(task := asyncio.create_task(asyncio.to_thread(self._delete, report.key)))
            task.add_done_callback(self._deletions.discard)

    def _delete(self, key: str) -> None:
        """Delete a late record."""
        try:
            store = open_store(self.job.store)
            store.delete([key])
            store.close()
            log.info("late record %s deleted", key)
        except (StoreError, UserError) as error:
            log.warning("late record %s was not deleted: %s", key, error)
