"""``data.engine: vllm_remote``: a ``vllm serve`` that somebody else runs, started with our connector (``main.py vllm_command`` prints how).

The worker here is a thin client: it sends token ids over HTTP, the connector in the server writes the records into this run's store and reports to this worker.
Both store and worker must be reachable from the server. The server's secret (its TORCHSPEC_TOKEN) is in this side's TORCHSPEC_ENGINE_TOKEN.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from torchspec.engines.capture.engine import PrefillEngine
from torchspec.engines.capture.server import SERVER_TOKEN_VARIABLE, http_options
from torchspec.engines.engine import Sampling
from torchspec.engines.vllm.options import answer_values
from torchspec.errors import UserError
from torchspec.network import bare, check_url, route_to
from torchspec.proxies import around, through

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)
_ANSWERS = 600.0
"""Seconds for one request."""
_HEALTH = 10.0
"""Seconds for a server to say that it is well."""


class BadAnswer(Exception):
    """The server refused a request."""


class RemoteVLLMEngine(PrefillEngine):
    """See the module. ``engine_args``: ``url`` of the server, ``report_host`` under which it reaches this host (left out: the address on the route to it)."""

    known_arguments = ("url", "report_host")
    _client: Any = None
    _lost = False
    _model = ""

    def launch(self) -> dict[str, Any]:
        import httpx

        arguments = self.job.config.engine_args
        url = str(arguments.get("url", ""))
        parts = check_url(url, field="data.engines.engine_args.url", example="http://HOST:8000")
        self.token = os.environ.get(SERVER_TOKEN_VARIABLE, "")
        if not self.token:
            raise UserError(SERVER_TOKEN_VARIABLE, None, "is not set", "export the secret that the server was started with (its TORCHSPEC_TOKEN)")
        self.report_host = bare(str(arguments.get("report_host") or "")) or str(route_to(str(parts.hostname), parts.port or 80))
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)  # the server closes after 5
        self._client = httpx.AsyncClient(base_url=url, timeout=_ANSWERS, limits=limits, headers=headers, **http_options(url))
        model, version = self._facts(url, headers)
        self._model = str(model["id"])
        self.max_tokens = min(self.max_tokens, int(model.get("max_model_len") or self.max_tokens))
        if self.job.config.deterministic:  # the server runs one at a time: its connector refuses the orders of this run otherwise
            self.capacity = (1, self.capacity[1])
        return {"engine": "vllm_remote", "versions": {"vllm": version}, "device": url, "model": self._model}

    def _facts(self, url: str, headers: dict[str, str]) -> tuple[dict[str, Any], str]:
        """The served model and vLLM's version; waits for a server that is still loading.

        Raises:
            UserError: it does not answer in time.
        """
        import httpx

        deadline = time.monotonic() + self.job.config.start_timeout / 2
        while True:
            try:
                with httpx.Client(base_url=url, timeout=10.0, headers=headers, **http_options(url)) as client:
                    models = client.get("/v1/models").raise_for_status().json()["data"]
                    return models[0], str(client.get("/version").raise_for_status().json()["version"])
            except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
                if time.monotonic() > deadline or (isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403)):
                    raise UserError(
                        "data.engines.engine_args.url",
                        url,
                        f"does not answer as vLLM does{through(url)} ({error})",
                        f"start it: main.py vllm_command{around(url)}",
                    ) from error
                time.sleep(2.0)

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        import httpx

        assert not pictures, "data.media: engine is refused for this engine"

        body = {
            "model": self._model,
            "prompt": ids,
            **answer_values(sampling, ends=self.ends),
            "kv_transfer_params": parameters,
        }
        for last in (False, True):
            try:  # a second time with the same order is harmless: the connector follows it once, and a report too many is of no effect
                answer = await self._client.post("/v1/completions", json=body)
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
        said = answer.json().get("kv_transfer_params")
        if said is None:
            raise BadAnswer("the server has no connector of ours: start it as main.py vllm_command says")
        return dict(said)

    async def _healthy(self) -> bool:
        """Whether the server says that its engine runs."""
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
