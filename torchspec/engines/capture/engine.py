"""What every engine has in common whose library writes the records itself: leases become requests, the writing side's reports become results.

Each lease is a request for one token on all but the last token of its conversation (the state at the last one is never read), or, on-policy, for an answer to
its prompt. A lease is finished when its record is reported as written, which comes after the library's answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchspec.engines.arguments import check_arguments
from torchspec.engines.asynchronous import AsynchronousEngine
from torchspec.engines.capture.reports import ReportServer
from torchspec.engines.capture.requests import PARAMETER, CaptureRequest, Destination, ids_digest
from torchspec.engines.engine import EngineStats, Job, Sampling
from torchspec.engines.messages import Failed, Finished, Lease, Wrote, result_of
from torchspec.errors import UserError
from torchspec.images import BadImage, read_picture, unexpanded
from torchspec.transfer import StoreError, open_store

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)
_REPORT_WAIT = 120.0
"""Seconds for a record to be written after the answer (a full store is waited for, a minute)."""
_REMEMBERED = 65536
"""Keys of leases that were settled without a record: one that is written so many leases later stays until the run ends."""


class PrefillEngine(AsynchronousEngine[Finished]):
    """See the module.

    Args:
        job: what to run.

    Raises:
        UserError: an engine argument that TorchSpec owns.
    """

    known_arguments: tuple[str, ...] | None = None
    """Names in ``engine_args``; None for all of the library's that TorchSpec does not own."""

    owned: Mapping[str, str] = MappingProxyType({})
    """Names that are refused there, with reasons."""

    def __init__(self, job: Job) -> None:
        if self.known_arguments is None:
            check_arguments(job.config, owned=self.owned)
        elif unknown := sorted(set(job.config.engine_args) - set(self.known_arguments)):
            problem = f"is unknown to engine {type(self).__name__}"
            raise UserError(
                f"data.engines.engine_args.{unknown[0]}", job.config.engine_args[unknown[0]], problem, f"known are {', '.join(self.known_arguments)}"
            )
        super().__init__(job)
        self.spec = self.target.record_spec(job.spec.aux_layers, tokenizer=job.spec.tokenizer)
        self.token = ""
        """Proved to the connector, and by it."""
        self.report_host = "127.0.0.1"
        """Address under which the connector reaches this process."""
        self._server: ReportServer | None = None
        self._reports: dict[str, asyncio.Future[Wrote]] = {}
        self._abandoned: OrderedDict[str, None] = OrderedDict()
        self._deletions: set[asyncio.Task[None]] = set()
        self._write_s = 0.0  # of the loop's thread; the others are of the worker's
        self._run: dict[str, Any] = {}

    # -- what differs

    @abstractmethod
    def launch(self) -> dict[str, Any]:
        """Bring the library up, set ``capacity``, ``token`` and ``report_host``; returns facts for the ready message."""

    @abstractmethod
    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        """An answer to ``ids`` (with one token for each picture), with these ``kv_transfer_params``; returns those of the answer. ``key`` is unique."""

    # -- the engine's interface

    def start(self) -> dict[str, Any]:
        info = self.launch()
        self._thread.start()
        self._server = ReportServer(token=self.token, on_report=self._settle)
        port = asyncio.run_coroutine_threadsafe(self._server.start(self.report_host), self._loop).result()
        self._run = Destination(self.job.store, self.spec, (self.report_host, port), alone=self.job.config.deterministic).to_dict()
        return {**info, "num_layers": self.target.num_layers}

    def tokens_of(self, done: Finished) -> int:
        return done.rows + 1

    def stats(self) -> EngineStats:
        s = super().stats()
        return EngineStats(s.samples, s.tokens, s.busy_s, self._write_s)

    def close(self) -> None:
        self.end()
        if self._server is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(5.0)
        super().close()

    # -- in the event loop

    async def work(self, lease: Lease, ids: list[int]) -> Finished | Failed:
        report: asyncio.Future[Wrote] = self._loop.create_future()
        self._reports[lease.key] = report
        result: Finished | Failed | None = None
        try:
            result = await self._request(lease, ids, report)
            return result
        finally:
            self._reports.pop(lease.key, None)
            if not isinstance(result, Finished):
                self._abandoned[lease.key] = None
                if len(self._abandoned) > _REMEMBERED:
                    self._abandoned.popitem(last=False)

    async def _request(self, lease: Lease, ids: list[int], report: asyncio.Future[Wrote]) -> Finished | Failed:
        generate_from = lease.generate_from
        tail = ids[-1:] if len(ids) > 1 and generate_from is None else []
        given, pictures, check = ids[: len(ids) - len(tail)], [], ""
        if lease.images:
            try:
                pictures = await asyncio.to_thread(lambda: [read_picture(image) for image in lease.images])
            except BadImage as error:
                return Failed(lease.id, str(error), retry=False)
            given, check = unexpanded(given, [(image.at, image.tokens) for image in lease.images]), ids_digest(ids)
        order = CaptureRequest(key=lease.key, tail=tail, answer=generate_from is not None, ids=check, prompt=len(ids) - len(tail), run=self._run).signed(
            self.token
        )
        said = await self.ask(given, pictures, {PARAMETER: order.to_dict()}, lease.key, self.sampling(generate_from))
        answer = (said or {}).get(PARAMETER) or {}
        if "error" in answer:
            return Failed(lease.id, answer["error"])
        wrote = await self._written(report)
        self._write_s += wrote.seconds
        return result_of(lease, wrote)

    async def _written(self, report: asyncio.Future[Wrote]) -> Wrote:
        """The connector's word on a record.

        Raises:
            RuntimeError: the library ended first.
            TimeoutError: it takes too long.
        """
        deadline = time.monotonic() + _REPORT_WAIT
        while not (await asyncio.wait({report}, timeout=1.0))[0]:
            if self.gone():
                raise RuntimeError(f"{self.library} ended before the record was written")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no word of the record {_REPORT_WAIT:.0f} s after {self.library}'s answer")
        return report.result()

    def _settle(self, report: Wrote) -> None:
        """Hand a report to whom waits for it.

        A record of a lease that was settled without it is deleted: its credit is back, and nobody else would. Any other report that nobody waits for is of a
        record that is owed: a request that was sent twice (``remote.py``) may be carried out, and reported, twice.
        """
        waiting = self._reports.get(report.key)
        if waiting is not None and not waiting.done():
            waiting.set_result(report)
        elif not report.error and report.key in self._abandoned:
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
