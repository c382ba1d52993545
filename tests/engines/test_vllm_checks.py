"""What the connector asks of the vLLM that loads it: right states, the target that was ordered, one request a step where that was ordered.

The configurations are vLLM's own; the scheduler that calls the connector is played by the test.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.parts import save_tiny, spec_of
from tests.engines.test_vllm_parts import Inbox
from tests.tiny import save_target
from tests.tiny_vl import save_vl_target
from torchspec.engines.capture.requests import PARAMETER, TOKEN_VARIABLE, CaptureRequest, Destination
from torchspec.engines.capture.sink import introduced
from torchspec.engines.connection import Closed
from torchspec.engines.engine import EngineConfig
from torchspec.engines.vllm.checks import check, check_cache
from torchspec.engines.vllm.options import capture_arguments, model_arguments, vllm_config_of
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig

vllm = pytest.importorskip("vllm")
from vllm import SamplingParams  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

AUX = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("conditions") / "target", layers=4)


@pytest.fixture(scope="module")
def arguments(folder: Path) -> dict[str, Any]:
    target = Target(TargetConfig(str(folder)))
    return model_arguments(target, EngineConfig(), max_length=64, device="cpu") | capture_arguments(target, AUX)


@pytest.fixture(scope="module")
def right(arguments: dict[str, Any]) -> Any:
    config = vllm_config_of(arguments)
    check(config)
    return config


@pytest.mark.parametrize(
    ("name", "value"), [("kv_cache_dtype", "fp8"), ("enable_prefix_caching", True), ("load_format", "dummy"), ("hf_overrides", {"rope_theta": 5.0})]
)
def test_arguments_that_make_wrong_states_are_refused_wherever_vllm_was_started(arguments: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"vllm.{name}"):
        check(vllm_config_of(arguments | {name: value}))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("model_config", "quantization", "fp8"),
    ],
)
def test_what_this_machine_cannot_be_started_with_is_refused_too(right: Any, part: str, name: str, value: Any) -> None:
    changed = copy.copy(right)
    setattr(changed, part, copy.copy(getattr(right, part)))
    setattr(getattr(changed, part), name, value)
    with pytest.raises(UserError, match=f"vllm.{name}"):
        check(changed)


def test_asynchronous_scheduling_is_refused_where_it_loses_states(right: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = copy.copy(right)
    changed.scheduler_config = copy.copy(right.scheduler_config)
    changed.scheduler_config.async_scheduling = True
    check(changed)
    monkeypatch.setattr(vllm, "__version__", "0.26.1+cu130")
    with pytest.raises(UserError, match=r"vllm\.async_scheduling=True.*--no-async-scheduling"):
        check(changed)
    changed.scheduler_config.async_scheduling = False
    check(changed)


def test_a_cache_of_another_type_than_the_states_is_refused() -> None:
    check_cache(torch.empty(1, dtype=torch.bfloat16), torch.bfloat16)
    with pytest.raises(UserError, match="float8_e4m3fn; the model computes bfloat16"):
        check_cache(torch.empty(1, dtype=torch.float8_e4m3fn), torch.bfloat16)


def connector_of(config: Any) -> Any:
    """The scheduler's instance."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from torchspec.engines.vllm.connector import HiddenStatesConnector

    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=8), layer_names=["cache_only_layers.4"])])
    return HiddenStatesConnector(config, KVConnectorRole.SCHEDULER, groups)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of an engine that takes reports."""
    inbox = Inbox()
    yield inbox.port
    inbox.close()


def said_to(
    connector: Any, target: Path, key: str = "a", *, port: int, alone: bool = False, answer: list[int] | None = None, **of_request: Any
) -> tuple[bool, dict[str, Any]]:
    """Whether the blocks of a finished request are held, and what is said of its order, which is of this target. With ``answer`` the order is for one."""
    run = Destination({"kind": "shm"}, spec_of(target, AUX), ("127.0.0.1", port), alone=alone).to_dict()
    order = CaptureRequest(key=key, tail=[7] if answer is None else [], answer=answer is not None, ids="", prompt=3, run=run).signed("secret")
    said = answer if answer is not None else [1]
    finished = SimpleNamespace(request_id="r", prompt_token_ids=[5, 6], output_token_ids=said, num_computed_tokens=1 + len(said))
    finished.status = RequestStatus[of_request.get("status", "FINISHED_STOPPED")]
    finished.sampling_params = SamplingParams(temperature=of_request.get("temperature", 0.0))
    finished.kv_transfer_params = {PARAMETER: order.to_dict()}
    holds, said = connector.request_finished(finished, [3])
    return holds, said[PARAMETER]


def test_the_target_is_the_one_that_is_loaded_whatever_the_command_says(arguments: dict[str, Any], folder: Path, tmp_path: Path, port: int) -> None:
    """Another target of the same sizes, served with the line that was printed for this one, and with a line from which the promise was struck."""
    other = save_target(tmp_path / "other", layers=4, seed=7)
    shutil.copy(folder / "config.json", other / "config.json")
    assert said_to(connector_of(vllm_config_of(arguments)), folder, port=port) == (True, {"accepted": "a"})
    with pytest.raises(UserError, match=f"started with a command made for {Target(TargetConfig(str(folder))).fingerprint}"):
        connector_of(vllm_config_of(arguments | {"model": str(other)}))
    transfer = copy.deepcopy(arguments["kv_transfer_config"])
    del transfer["kv_connector_extra_config"]["target"]
    unpromised = connector_of(vllm_config_of(arguments | {"model": str(other), "kv_transfer_config": transfer}))
    holds, said = said_to(unpromised, folder, port=port)
    assert not holds and "this vLLM runs sha256:" in said["error"]
    assert said_to(unpromised, other, port=port)[0]


def test_an_order_that_comes_twice_is_followed_once(right: Any, folder: Path, port: int) -> None:
    connector = connector_of(right)
    assert [said_to(connector, folder, key, port=port) for key in "aab"] == [(True, {"accepted": "a"}), (False, {"accepted": "a"}), (True, {"accepted": "b"})]
    assert [capture.key for capture, _ in connector.build_connector_meta(None).captures] == ["a", "b"]


def test_deterministic_orders_need_a_server_that_runs_one_request_at_a_time(arguments: dict[str, Any], folder: Path, port: int) -> None:
    holds, said = said_to(connector_of(vllm_config_of(arguments)), folder, port=port, alone=True)
    assert not holds and "start it with --max-num-seqs 1" in said["error"]
    assert said_to(connector_of(vllm_config_of(arguments | {"max_num_seqs": 1})), folder, port=port, alone=True)[0]


def test_an_engine_that_would_never_hear_is_told_so_in_the_answer(right: Any, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = connector_of(right)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        deaf = nobody.getsockname()[1]
    tried: list[Any] = []
    monkeypatch.setattr("torchspec.engines.vllm.connector.introduced", lambda *to: tried.append(to) or introduced(*to))
    for _ in range(2):
        holds, said = said_to(connector, folder, port=deaf)
        assert not holds and f"127.0.0.1:{deaf}" in said["error"] and "report_host" in said["error"]
    assert len(tried) == 1  # a try holds up the scheduler
    assert said_to(connector, folder, "a", port=port)[0] and said_to(connector, folder, "b", port=port)[0]
    assert len(tried) == 2
    connector._unreachable = dict.fromkeys(connector._unreachable, 0.0)  # its time is over
    said_to(connector, folder, port=deaf)
    assert len(tried) == 3


@pytest.mark.parametrize("status", ["FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED"])
def test_an_answer_that_was_cut_off_is_none_and_its_order_may_come_again(right: Any, folder: Path, port: int, status: str) -> None:
    connector = connector_of(right)
    holds, said = said_to(connector, folder, port=port, answer=[7, 8], status=status)
    assert not holds and f"ended ({status}) without a whole answer" in said["error"]
    for key, ended in (("a", "FINISHED_STOPPED"), ("b", "FINISHED_LENGTH_CAPPED")):
        assert said_to(connector, folder, key, port=port, answer=[7, 8, 9], status=ended) == (True, {"accepted": key})
    assert [capture.ids for capture, _ in connector.build_connector_meta(None).captures] == [[5, 6, 7, 8, 9]] * 2
    assert said_to(connector, folder, "c", port=port, status=status)[0]  # nothing was to be answered, and all states are there


def test_random_answers_of_a_cpu_are_refused_whoever_started_it(right: Any, folder: Path, port: int) -> None:
    connector = connector_of(right)
    holds, said = said_to(connector, folder, port=port, answer=[7, 8], temperature=0.7)
    assert not holds and "at temperature 0.7" in said["error"] and "data.on_policy.temperature" in said["error"]
    assert said_to(connector, folder, port=port, temperature=0.7)[0]  # its one token is thrown away
    elsewhere = copy.copy(right)
    elsewhere.device_config = SimpleNamespace(device_type="cuda")
    connector._vllm_config = elsewhere
    assert said_to(connector, folder, "b", port=port, answer=[7, 8], temperature=0.7)[0]


def test_a_hybrid_target_is_not_answered_and_captured_in_one_pass_whoever_started_it(tmp_path: Path, port: int) -> None:
    folder = save_tiny(tmp_path / "target", "qwen3_next", hidden=128, dtype=torch.bfloat16)
    target = Target(TargetConfig(str(folder)))
    config = vllm_config_of(model_arguments(target, EngineConfig(), max_length=64, device="cpu") | capture_arguments(target, AUX))
    connector = connector_of(config)
    holds, said = said_to(connector, folder, port=port, answer=[7, 8])
    assert not holds and "recurrent layers" in said["error"] and "answer_workers" in said["error"]
    assert said_to(connector, folder, port=port)[0]


def test_what_was_let_go_while_its_engine_was_not_to_be_reached_is_told_later(right: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine would wait two minutes for each otherwise."""
    from torchspec.engines.vllm.connector import FinishedRequest

    connector, inbox = connector_of(right), Inbox()
    connector._cache = SimpleNamespace(device=torch.device("cpu"))
    tried: list[int] = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        tried.append(1)
        raise Closed("no route")

    run = Destination({"kind": "shm", "directory": "/nowhere"}, spec_of(folder, AUX), ("127.0.0.1", inbox.port)).to_dict()
    with monkeypatch.context() as broken:
        broken.setattr("torchspec.engines.vllm.connector.Sink", unreachable)
        for key in "ab":
            assert connector._copy(FinishedRequest(key, key, [5, 6, 7], 2, [1]), run)()
    assert len(tried) == 1 and inbox.reports == []
    connector._unreachable = dict.fromkeys(connector._unreachable, 0.0)  # its time is over
    assert connector._copy(FinishedRequest("c", "c", [5, 6, 7], 2, [1]), run)()
    told = {report.key: report.error for report in inbox.wait(3)}
    assert "did not reach the engine" in told["a"] and told["a"] == told["b"] and "/nowhere" in told["c"]
    connector.shutdown()
    inbox.close()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_package_that_a_target_lacks_is_named(tmp_path: Path) -> None:
    """vLLM logs it in a traceback of another process, and raises something that points to the log."""
    target = Target(TargetConfig(str(save_vl_target(tmp_path / "target", layers=4))))
    words = r"data\.engine='vllm' does not take this target \(the package torchvision is not installed: .*Fix: install torchvision"
    with pytest.raises(UserError, match=words):
        vllm_config_of(model_arguments(target, EngineConfig(), max_length=64, device="cpu"))


@pytest.mark.parametrize(("name", "value", "words"), [("max_num_seqs", 0, "greater than or equal to 1"), ("nonsense", 1, "unexpected keyword argument")])
def test_an_argument_that_vllm_refuses_is_named_without_the_others(folder: Path, name: str, value: int, words: str) -> None:
    given = {name: value, "block_size": 16}
    everything = model_arguments(Target(TargetConfig(str(folder))), EngineConfig(engine_args=given), max_length=64, device="cpu")
    with pytest.raises(UserError) as refused:
        vllm_config_of(everything, given=given)
    said = str(refused.value)
    assert said.startswith(f"data.engines.engine_args.{name}={value} is refused by vLLM (") and words in said and "language_model_only" not in said
    assert "enforce_eager" not in said and "\n" not in said
