"""An engine that talks to a real SGLang server, started as ``main.py sglang_command`` says."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch

from tests.engines.parts import read_record, spec_of
from tests.engines.test_transformers_engine import expected, leases_of, random_samples, work_off
from tests.tiny import save_target
from torchspec.commands.sglang_command import sglang_command
from torchspec.engines.capture.server import SERVER_TOKEN_VARIABLE as TOKEN_VARIABLE
from torchspec.engines.engine import EngineConfig, Job
from torchspec.engines.sglang.remote import RemoteSGLangEngine
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer import StoreServer, open_store

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="no SGLang")
ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 64
CPU = """
from torchspec.engines.sglang import stand_ins
stand_ins._NAMES = (*stand_ins._NAMES, "soundfile")
stand_ins.install()
"""
"""What a stock server lacks on a CPU, in each of its processes."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    target = save_target(folder / "target", layers=4)
    (folder / "sitecustomize.py").write_text(CPU)
    environment = {**os.environ, "TORCHSPEC_TOKEN": "shared secret", "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}
    with pytest.MonkeyPatch.context() as patch, (folder / "line").open("w") as line:
        patch.setattr(sys, "stdout", line)
        sglang_command(str(target), [1, 2])
    assignment, python, *words = shlex.split((folder / "line").read_text())
    assert (assignment, python) == ("TORCHSPEC_TOKEN=SECRET", "python")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cpu = "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none --sleep-on-idle --max-total-tokens 1024"
    sizes = "--skip-tokenizer-init --skip-server-warmup --context-length 72 --chunked-prefill-size 32 --max-prefill-tokens 32 --max-running-requests 8"
    command = [sys.executable, *words, "--port", str(port), "--host", "127.0.0.1", *cpu.split(), *sizes.split()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.5)
    yield url, target
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def engine_for(served: tuple[str, Path], server: StoreServer, aux: tuple[int, ...]) -> RemoteSGLangEngine:
    url, target = served
    config = EngineConfig(batch_samples=8, batch_tokens=32, engine_args={"url": url})
    return RemoteSGLangEngine(Job(TargetConfig(str(target)), spec_of(target, aux), server.address, config, max_length=MAX_LENGTH, device="cpu"))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.nightly
def test_records_and_refusals(served: tuple[str, Path], server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of half a conversation; then a run for other states, and one with another secret."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv(TOKEN_VARIABLE, "shared secret")
    model = AutoModelForCausalLM.from_pretrained(served[1])
    engine = engine_for(served, server, (1, 2))
    try:
        assert engine.start()["num_layers"] == 4
        samples = random_samples([5, 17, 1, 40, 33, 2, MAX_LENGTH, 18])
        leases = leases_of(samples)
        finished, failed = work_off(engine, leases)  # type: ignore[arg-type]
        assert not failed and len(finished) == len(samples)
        store = open_store(server.address)
        for done in finished:
            record = read_record(store, leases[done.lease].key, done.nbytes, engine.spec)
            states, _ = expected(model, samples[done.lease])
            wanted = torch.cat([states[1], states[2]], dim=-1)[: done.rows]
            assert record.input_ids.tolist() == samples[done.lease] and (record.aux - wanted).norm() / wanted.norm() < 1e-2
        store.close()
    finally:
        engine.close()
    for aux, secret, said in (((1, 3), "shared secret", r"wants hidden states \[1, 3, 4\]"), ((1, 2), "another", "was silent for")):
        monkeypatch.setenv(TOKEN_VARIABLE, secret)
        engine = engine_for(served, server, aux)
        try:
            with pytest.raises(UserError, match=said):
                engine.start()
        finally:
            engine.close()


def test_without_a_secret_or_an_address_nothing_is_asked(server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = save_target(tmp_path / "target", layers=4)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        engine_for(("http://127.0.0.1:1", target), server, (1, 2)).launch()
    with pytest.raises(UserError, match="engine_args.url"):
        engine_for(("", target), server, (1, 2)).launch()
