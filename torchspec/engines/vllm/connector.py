"""The connector that vLLM loads: hidden states of finished requests go from its cache to the store.

vLLM makes one instance in its scheduler and one in each process that runs the model. A request carries an order
(``capture_requests.py``). When it has finished, the scheduler's instance asks vLLM to hold the request's blocks, and
passes them on with the next step; the instance of tensor-parallel rank 0 copies the states out and lets the blocks go.
States are read when the request is over, not layer by layer: a prefill cut into chunks, or begun again after a
preemption, is whole by construction. All ranks hold the same states, so one writes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from torchspec.engines.capture.requests import PARAMETER, TOKEN_VARIABLE, BadCaptureRequest, CaptureRequest, ids_digest, read_destination, read_request
from torchspec.engines.capture.sink import Sink, introduced
from torchspec.engines.connection import Closed
from torchspec.engines.parent_death import die_with
from torchspec.engines.record_writer import CapturedSample, one_line
from torchspec.engines.table import ENGINES
from torchspec.engines.vllm import checks
from torchspec.engines.vllm.cache import HiddenStateCache, find_group, split
from torchspec.errors import UserError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger("vllm.torchspec")
_FORGET = 30.0
"""Seconds without another try after an engine was not to be reached: a try holds up the model."""
_WHOLE = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
"""How a request ends whose answer is whole."""
_REMEMBERED = 65536
"""Orders that are known again when they come a second time."""


@dataclass
class FinishedRequest:
    """A request whose states are in the cache, to be written."""

    request: str
    """vLLM's id of it: its blocks are held until the copy is done."""
    key: str
    ids: list[int]
    """Of the conversation, all T."""
    rows: int
    """States computed, T or T-1."""
    blocks: list[int]


