"""What the engine group of a run is built from: a check that the budget holds what must be alive at once, address and token, and the configuration."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec.data.corpus import Corpus
from torchspec.engines.engine import EngineConfig
from torchspec.engines.group import GroupConfig
from torchspec.errors import UserError
from torchspec.network import is_loopback, own_address, split_host_port
from torchspec.transfer.sizes import parse_bytes, show_bytes
from torchspec.transfer.store import StoreConfig

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from torchspec.data.datamodule import DraftDataModule
    from torchspec.transfer.record import RecordSpec


def group_of(data: DraftDataModule, stages: list[str]) -> GroupConfig:
    """:func:`group_config` of a datamodule that a trainer uses; ``stages`` are gone through."""
    trainer = data.trainer
    assert trainer is not None
    return group_config(
        data.corpus,
        spec=data.spec,
        engine=data.engine,
        engines=data.engines,
        store=data.store,
        stages=stages,
        world=trainer.world_size,
        log_dir=Path(trainer.default_root_dir) / "logs",
        local_ranks=cpu_ranks(trainer),
        main_address=_main_address(trainer),
    )


def group_config(
    corpus: Corpus,
    *,
    spec: RecordSpec,
    engine: str,
    engines: EngineConfig,
    store: StoreConfig,
    stages: list[str],
    world: int,
    log_dir: Path,
    local_ranks: int,
    main_address: str | None = None,
) -> GroupConfig:
    """The configuration of a run's engine group.

    Args:
        corpus: of the run; ``stages`` of it are gone through.
        spec: of the records.
        engine, engines, store: as configured.
        world: ranks.
        log_dir: folder of the logs.
        local_ranks: ranks that compute on this host's CPU.
        main_address: of this host, as the ranks of other hosts were told (``MASTER_ADDR``); None where all ranks are here.

    Raises:
        UserError: when the budget cannot hold one pack of each rank, workers by hand have no token to show, or other hosts would not reach us.
    """
    on_policy, budget = corpus.on_policy, parse_bytes(store.budget, field="data.store.budget")
    # on-policy, a step's packs wait for each other: only then is known what they supervise
    train = (corpus.packs_per_step if on_policy else world) * corpus.largest_pack("train", spec) if "train" in stages else 0
    reserve = world * max((corpus.largest_pack(stage, spec) for stage in stages if stage != "train"), default=0)
    if budget < train + reserve:
        what = "the packs of one step (data.packs_per_step) need" if on_policy else f"one pack for each of {world} ranks needs"
        problem = f"is less than the {show_bytes(train + reserve)} that {what}, training and validation"
        raise UserError("data.store.budget", store.budget, problem, "raise it or lower data.max_tokens")
    host, port = listening(engines, store, main_address=main_address)
    token = os.environ.get("TORCHSPEC_TOKEN")
    if engines.workers == 0 and not token:
        raise UserError("TORCHSPEC_TOKEN", None, "is not set, and without it no worker started by hand can connect", "export a secret here and there")
    return GroupConfig(
        listen_host=host,
        listen_port=port,
        token=token or secrets.token_urlsafe(24),
        target=corpus.target.config,
        spec=spec,
        store=store,
        engine=engine,
        engines=engines,
        budget=budget,
        reserve=reserve,
        max_length=corpus.options.max_length,
        on_policy=on_policy,
        images=corpus.options.media == "engine",
        log_dir=log_dir,
        local_ranks=local_ranks,
    )


def listening(engines: EngineConfig, store: StoreConfig, *, main_address: str | None) -> tuple[str, int]:
    """Address and port of the coordinator (0: a free one): what was configured, else loopback, or the main address where ranks of other hosts must reach it.

    Args:
        engines, store: as configured.
        main_address: see :func:`group_config`.

    Raises:
        UserError: it is no address of this host that can be told to others; or there are others, and it or the store serves this host alone.
    """
    field, fix = "data.engines.listen", "write an address of this host, such as 10.0.0.1:29600"
    apart = main_address is not None and not is_loopback(main_address)
    if engines.listen is not None:
        host, port = split_host_port(engines.listen, field=field, lowest=0, example="127.0.0.1:0 or 10.0.0.1:29600")
        host = own_address(host, field=field, fix=fix)
    elif apart:
        assert main_address is not None
        other = "set data.engines.listen to an address of this host that the others reach, and port 0"
        host, port = own_address(main_address, field="MASTER_ADDR", fix=other), 0
    else:
        host, port = "127.0.0.1", 0
    if apart and is_loopback(host):
        raise UserError(field, engines.listen, f"is {host} ({main_address}), which the ranks of other hosts do not reach", fix)
    if apart and store.kind == "shm":
        problem = f"is memory of one host, and ranks of others are to read it (trainer.num_nodes, {main_address})"
        raise UserError("data.store.kind", "shm", problem, "set it to mooncake")
    return host, port


def cpu_ranks(trainer: pl.Trainer) -> int:
    """Ranks on this host that compute on its CPU."""
    return trainer.num_devices if trainer.strategy.root_device.type == "cpu" else 0


def _main_address(trainer: pl.Trainer) -> str | None:
    """Of this host (global rank 0's), as ranks on other hosts know it; None where there are none."""
    if trainer.num_nodes == 1:
        return None
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment.main_address if environment is not None else os.environ.get("MASTER_ADDR")
