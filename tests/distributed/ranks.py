"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, world: int, folder: str, function: Callable[..., None], given: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    function(rank, *given)
    dist.destroy_process_group()
    os._exit(0)  # all was checked: gloo's and the profiler's threads have been seen to abort the interpreter's way out


def on_ranks(world: int, folder: Path, function: Callable[..., None], *given: Any) -> None:
    """``function(rank, *given)`` in ``world`` processes, which a server of Python's forks once it has made the imports; raises what one of them raises."""
    set_forkserver_preload(["torch.distributed.fsdp", "torchspec.trainer", "torchspec.models.module", "torchspec.data.datamodule"])
    mp.start_processes(_enter, (world, str(folder), function, given), nprocs=world, start_method="forkserver")  # type: ignore[no-untyped-call]
