"""``data.engine: sglang``: SGLang in this worker. Its scheduler is a process of its own, which the worker feeds through SGLang's asynchronous interface."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import multiprocessing
import os
import secrets
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchspec.engines.arguments import own_devices
from torchspec.engines.capture.engine import PrefillEngine
from torchspec.engines.capture.requests import PARAMETER, TOKEN_VARIABLE, CaptureRequest
from torchspec.engines.engine import Sampling
from torchspec.engines.messages import Wrote
from torchspec.engines.sglang.checks import family_of
from torchspec.engines.sglang.collector import PREFIX, PROBE
from torchspec.engines.sglang.options import OWNED, server_arguments, set_environment
from torchspec.engines.table import ENGINES
from torchspec.errors import UserError
from torchspec.imports import heavy_imports
from torchspec.reasons import overheard, reason_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

log = logging.getLogger(__name__)
_PROBED = 16
"""Tokens of the request that asks whether states can be had."""
_PROBE_WAIT = 20.0
"""Seconds for the hooks' word on it, after SGLang has answered."""


class HookedEngine(PrefillEngine):
    """What both engines made of SGLang have in common: an order is the id of its request, and a probe says at the start whether states can be had."""

    library = "SGLang"
    owned = OWNED
    name = "sglang"
    """By which the user chose it."""

    def start(self) -> dict[str, Any]:
        info = super().start()
        problem = asyncio.run_coroutine_threadsafe(self._probe(), self._loop).result()
        if problem:
            raise UserError("data.engine", self.name, problem, "use another data.engine for this target, or an SGLang listed in docs/engines.md")
        return info

    async def _probe(self) -> str:
        """Why the states of this target cannot be had; "" when they can."""
        report: asyncio.Future[Wrote] = self._loop.create_future()
        key = f"{PROBE}-{secrets.token_hex(8)}"
        ids = [7 * i % self.target.vocab_size for i in range(1, _PROBED + 1)]
        order = CaptureRequest(key=key, tail=[], answer=False, ids="", prompt=len(ids), run=self._run).signed(self.token)
        self._reports[key] = report
        try:
            await self.ask(ids, [], {PARAMETER: order.to_dict()}, key, Sampling(max_new_tokens=1))
            return (await asyncio.wait_for(report, _PROBE_WAIT)).error
        except TimeoutError:
            return f"was silent for {_PROBE_WAIT:.0f} s after its answer: no hooks of ours, another token, or no way from there to {self.report_host}"
        finally:
            self._reports.pop(key, None)


class SGLangEngine(HookedEngine):
    """See the module."""

    _engine: Any = None
    _children: list[Any] = []

    def launch(self) -> dict[str, Any]:
        config, device = self.job.config, self.job.device
        given = config.engine_args
        tp_size = int(given.get("tp_size", 1 if device == "cpu" else own_devices(device)))
        family_of(self.target.hf_config, max_length=self.max_tokens)
        set_environment(config, device=device, tp_size=tp_size)
        launch = importlib.import_module("torchspec.engines.sglang.launch")
        if device == "cpu":
            importlib.import_module("torchspec.engines.sglang.stand_ins").install()
        with heavy_imports():
            import sglang
            from sglang.srt.server_args import ServerArgs

        ENGINES["sglang"].check_version(sglang.__version__, allow_unknown=config.allow_unknown_version)
        self.token = os.environ.setdefault(TOKEN_VARIABLE, os.urandom(16).hex())
        own_capture = "enable_return_aux_hidden_states" in signature(ServerArgs).parameters
        arguments = server_arguments(self.target, config, aux_layers=self.spec.aux_layers, max_length=self.max_tokens, device=device, own_capture=own_capture)
        arguments["tp_size"] = tp_size
        before = set(multiprocessing.active_children())
        with overheard("sglang") as heard:
            try:
                self._engine = launch.start_engine(arguments)
            except (Exception, SystemExit) as error:
                log.info("SGLang refused", exc_info=True)
                reason = reason_of(error, heard=heard) if isinstance(error, Exception) else f"it ended with {error.code}"
                fault = next((name for name in given if name in reason), None)
                if fault is not None:
                    raise UserError(f"data.engines.engine_args.{fault}", given[fault], f"is refused by SGLang ({reason})", "see its documentation") from error
                raise UserError("data.engine", "sglang", f"does not start ({reason})", "see the worker's log, or use another data.engine") from error
        self._children = [child for child in multiprocessing.active_children() if child not in before]
        self.capacity = (config.batch_samples, config.batch_tokens)
        return {
            "engine": "sglang",
            "versions": {"sglang": sglang.__version__, "torch": str(torch.__version__)},
            "device": device,
            "dtype": arguments["dtype"],
            "tensor_parallel_size": tp_size,
        }

    async def ask(self, ids: list[int], pictures: list[Picture], parameters: dict[str, Any], key: str, sampling: Sampling) -> dict[str, Any] | None:
        assert not pictures, "data.media: engine is refused for this engine"
        rid = PREFIX + json.dumps(parameters[PARAMETER])
        asking = asyncio.ensure_future(self._engine.async_generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 0}, rid=rid))
        while not (await asyncio.wait({asking}, timeout=1.0))[0]:
            if self.gone():  # nobody will answer
                asking.cancel()
                raise ConnectionError("a process of SGLang's has ended")
        said = asking.result()
        finish = said["meta_info"].get("finish_reason") or {}
        return {PARAMETER: {"error": str(finish.get("message"))}} if finish.get("type") == "abort" else None

    def gone(self) -> bool:
        return self._engine is None or any(not child.is_alive() for child in self._children)

    def end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
            for path in _left_by(engine):
                path.unlink(missing_ok=True)


def _left_by(engine: Any) -> Iterator[Path]:
    """Files that an SGLang leaves behind: its processes are killed, and unlink nothing."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    ports = engine.port_args
    yield Path(shm_path_for(ports.instance_id))
    for name in ("tokenizer_ipc_name", "scheduler_input_ipc_name", "detokenizer_ipc_name", "rpc_ipc_name", "metrics_ipc_name"):
        address = str(getattr(ports, name, ""))
        if address.startswith("ipc://"):
            yield Path(address.removeprefix("ipc://"))
