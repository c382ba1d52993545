"""A nonsense value of any option of ``data.engines`` or ``data.store`` is refused under the name that was typed, in one line with a fix."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.engines.parts import save_tiny
from tests.tiny import save_conversations
from torchspec.data.datamodule import DraftDataModule
from torchspec.data.group_start import listening
from torchspec.engines.engine import EngineConfig
from torchspec.engines.group import worker_devices
from torchspec.engines.transformers.load import load_model
from torchspec.errors import UserError
from torchspec.target import TargetConfig
from torchspec.transfer import StoreConfig, make_server

ENGINES: dict[str, tuple[Any, ...]] = {
    "workers": (-1,),
    "devices": (["nonsense"], ["cuda:0"], [""], ["0,"], []),
    "batch_tokens": (0,),
    "batch_samples": (-3,),
    "listen": ("nonsense", "nowhere.invalid:1", "127.0.0.1:99999"),
    "attn_implementation": ("nonsense",),
    "threads": (0,),
    "engine_args": ({"nonsense": 1}, {"dtype": "float16"}, {"device_map": "nonsense"}),
    "start_timeout": (-1.0, float("nan")),
    "lease_timeout": (0.0,),
    "silence_timeout": (float("inf"),),
    "max_restarts": (-1,),
    "min_workers": (-1, 2),
    "no_worker_timeout": (0.0,),
    "max_attempts": (0,),
    "max_failed_fraction": (-0.1, 1.1, float("nan")),
    "allow_unknown_version": (True,),
}
"""By option: values that mean nothing with the Transformers engine on a machine without a GPU."""
WITHOUT_NONSENSE = {"deterministic"}
"""Both values mean something."""
STORE: dict[str, tuple[dict[str, Any], ...]] = {
    "kind": ({"kind": "nonsense"},),
    "budget": ({"budget": "nonsense"}, {"budget": "-1GiB"}, {"budget": ""}),
    "protocol": ({"protocol": "nonsense"}, {"kind": "shm", "protocol": "rdma"}),
    "rdma_devices": ({"rdma_devices": "nonsense"}, {"kind": "shm", "rdma_devices": "mlx5_0"}),
    "master": ({"master": "nonsense"}, {"master": "h:99999"}, {"kind": "shm", "master": "h:1"}),
    "metadata": ({"metadata": "nonsense"},),
    "host": ({"kind": "shm", "host": "10.0.0.1"}, {"kind": "mooncake", "host": "nowhere.invalid"}, {"kind": "mooncake", "host": "10.255.255.1"}),
    "shm_dir": tuple({"kind": kind, "shm_dir": value} for kind in ("auto", "shm") for value in ("/nowhere", "/etc/passwd", "")),
}
"""By option: settings in which it is at fault."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("nonsense")
    return str(save_tiny(folder / "target")), str(save_conversations(folder / "in.jsonl", 4))


def refused(error: UserError, field: str) -> None:
    assert error.field == field or error.field.startswith(f"{field}."), f"blames {error.field}"
    said = str(error)
    assert said.startswith(f"{error.field}=") and "Fix: " in said and "\n" not in said and "Traceback" not in said and len(said) < 600
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == said and str(UserError.of(error.words)) == said


def test_every_option_is_in_the_tables() -> None:
    assert {option.name for option in fields(EngineConfig)} == ENGINES.keys() | WITHOUT_NONSENSE
    assert {option.name for option in fields(StoreConfig)} == STORE.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ENGINES.items() for value in values])
def test_nonsense_for_the_engines(world: tuple[str, str], name: str, value: Any) -> None:
    """In the order of a run: the configuration, the datamodule, the group's address and devices, the worker's loading."""
    with pytest.raises(UserError) as caught:
        engines = EngineConfig(**{name: value})
        DraftDataModule(TargetConfig(world[0]), world[1], engines=engines)
        listening(engines, StoreConfig(), main_address=None)
        worker_devices(engines.workers, engines.devices, field="data.engines.devices")
        load_model(TargetConfig(world[0]), device="cpu", attn_implementation=engines.attn_implementation, extra=engines.engine_args)
    refused(caught.value, f"data.engines.{name}")


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, settings in STORE.items() for given in settings])
def test_nonsense_for_the_store(world: tuple[str, str], tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    if given.get("kind") == "mooncake":
        pytest.importorskip("mooncake.store")
    with pytest.raises(UserError) as caught:
        config = StoreConfig(**given)
        DraftDataModule(TargetConfig(world[0]), world[1], store=config)
        server = make_server(config, run="nonsense", budget=1 << 20, log_dir=tmp_path)
        try:
            server.start()
        finally:
            server.close()
    refused(caught.value, f"data.store.{name}")
