"""``data.engine: sglang_remote``: an SGLang server that somebody else runs, started with our hooks (``main.py sglang_command`` prints how).

The worker here is a thin client: it sends token ids over HTTP, the hooks in the server write the records into this run's store and report to this worker. Both
store and worker must be reachable from the server. The server's secret (its TORCHSPEC_TOKEN) is in this side's TORCHSPEC_ENGINE_TOKEN.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from torchspec.engines.capture.requests import PARAMETER
from torchspec.engines.capture.server import Server, ServerClient
from torchspec.engines.engine import Sampling
from torchspec.engines.sglang.collector import PREFIX
from torchspec.engines.sglang.engine import HookedEngine
from torchspec.engines.sglang.options import MARGIN
from torchspec.engines.table import ENGINES

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class RemoteSGLangEngine(HookedEngine):
    """See the module. ``engine_args``: ``url`` of the server, ``report_host`` under which it reaches this host (left out: the address on the route to it)."""

    known_arguments = ("url", "report_host")
    name = "sglang_remote"
    _client: ServerClient | None = None

    def launch(self) -> dict[str, Any]:
        config = self.job.config
        server = Server.of(config.engine_args, example="http://HOST:30000", key_variable="SGLANG_API_KEY")
        self.token, self.report_host, self._client = server.token, server.report_host, server.client()
        facts = server.facts(
            lambda client: dict(client.get("/server_info").raise_for_status().json()),
            called="SGLang", command="sglang_command", seconds=config.start_timeout / 2,
        )  # fmt: skip
        version = str(facts.get("version", "unknown"))
        ENGINES["sglang"].check_version(version, allow_unknown=config.allow_unknown_version)
        if context := facts.get("context_length"):
            self.max_tokens = min(self.max_tokens, int(context) - MARGIN)
        if config.deterministic:  # the server runs one at a time: its hooks refuse the orders of this run otherwise
            self.capacity = (1, self.capacity[1])
        return {"engine": "sglang_remote", "versions": {"sglang": version}, "device": server.url}

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        assert not pictures and self._client is not None, "data.media: engine is refused for this engine"
        order = PREFIX + json.dumps(parameters[PARAMETER])
        # a second time it is another request to SGLang: it may be carried out twice, and a report too many is of no effect
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 0}}
        answer = await self._client.post("/generate", lambda again: body | {"rid": order + " " * again})
        finish = answer["meta_info"].get("finish_reason") or {}
        return {PARAMETER: {"error": str(finish.get("message"))}} if finish.get("type") == "abort" else None

    def gone(self) -> bool:
        return self._client is None or self._client.lost

    def end(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(client.aclose(), self._loop).result(5.0)
