"""``main.py worker``: an engine worker that is started by hand (``engines/worker.py``)."""

from __future__ import annotations

import os

from torchspec.errors import UserError
from torchspec.network import split_host_port


def worker(coordinator: str, name: str | None = None, device: str = "auto") -> None:
    """Start an engine worker by hand and connect it to a running coordinator.

    The run token comes from the environment variable TORCHSPEC_TOKEN; the coordinator tells which engine and target to run.

    Args:
        coordinator: HOST:PORT, as the run prints it.
        name: by which logs call it; empty makes one from host, process and chance.
        device: auto, cpu, or a CUDA device such as cuda:0.
    """
    import secrets
    import socket

    from torchspec.engines.worker import serve

    split_host_port(coordinator, field="coordinator", example="10.0.0.1:29600")
    token = os.environ.get("TORCHSPEC_TOKEN")
    if not token:
        raise UserError("TORCHSPEC_TOKEN", token, "is not set", "export the run's token")
    if device == "auto":
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    serve(coordinator, token=token, name=name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}", device=device)
