"""``data.engine: sglang_remote``: an SGLang server that somebody else runs, started with our hooks (``main.py sglang_command`` prints how).

The worker here is a thin client: it sends token ids over HTTP, the hooks in the server write the records into this run's store and report to this worker. Both
store and worker must be reachable from the server. The server's secret (its TORCHSPEC_TOKEN) is in this side's TORCHSPEC_ENGINE_TOKEN.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

from torchspec.engines.capture.requests import PARAMETER
from torchspec.engines.capture.server import SERVER_TOKEN_VARIABLE, http_options
from torchspec.engines.engine import Sampling
from torchspec.engines.sglang.collector import PREFIX
from torchspec.engines.sglang.engine import HookedEngine
from torchspec.engines.sglang.options import MARGIN
from torchspec.engines.table import ENGINES
from torchspec.errors import UserError
from torchspec.network import bare, check_url, route_to
from torchspec.proxies import around, through

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_ANSWERS = 600.0
"""Seconds for one request."""
_HEALTH = 10.0
"""Seconds for a server to say that it is well."""


class BadAnswer(Exception):
    """The server refused a request."""


class RemoteSGLangEngine(HookedEngine):
    """See the module. ``engine_args``: ``url`` of the server, ``report_host`` under which it reaches this host (left out: the address on the route to it)."""

    known_arguments = ("url", "report_host")
    name = "sglang_remote"
    _client: Any = None
    _lost = False

    def launch(self) -> dict[str, Any]:
        import httpx

        config = self.job.config
        url = str(config.engine_args.get("url", ""))
        parts = check_url(url, field="data.engines.engine_args.url", example="http://HOST:30000")
        self.token = os.environ.get(SERVER_TOKEN_VARIABLE, "")
        if not self.token:
            raise UserError(SERVER_TOKEN_VARIABLE, None, "is not set", "export the secret that the server was started with (its TORCHSPEC_TOKEN)")
        self.report_host = bare(str(config.engine_args.get("report_host") or "")) or str(route_to(str(parts.hostname), parts.port or 80))
        key = os.environ.get("SGLANG_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._client = httpx.AsyncClient(base_url=url, timeout=_ANSWERS, limits=limits, headers=headers, **http_options(url))
        facts = self._facts(url, headers)
        version = str(facts.get("version", "unknown"))
        ENGINES["sglang"].check_version(version, allow_unknown=config.allow_unknown_version)
        if context := facts.get("context_length"):
            self.max_tokens = min(self.max_tokens, int(context) - MARGIN)
        if config.deterministic:  # the server runs one at a time: its hooks refuse the orders of this run otherwise
            self.capacity = (1, self.capacity[1])
        return {"engine": "sglang_remote", "versions": {"sglang": version}, "device": url}

    def _facts(self, url: str, headers: dict[str, str]) -> dict[str, Any]:
        """What the server says of itself; waits for one that is still loading.

        Raises:
            UserError: it does not answer in time.
        """
        import httpx

        deadline = time.monotonic() + self.job.config.start_timeout / 2
        while True:
            try:
                with httpx.Client(base_url=url, timeout=10.0, headers=headers, **http_options(url)) as client:
                    return dict(client.get("/server_info").raise_for_status().json())
            except (httpx.HTTPError, ValueError, TypeError) as error:
                if time.monotonic() > deadline or (isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403)):
                    problem = f"does not answer as SGLang does{through(url)} ({error})"
                    raise UserError("data.engines.engine_args.url", url, problem, f"start it: main.py sglang_command{around(url)}") from error
                time.sleep(2.0)

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        import httpx

        assert not pictures, "data.media: engine is refused for this engine"
        order = PREFIX + json.dumps(parameters[PARAMETER])
        for last in (False, True):
            # a second time it is another request to SGLang: it may be carried out twice, and a report too many is of no effect
            body = {"input_ids": ids, "rid": order + " " * last, "sampling_params": {"temperature": 0, "max_new_tokens": 0}}
            try:
                answer = await self._client.post("/generate", json=body)
            except httpx.TransportError as error:
                reason = type(error).__name__
            else:
                if answer.status_code < 500 or (last and await self._healthy()):
                    break  # a healthy server that cannot answer: this request's fault, and no other's
                reason = f"answers {answer.status_code}: {answer.text[:200]}"
            if last:
                self._lost = True
                raise ConnectionError(f"the server at {self._client.base_url} is gone{through(str(self._client.base_url))} ({reason})")
            await asyncio.sleep(1.0)
        if answer.status_code != 200:
            raise BadAnswer(f"the server answered {answer.status_code}: {answer.text[:300]}")
        finish = answer.json()["meta_info"].get("finish_reason") or {}
        return {PARAMETER: {"error": str(finish.get("message"))}} if finish.get("type") == "abort" else None

    async def _healthy(self) -> bool:
        """Whether the server says that it is well."""
        import httpx

        try:
            answer: httpx.Response = await self._client.get("/health", timeout=_HEALTH)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def gone(self) -> bool:
        return self._lost or self._client is None

    def end(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result(5.0)
