"""``data.engine: vllm_remote``: a ``vllm serve`` that somebody else runs, started with our connector (``main.py vllm_command`` prints how).

The worker here is a thin client: it sends token ids over HTTP, the connector in the server writes the records into this run's store and reports to this worker.
Both store and worker must be reachable from the server. The server's secret (its TORCHSPEC_TOKEN) is in this side's TORCHSPEC_ENGINE_TOKEN.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from torchspec.engines.capture.engine import PrefillEngine
from torchspec.engines.capture.server import BadAnswer, Server, ServerClient
from torchspec.engines.engine import Sampling
from torchspec.engines.vllm.options import answer_values

if TYPE_CHECKING:
    import httpx
    from PIL.Image import Image as Picture


class RemoteVLLMEngine(PrefillEngine):
    """See the module. ``engine_args``: ``url`` of the server, ``report_host`` under which it reaches this host (left out: the address on the route to it)."""

    known_arguments = ("url", "report_host")
    _client: ServerClient | None = None
    _model = ""

    def launch(self) -> dict[str, Any]:
        config = self.job.config
        server = Server.of(config.engine_args, example="http://HOST:8000", key_variable="VLLM_API_KEY")
        self.token, self.report_host, self._client = server.token, server.report_host, server.client()
        model, version = server.facts(_model_and_version, called="vLLM", command="vllm_command", seconds=config.start_timeout / 2)
        self._model = str(model["id"])
        self.max_tokens = min(self.max_tokens, int(model.get("max_model_len") or self.max_tokens))
        if config.deterministic:  # the server runs one at a time: its connector refuses the orders of this run otherwise
            self.capacity = (1, self.capacity[1])
        return {"engine": "vllm_remote", "versions": {"vllm": version}, "device": server.url, "model": self._model}

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        assert not pictures and self._client is not None, "data.media: engine is refused for this engine"
        body = {
            "model": self._model,
            "prompt": ids,
            **answer_values(sampling, ends=self.ends),
            "kv_transfer_params": parameters,
        }
        # a second time with the same order is harmless: the connector follows it once, and a report too many is of no effect
        said = (await self._client.post("/v1/completions", lambda again: body)).get("kv_transfer_params")
        if said is None:
            raise BadAnswer("the server has no connector of ours: start it as main.py vllm_command says")
        return dict(said)

    def gone(self) -> bool:
        return self._client is None or self._client.lost

    def end(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result(5.0)


def _model_and_version(client: httpx.Client) -> tuple[dict[str, Any], str]:
    """The served model and vLLM's version."""
    models = client.get("/v1/models").raise_for_status().json()["data"]
    return models[0], str(client.get("/version").raise_for_status().json()["version"])