@dataclass
class CaptureMetadata(KVConnectorMetadata):
    """What the scheduler's instance tells the others with a step."""

    captures: list[tuple[FinishedRequest, dict[str, Any]]] = field(default_factory=list)
    """Each with the run's description in its order."""


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Arguments are vLLM's.

    Raises:
        UserError: this vLLM is not one that it can serve, or its states would be wrong (``checks.py``).
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        ENGINES["vllm"].check_version(vllm.__version__, allow_unknown=bool(extra("allow_unknown_version", False)))
        checks.check(vllm_config)
        if role == KVConnectorRole.SCHEDULER and (owner := extra("owner", None)) is not None:
            die_with(owner)  # the engine core must not outlive the worker that started it
        draft = vllm_config.speculative_config.draft_model_config.hf_config if vllm_config.speculative_config else None
        self._layer_ids = tuple(getattr(draft, "eagle_aux_hidden_state_layer_ids", ()))
        self._group, self._block_size = find_group(kv_cache_config)
        self._max_tokens = int(vllm_config.model_config.max_model_len)
        # in the scheduler
        self._target = checks.check_target(vllm_config, promised=extra("target", None)) if role == KVConnectorRole.SCHEDULER else None
        self._accepted: OrderedDict[str, None] = OrderedDict()
        self._pending: list[tuple[FinishedRequest, dict[str, Any]]] = []
        self._checked: dict[str, str] = {}
        self._reached: set[str] = set()
        # in the model runner
        self._cache: HiddenStateCache | None = None
        self._sinks: dict[str, Sink] = {}
        self._waiting: deque[tuple[FinishedRequest, dict[str, Any]]] = deque()
        self._copying: dict[str, Callable[[], bool]] = {}
        self._unreachable: dict[str, float] = {}
        self._untold: dict[str, deque[str]] = {}
        """Of each run, keys of captures that were let go while its engine was not to be reached."""

    # -- in the scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Called once for each request, before its blocks are freed; True holds them until :meth:`get_finished` names it."""
        plain = (request.kv_transfer_params or {}).get(PARAMETER)
        if plain is None:
            return False, None  # not one of ours
        try:
            order = read_request(plain)
            ids = self._ids(request, order)
            self._check_run(order.run)
        except BadCaptureRequest as error:
            return False, {PARAMETER: {"error": str(error)}}
        except Exception as error:  # whatever an order says, vLLM goes on
            log.exception("an order could not be followed")
            return False, {PARAMETER: {"error": one_line(error)}}
        if order.key in self._accepted:
            return False, {PARAMETER: {"accepted": order.key}}  # sent again after its answer was lost: a record is written once
        rows = len(ids) - (1 if order.answer else len(order.tail))
        if request.num_computed_tokens < rows:
            return False, {PARAMETER: {"error": f"ended ({request.status.name}) after {request.num_computed_tokens} of {rows} tokens"}}
        self._accepted[order.key] = None
        if len(self._accepted) > _REMEMBERED:
            self._accepted.popitem(last=False)
        self._pending.append((FinishedRequest(request.request_id, order.key, ids, rows, list(block_ids)), order.run))
        return True, {PARAMETER: {"accepted": order.key}}

    def request_finished_all_groups(self, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[self._group] if self._group < len(block_ids) else [])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        captures, self._pending = self._pending, []
        return CaptureMetadata(captures)

    def get_finished_count(self) -> int:
        return 1  # one rank writes: vLLM must not wait for the others' word

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "NHD" if vllm.__version__.startswith("0.26.") else "LBNHC"  # states of a token side by side

    def _ids(self, request: Request, order: CaptureRequest) -> list[int]:
        prompt = request.prompt_token_ids
        if not prompt:
            raise BadCaptureRequest("the request has no token ids")
        if order.answer:
            self._check_answer(request)
        ids = [*prompt, *(request.output_token_ids if order.answer else order.tail)]
        if order.ids and ids_digest(ids) != order.ids:
            raise BadCaptureRequest(f"vLLM made other tokens of the images than the target's own processor did ({len(ids)} tokens in all)")
        return ids

    def _check_answer(self, request: Request) -> None:
        """Refuse an answer that is not whole, or whose states or tokens this vLLM makes wrongly as it answers and captures in one pass.

        ``VLLMEngine.launch`` refuses the last two before a target is loaded; nobody else knows them of a vLLM that somebody else started.
        """
        if self._vllm_config.model_config.is_hybrid:
            problem = "this target has recurrent layers, and their states go wrong as vLLM answers and captures in one pass (docs/engines.md)"
            raise BadCaptureRequest(f"{problem}: set data.on_policy.answer_workers to 1 or more")
        sampling = request.sampling_params
        if sampling is not None and sampling.temperature > 0.0 and self._vllm_config.device_config.device_type == "cpu":
            problem = f"vLLM's CPU build answers wrongly at temperature {sampling.temperature} while it speculates (docs/engines.md)"
            raise BadCaptureRequest(f"{problem}: set data.on_policy.temperature to 0, or answer on a GPU")
        if request.status.name not in _WHOLE or not request.output_token_ids:
            raise BadCaptureRequest(f"the request ended ({request.status.name}) without a whole answer")

    def _check_run(self, run: dict[str, Any]) -> None:
        """Refuse an order for other states than this server has. A run is looked at once."""
        text = json.dumps(run, sort_keys=True)
        if text not in self._checked:
            destination = read_destination(run)
            spec = destination.spec
            model, target = self._vllm_config.model_config, self._target
            assert target is not None, "orders are read in the scheduler"
            problem = ""
            if not {*spec.aux_layers, target.num_layers} <= set(self._layer_ids):
                problem = f"wants hidden states {[*spec.aux_layers, target.num_layers]}, this vLLM was started with {list(self._layer_ids)}"
            elif spec.hidden_size != target.hidden_size:
                problem = f"wants states of width {spec.hidden_size}, the target {model.model} has {target.hidden_size}"
            elif spec.target != target.fingerprint:
                problem = f"is of the target {spec.target}, this vLLM runs {target.fingerprint} ({model.model})"
            elif str(model.dtype).removeprefix("torch.") not in (spec.dtype, "float32"):
                problem = f"wants states in {spec.dtype}, this vLLM computes in {str(model.dtype).removeprefix('torch.')}: start it with --dtype {spec.dtype}"
            elif destination.alone and (most := self._vllm_config.scheduler_config.max_num_seqs) > 1:
                problem = f"is deterministic, this vLLM runs up to {most} requests in a step: start it with --max-num-seqs 1"
            self._checked[text] = problem
        if self._checked[text]:
            raise BadCaptureRequest(f"the run {self._checked[text]}")
        self._check_engine(text, read_destination(run).report)

    def _check_engine(self, run: str, address: tuple[str, int]) -> None:
        """Refuse an order whose engine would never hear of its record. Tried once a run, and again some time after it failed."""
        if run in self._reached:
            return
        if time.monotonic() >= self._unreachable.get(run, 0.0):
            try:
                introduced(address, os.environ[TOKEN_VARIABLE]).close()
                self._reached.add(run)
                return
            except Closed as error:
                log.error("no way to deliver reports: %s", error)
                self._unreachable[run] = time.monotonic() + _FORGET
        raise BadCaptureRequest(f"this vLLM does not reach the engine that ordered it at {address[0]}:{address[1]}: see data.engines.engine_args.report_host")

    # -- where the model runs

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        names = list(get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)))
        if len(names) != 1:
            raise UserError("data.engine", "vllm", f"has {len(names)} layers that keep hidden states", "use a version listed in docs/engines.md")
        checks.check_cache(kv_caches[names[0]], self._vllm_config.model_config.dtype)
        self._cache = HiddenStateCache(kv_caches[names[0]], layers=len(self._layer_ids), block_size=self._block_size)
        log.info("hidden states %s are in a cache of %s, blocks of %d tokens", list(self._layer_ids), list(kv_caches[names[0]].shape), self._block_size)

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Called every step: start copies of what has finished since; name the requests whose blocks may go."""
        if get_tensor_model_parallel_rank() != 0:
            return None, None
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            if isinstance(metadata, CaptureMetadata):
                self._waiting += metadata.captures
        while self._waiting:
            capture, run = self._waiting[0]
            copied = self._copy(capture, run)
            if copied is None:
                break  # no room now: its blocks stay, and vLLM starts less meanwhile
            self._waiting.popleft()
            self._copying[capture.request] = copied
        gone = {request for request, copied in self._copying.items() if copied()}
        for request in gone:
            del self._copying[request]
        return gone or None, None

    def shutdown(self) -> None:
        for sink in self._sinks.values():
            sink.close(wait=10.0)
        self._sinks.clear()

    def _copy(self, capture: FinishedRequest, run: dict[str, Any]) -> Callable[[], bool] | None:
        """Start a copy; returns what says that it is done, or None when there is no room now."""
        sink = self._sink(run)
        if sink is None:
            self._untold.setdefault(json.dumps(run, sort_keys=True), deque(maxlen=_REMEMBERED)).append(capture.key)
            return lambda: True
        cache = self._cache
        assert cache is not None
        return sink.copy(
            CapturedSample(
                capture.key,
                torch.tensor(capture.ids, dtype=torch.int32),
                capture.rows,
                lambda: split(cache.read(capture.blocks, capture.rows), self._layer_ids, sink.spec.aux_layers),
            )
        )

    def _sink(self, run: dict[str, Any]) -> Sink | None:
        """Where this run's records go; None when nobody is there."""
        text = json.dumps(run, sort_keys=True)
        if text in self._sinks and self._sinks[text].broken:
            self._sinks.pop(text).close()
        if time.monotonic() < self._unreachable.get(text, 0.0):
            return None
        if text not in self._sinks:
            for ended in [other for other, sink in self._sinks.items() if sink.gone()]:
                self._sinks.pop(ended).close()
            try:
                self._sinks[text] = Sink(
                    read_destination(run),
                    token=os.environ[TOKEN_VARIABLE],
                    max_tokens=self._max_tokens + 1,
                    producer=f"vllm {vllm.__version__}",
                    device=self._cache.device if self._cache is not None else torch.device("cpu"),
                )
            except (Closed, BadCaptureRequest, OSError) as error:
                log.error("nobody to deliver records to: %s", error)
                self._unreachable[text] = time.monotonic() + _FORGET
                return None
            for key in self._untold.pop(text, ()):
                self._sinks[text].refuse(key, "vLLM did not reach the engine that ordered it when it had finished")
        return self._sinks[text]
