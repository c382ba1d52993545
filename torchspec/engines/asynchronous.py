"""What engines that ask a library of their own processes (vLLM, SGLang) have in common: leases become requests in an event loop, and requests become results.

When the library is gone this worker ends: the supervisor starts another, and the leases go with it, not as failures of their samples.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

from torchspec.engines.engine import EngineStats, Job, Sampling
from torchspec.engines.messages import Answered, Failed, Finished, Lease, PartialAnswer
from torchspec.engines.record_writer import one_line
from torchspec.target import Target

_AHEAD = 2
"""Times what the library runs at once that is asked for, so that its batch stays full."""
Done = TypeVar("Done", Finished, Answered)


class AsynchronousEngine(ABC, Generic[Done]):
    """See the module.

    Args:
        job: what to run.
    """

    library: str = "vLLM"
    """That runs the target, as users are told."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.target = Target(job.target)
        limit = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**31)
        self.max_tokens = min(max(job.max_length, 2), limit)
        self.capacity = (job.config.batch_samples, job.config.batch_tokens)
        """Samples and tokens that the library runs at once."""
        self.ends = self.target.end_ids() if job.on_policy is not None else []
        """Token ids that end an answer."""
        self._loop = asyncio.SelectorEventLoop()  # SGLang makes uvloop the default, whose transports are none of asyncio's
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-requests", daemon=True)
        self._results: queue.SimpleQueue[Done | Failed] = queue.SimpleQueue()
        self._held: dict[int, int] = {}  # tokens of each lease in flight, at most
        self._running: set[Future[None]] = set()  # the loop alone would let go of them
        self._fatal: BaseException | None = None
        self._samples = self._tokens = 0
        self._busy_s = 0.0
        self._busy_since = 0.0

    # -- what differs

    @abstractmethod
    async def work(self, lease: Lease, ids: list[int]) -> Done | Failed:
        """One lease; ``ids`` are its token ids, which the library takes."""

    @abstractmethod
    def tokens_of(self, done: Done) -> int:
        """Tokens of a conversation, as far as the result tells."""

    @abstractmethod
    def gone(self) -> bool:
        """Whether the library cannot serve any more."""

    @abstractmethod
    def end(self) -> None:
        """Let go of the library. Idempotent."""

    # -- the engine's interface

    def room(self) -> tuple[int, int]:
        samples, tokens = self.capacity
        return max(_AHEAD * samples - len(self._held), 0), max(_AHEAD * tokens - sum(self._held.values()), 0)

    def submit(self, leases: Sequence[Lease]) -> None:
        if not self._held:
            self._busy_since = time.monotonic()
        for lease in leases:
            self._held[lease.id] = len(lease.ids) // 4 + (lease.generate_from.new_tokens if lease.generate_from is not None else 0)
            self._running.add(running := asyncio.run_coroutine_threadsafe(self._one(lease), self._loop))
            running.add_done_callback(self._running.discard)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        return []  # all of them have started; what a revoked lease writes is deleted by the coordinator

    def poll(self, timeout: float) -> tuple[list[Done], list[Failed]]:
        done: list[Done] = []
        failed: list[Failed] = []
        try:
            result = self._results.get(timeout=timeout) if timeout > 0 else self._results.get_nowait()
            while True:
                held = self._held.pop(result.lease)
                self._samples += 1
                if isinstance(result, Failed):
                    failed.append(result)
                    self._tokens += held
                else:
                    done.append(result)
                    self._tokens += min(held, self.tokens_of(result))
                result = self._results.get_nowait()
        except queue.Empty:
            pass
        if self._fatal is not None and not done and not failed:
            raise RuntimeError(f"{self.library} ended: {one_line(self._fatal)}") from self._fatal
        if (done or failed) and not self._held:
            self._busy_s += time.monotonic() - self._busy_since
        return done, failed

    def stats(self) -> EngineStats:
        running = time.monotonic() - self._busy_since if self._held else 0.0
        return EngineStats(self._samples, self._tokens, self._busy_s + running, 0.0)

    def close(self) -> None:
        """Idempotent."""
        self.end()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)

    # -- in the event loop

    async def _one(self, lease: Lease) -> None:
        """One lease, from request to result."""
        result: Done | Failed
        try:
            ids = torch.frombuffer(bytearray(lease.ids), dtype=torch.int32).tolist() if lease.ids else []
            problem = self._refusal(lease, ids)
            result = Failed(lease.id, problem, retry=False) if problem else await self.work(lease, ids)
        except Exception as error:  # of the library, whatever it is
            if self.gone():
                self._fatal = error
                return  # not this sample's fault: the lease goes back with the worker
            result = Failed(lease.id, one_line(error))
        self._results.put(result)

    def _refusal(self, lease: Lease, ids: list[int]) -> str:
        """Why the library would not take a lease; "" when it does."""
        total = len(ids) + (lease.generate_from.new_tokens if lease.generate_from is not None else 0)
        if not 0 < len(ids) <= total <= self.max_tokens:
            return f"{total} tokens; {self.library} takes 1 to {self.max_tokens} here"
        if min(ids) < 0 or max(ids) >= self.target.vocab_size:
            return f"token ids {min(ids)} to {max(ids)}; the target's vocabulary has {self.target.vocab_size}"
        return ""

    def sampling(self, generate_from: PartialAnswer | None) -> Sampling:
        """How to answer a prompt; a whole conversation gets one token."""
        policy = self.job.on_policy
        if generate_from is None or policy is None:
            return Sampling(max_new_tokens=1)
        return Sampling(generate_from.new_tokens, temperature=policy.temperature, top_p=policy.top_p, seed=generate_from.seed)
