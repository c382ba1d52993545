"""How the draft is spread over ranks: the FSDP2 strategy by its short name, and the one function that shards.

``--trainer.strategy fsdp2`` is Lightning's ModelParallelStrategy with every rank in the data-parallel mesh (its own default would put all devices of a node
into a
tensor-parallel one). FSDP1 cannot run on CPU nor clip by norm under Lightning; asking for it is answered with the name to use.
"""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn

from torchspec.errors import UserError


def ddp_options() -> dict[str, Any]:
    """What DDP is told beside its defaults: not to send buffers in every forward, here two tables of V x D, and not to keep a second copy of all gradients
    beside its buckets."""
    from torch.nn.parallel import DistributedDataParallel

    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the name since torch 2.13
    return {buffers: False, "gradient_as_bucket_view": True}


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel over all ranks (torch's ``fully_shard``).

    Args:
        save_distributed_checkpoint: one file a rank (True) or one file in all.
        process_group_backend: nccl, gloo, ...; None takes the device's default.
        timeout: of collectives.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        assert self.cluster_environment is not None
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def refuse_fsdp1(strategy: Any) -> None:
    """Answer a request for FSDP1 with the strategy to use.

    Raises:
        UserError: when ``strategy`` names FSDP1 or is one.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.lower() in {"fsdp", "fsdp_cpu_offload", "fsdpstrategy"}:
        raise UserError("trainer.strategy", name, "is FSDP1, which torch calls deprecated and Lightning cannot clip by norm", "use fsdp2")


def register_strategies() -> None:
    """Make ``fsdp2`` a strategy name, and ``ddp`` one that leaves the frozen target tables alone. Idempotent."""
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel (FSDP2) over all ranks")
    StrategyRegistry.register("ddp", DDPStrategy, description="Data parallel, whole copies", override=True, **ddp_options())


def parallelize(task: nn.Module, *, mesh: Any | None, compute_dtype: torch.dtype) -> nn.Module:
    """Shard the task over ``mesh``, in place.

    The root alone is wrapped: the draft's layer runs K times a step, and one all-gather and one reduce-scatter a step then serve all of them. Parameters
    stay fp32 (masters); gathered copies are ``compute_dtype``. A copy's gradient is summed over the unroll steps in fp32, rounded to the copy's type once,
    and reduced in fp32.

    Args:
        task: the module whose forward holds the whole loss.
        mesh: one-dimensional data-parallel device mesh; None (auto, ddp) leaves the task as it is.
        compute_dtype: type of the gathered parameters.

    Returns:
        ``task``.
    """
    if mesh is None:
        return task
    from torch.distributed import broadcast
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.no_grad():
        for parameter in task.parameters():  # as DDP does: each rank keeps a part of its own start otherwise
            broadcast(parameter, group=mesh.get_group(), group_src=0)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(task, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return task


def sync_gradients(task: nn.Module, last: bool) -> None:
    """Told before every micro-batch of a sharded task: gradients are reduced, and gathered weights given up, after the last one of a step alone."""
    task.set_requires_gradient_sync(last)  # type: ignore[operator]  # fully_shard adds these methods
    task.set_reshard_after_backward(last)  # type: ignore[operator]


def check_reduced(optimizer: torch.optim.Optimizer) -> None:
    """Before a step of a sharded task: FSDP has given its gradients to the parameters that the optimizer steps.

    Raises:
        RuntimeError: none has one. FSDP hooks into what the task's forward returns; a result that it cannot look into trains nothing.
    """
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        raise RuntimeError("no sharded parameter has a gradient: FSDP2 did not see the backward (is the task's output a tuple of tensors?)")
