"""What engine vllm_remote makes of a server's answers, and what it asks for. The test plays the server; its reading of a request is vLLM's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.engines.parts import save_tiny, spec_of
from tests.engines.test_transformers_engine import leases_of
from torchspec.engines.capture.requests import PARAMETER
from torchspec.engines.capture.server import ServerClient
from torchspec.engines.engine import EngineConfig, Job, OnPolicy
from torchspec.engines.messages import Failed, PartialAnswer
from torchspec.engines.vllm.options import sampling_params
from torchspec.engines.vllm.remote import RemoteVLLMEngine
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer

REFUSED = httpx.Response(200, json={"kv_transfer_params": {PARAMETER: {"error": "refused"}}})
"""What a server says whose connector does not follow the order."""


class Played(RemoteVLLMEngine):
    """Its server is a function."""

    answer: Callable[[httpx.Request], httpx.Response]

    def launch(self) -> dict[str, Any]:
        self.token = "secret"
        transport = httpx.MockTransport(lambda request: self.answer(request))
        self._client = ServerClient(httpx.AsyncClient(transport=transport, base_url="http://server"))
        return {}


@pytest.fixture
def engine(server: StoreServer, tmp_path: Path) -> Iterator[Played]:
    target = save_tiny(tmp_path / "target")
    policy = OnPolicy(temperature=0.7, top_p=0.9)
    made = Played(Job(TargetConfig(str(target)), spec_of(target), server.address, EngineConfig(), max_length=64, device="cpu", on_policy=policy))
    made.start()
    yield made
    made.close()


def test_a_request_that_a_healthy_server_cannot_answer_fails_alone(engine: Played) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path == "/health":
            return httpx.Response(200)
        return httpx.Response(500, text="no such thing") if json.loads(request.content)["prompt"][0] == 9 else REFUSED

    engine.answer = answer
    engine.submit(leases_of([[9, 5, 6], [7, 5, 6]]))
    failed: list[Failed] = []
    while len(failed) < 2:
        done, more = engine.poll(5.0)
        assert not done and more
        failed += more
    said = {lost.lease: lost.reason for lost in failed}
    assert "500: no such thing" in said[0] and "BadAnswer" in said[0] and said[1] == "refused"
    assert asked.count("/v1/completions") == 3 and asked.count("/health") == 1
    assert not engine.gone()
    engine.submit(leases_of([[7, 5, 6]]))
    assert [lost.reason for lost in engine.poll(5.0)[1]] == ["refused"]


@pytest.mark.parametrize("health", [503, 502, None])
def test_a_server_that_is_not_well_is_lost(engine: Played, health: int | None) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health" and health is None:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(health or 500 if request.url.path == "/health" else 500, text="dead")

    engine.answer = answer
    engine.submit(leases_of([[9, 5, 6]]))
    with pytest.raises(RuntimeError, match=r"is gone \(answers 500: dead\)"):
        for _ in range(100):
            assert engine.poll(0.1) == ([], [])
    assert engine.gone()


def test_a_server_whose_model_has_defaults_of_its_own_samples_as_our_vllm_does(engine: Played) -> None:
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    bodies: list[dict[str, Any]] = []
    engine.answer = lambda request: bodies.append(json.loads(request.content)) or REFUSED  # type: ignore[func-returns-value]
    generate_from = PartialAnswer(new_tokens=8, seed=3)
    engine.submit([msgspec.structs.replace(lease, generate_from=generate_from) for lease in leases_of([[7, 5, 6]])])
    engine.poll(5.0)
    (body,) = bodies
    defaults = {"temperature": 0.3, "top_p": 0.5, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    theirs = protocol.CompletionRequest(**{**body, "model": "m"}).to_sampling_params(body["max_tokens"], default_sampling_params=defaults)
    ours = sampling_params(engine.sampling(generate_from), ends=engine.ends)
    for name in (*defaults, "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"):
        assert getattr(theirs, name) == getattr(ours, name), name
