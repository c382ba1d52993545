"""``torchrun`` over two hosts as docs/distributed.md says it: two network namespaces with a link between them, each with a loopback of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT, make, metrics, save_world

pytestmark = pytest.mark.slow
FIRST, SECOND = "10.213.7.1", "10.213.7.2"
LINK = "link0"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other under ``FIRST`` and ``SECOND``."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    names = [f"ts{secrets.token_hex(3)}{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def torchrun(host: str, node: int, *words: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
    command += ["--master_addr", FIRST, "--master_port", "29511", str(ROOT / "main.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_torchrun_over_two_hosts(hosts: list[str], tmp_path: Path) -> None:
    """Without a word about addresses: the rank of the second host reaches coordinator and store of the first."""
    pytest.importorskip("mooncake")
    config = make(tmp_path, save_world(tmp_path, train=24, validate=4), data__store={"kind": "auto", "budget": "32MiB"})
    words = ("fit", "--config", str(config), "--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "fsdp2", "--trainer.max_steps", "2")
    nodes = [torchrun(host, node, *words) for node, host in enumerate(hosts)]
    outputs = []
    try:
        for node in nodes:
            outputs.append(node.communicate(timeout=240)[0])
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                outputs.append(node.communicate()[0])
    said = "\n".join(output[-4000:] for output in outputs)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert len(metrics(tmp_path, "train/loss")) == 2
    assert "rank 1 of 2" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert f"listening on {FIRST}:" in (tmp_path / "logs" / "coordinator.log").read_text()
