"""Rows of hidden states as SGLang's forwards make them, put together to whole records.

A request's id is its order (``capture/requests.py``). A forward holds rows of several requests, and of a request that is cut into chunks some rows at a time;
after each forward a request gets its rows, and once it has those of its whole prompt they go to the sink of its run. All in the scheduler's one thread. Nothing
here raises into SGLang, whose scheduler would end: each fault becomes the failure of the records that it concerns.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchspec.engines.capture.requests import TOKEN_VARIABLE, BadCaptureRequest, CaptureRequest, ids_digest, read_destination, read_request
from torchspec.engines.capture.sink import Sink, introduced
from torchspec.engines.connection import Closed
from torchspec.engines.messages import Wrote
from torchspec.engines.record_writer import CapturedSample, one_line
from torchspec.engines.sglang.families import Family

log = logging.getLogger("sglang.torchspec")
PREFIX = "torchspec:"
"""Of the id of a request that carries an order."""
PROBE = "torchspec-probe"
"""Key of the order that asks for no record: its report says whether the states can be had."""
_PARTIAL = 64
"""Requests in the midst of their prefill that are remembered: SGLang has a few at a time, and those that it gave up are never heard of again."""
_REMEMBERED = 65536
"""Orders that are known again when they come a second time (``remote.py`` sends again what was not answered)."""
_FORGET = 30.0
"""Seconds without another try after an engine was not to be reached: a try holds up the model."""
_ROOM = 60.0
"""Seconds to wait for room in the ring; the model stands still meanwhile."""
_APART = 0.02
"""Relative difference of one state, taken in both ways, from which they are not the same: one tensor is equal to itself, a wrong capture was 80 % off."""


@dataclass(frozen=True)
class Facts:
    """What a running SGLang is."""

    layer_ids: tuple[int, ...]
    """States to capture, by Transformers' index, increasing; the last is the number of blocks."""
    architecture: str
    family: Family | None
    """None for one that nobody has looked at."""
    allow_unknown: bool
    target: str
    """Fingerprint."""
    path: str
    hidden_size: int
    dtype: str
    """Of the states, as the model computes them."""
    alone: bool
    """It runs one request in a step."""
    max_tokens: int
    producer: str


@dataclass
class _Rows:
    """States of one request."""

    order: CaptureRequest
    states: Tensor
    """[rows, layers, D], filled up to ``len(ids)``."""
    ids: list[int] = field(default_factory=list)

    def split(self, layer_ids: tuple[int, ...], aux_layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """aux [R, n, D] and last [R, D]."""
        return self.states[:, [layer_ids.index(i) for i in aux_layers]], self.states[:, -1]


class Collector:
    """See the module.

    Args:
        facts: of the SGLang that it runs in.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.ways: dict[int, str] = {}
        """Of each state, ``entering`` or ``captured``; decided in the first forward with an order."""
        self.problem = ""
        """Why no states can be had; "" when they can."""
        self._entering: dict[int, Tensor] = {}
        self._partial: OrderedDict[str, _Rows] = OrderedDict()
        self._accepted: OrderedDict[str, None] = OrderedDict()
        self._checked: dict[str, str] = {}
        self._sinks: dict[str, Sink] = {}
        self._unreachable: dict[str, float] = {}
        self._copying: deque[tuple[Callable[[], bool], _Rows]] = deque()

    # -- called by the hooks

    def entered(self, index: int, rows: Tensor) -> None:
        """State ``index`` of this forward's rows, [rows, D]: copied, since SGLang uses the tensor again."""
        self._entering[index] = rows.detach().clone()

    @torch.inference_mode()
    def forward_done(self, batch: Any, input_ids: Any, captured: Any) -> None:
        """The end of a forward.

        Args:
            batch: SGLang's ``ForwardBatch``.
            input_ids: of all rows.
            captured: states that the model's own capture gave: a list of [rows, D], one packed [rows, n*D], or None.
        """
        entering, self._entering = self._entering, {}
        try:
            if batch is None or not batch.forward_mode.is_extend() or not any(rid.startswith(PREFIX) for rid in batch.rids or ()):
                return
            self._let_go()
            states = self._states(entering, captured)
            ids = input_ids.tolist()
            start = 0
            for rid, before, length in zip(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True):
                if rid.startswith(PREFIX):
                    self._chunk(rid, int(before), ids[start : start + length], [state[start : start + length] for state in states])
                start += length
        except Exception:  # whatever it is, SGLang goes on; the engine hears nothing of these records and gives them up
            log.exception("a forward's states were not taken")

    # -- which states

    def _states(self, entering: Mapping[int, Tensor], captured: Any) -> list[Tensor]:
        """Of each of the layer ids, [rows, D]; none when they cannot be had (``problem``)."""
        ours = self._by_index(captured)
        if not self.ways and not self.problem:
            self._decide(entering, ours)
        if self.problem:
            return []
        found = [(entering if self.ways[i] == "entering" else ours).get(i) for i in self.facts.layer_ids]
        return [state for state in found if state is not None] if all(state is not None for state in found) else []

    def _by_index(self, captured: Any) -> dict[int, Tensor]:
        """What the model's capture gave, by Transformers' index: it was asked for all that it can give (``options.captured_ids``)."""
        wanted = captured_ids(self.facts.layer_ids)
        if captured is None or not wanted:
            return {}
        if isinstance(captured, Tensor):
            captured = captured.split(self.facts.hidden_size, dim=-1)
        rows = [one for one in captured if isinstance(one, Tensor)]
        return dict(zip(wanted, rows, strict=True)) if len(rows) == len(wanted) else {}

    def _decide(self, entering: Mapping[int, Tensor], captured: Mapping[int, Tensor]) -> None:
        """Choose, of each state, the way that gives it."""
        facts = self.facts
        if facts.family is None and not facts.allow_unknown:
            self.problem = f"{facts.architecture} is not among the targets whose states were compared (docs/engines.md)"
            return
        trusted = facts.family is None or facts.family.captured
        for i in facts.layer_ids:
            if i in entering:
                apart = _difference(entering[i], captured[i]) if i in captured else 0.0
                if apart > _APART:
                    log.warning("hidden state %d as the model captures it is %.0f %% off what enters block %d: the latter is taken", i, 100 * apart, i)
                self.ways[i] = "entering"
            elif i in captured and trusted:
                self.ways[i] = "captured"
            else:
                why = "as its model captures it may be wrong" if i in captured else "was not to be seen"
                self.problem = f"hidden state {i} of {facts.architecture} {why}, and no norm gave it"
                self.ways = {}
                return
        log.info("hidden states are taken as they are %s", self.ways)

    # -- requests

    def _chunk(self, rid: str, before: int, ids: list[int], states: list[Tensor]) -> None:
        """Rows of one request, after ``before`` rows that came in earlier forwards."""
        held = self._partial.get(rid)
        if before == 0 or held is None:
            try:
                order = read_request(json.loads(rid.removeprefix(PREFIX)))
            except (BadCaptureRequest, ValueError) as error:
                log.error("a request's order is not followed: %s", error)  # where to report to stands in the order alone
                return
            problem = self._refusal(order, before, states)
            if problem or order.key.startswith(PROBE):
                self._tell(order, problem)
                return
            held = _Rows(order, torch.empty(order.prompt, len(states), states[0].shape[-1], dtype=states[0].dtype, device=states[0].device))
            self._partial[rid] = held
            if len(self._partial) > _PARTIAL:
                self._partial.popitem(last=False)
        try:
            if before != len(held.ids) or before + len(ids) > held.order.prompt or not states:
                raise ValueError(f"rows {before} to {before + len(ids)} came after {len(held.ids)} of {held.order.prompt}, {len(states)} states")
            for layer, state in enumerate(states):
                held.states[before : before + len(ids), layer].copy_(state)
            held.ids += ids
            if len(held.ids) < held.order.prompt:
                return
            self._whole(held)
        except Exception as error:
            log.exception("a record's states were not taken")
            self._tell(held.order, one_line(error))
        self._partial.pop(rid, None)

    def _refusal(self, order: CaptureRequest, before: int, states: list[Tensor]) -> str:
        """Why an order is not followed; "" when it is."""
        if self.problem:
            return self.problem
        if order.answer:
            return "this engine does not answer and capture in one pass"
        if before:
            return f"{before} rows of it came from a cache, without states"
        return self._wrong_run(order.run) or ("" if states else "the hooks did not see this forward")

    def _wrong_run(self, run: dict[str, Any]) -> str:
        """What of a run this SGLang cannot serve; "" when all is well. A run is looked at once."""
        text = json.dumps(run, sort_keys=True)
        if text not in self._checked:
            facts, destination = self.facts, read_destination(run)
            spec = destination.spec
            wanted = {*spec.aux_layers, facts.layer_ids[-1]}
            problem = ""
            if not wanted <= set(facts.layer_ids):
                problem = f"wants hidden states {sorted(wanted)}, this SGLang was started with {list(facts.layer_ids)}"
            elif spec.hidden_size != facts.hidden_size:
                problem = f"wants states of width {spec.hidden_size}, the target {facts.path} has {facts.hidden_size}"
            elif spec.target != facts.target:
                problem = f"is of the target {spec.target}, this SGLang runs {facts.target} ({facts.path})"
            elif facts.dtype not in (spec.dtype, "float32"):
                problem = f"wants states in {spec.dtype}, this SGLang computes in {facts.dtype}: start it with --dtype {spec.dtype}"
            elif destination.alone and not facts.alone:
                problem = "is deterministic, this SGLang runs several requests in a step: start it with --prefill-max-requests 1 --chunked-prefill-size -1"
            self._checked[text] = problem and f"the run {problem}"
        return self._checked[text]

    def _whole(self, held: _Rows) -> None:
        """All rows of a request are there: give them to the sink of its run."""
        order = held.order
        ids = [*held.ids, *order.tail]
        if order.ids and ids_digest(ids) != order.ids:
            raise ValueError("SGLang computed other tokens than those of the order")
        sink = self._sink(order.run)
        if sink is None or order.key in self._accepted:
            return
        self._accepted[order.key] = None
        if len(self._accepted) > _REMEMBERED:
            self._accepted.popitem(last=False)
        deadline = time.monotonic() + _ROOM
        aux_layers = sink.spec.aux_layers
        sample = CapturedSample(order.key, torch.tensor(ids, dtype=torch.int32), len(held.ids), lambda: held.split(self.facts.layer_ids, aux_layers))
        while (copied := sink.copy(sample)) is None:
            if time.monotonic() > deadline:
                sink.refuse(order.key, f"no room for the record after {_ROOM:.0f} s")
                return
            time.sleep(0.002)  # its thread is writing what is in the ring
        self._copying.append((copied, held))

    def _let_go(self) -> None:
        """Forget rows whose copy is done: until then a stream of the sink's may read them."""
        while self._copying and self._copying[0][0]():
            self._copying.popleft()

    def _tell(self, order: CaptureRequest, problem: str) -> None:
        """Report that there is no record. Of a run that cannot be served there is no sink: then on a connection of its own."""
        text = json.dumps(order.run, sort_keys=True)
        if text in self._sinks and not self._sinks[text].broken:
            self._sinks[text].refuse(order.key, problem)
        elif time.monotonic() >= self._unreachable.get(text, 0.0):
            try:
                reports = introduced(read_destination(order.run).report, os.environ[TOKEN_VARIABLE])
                reports.send(Wrote(key=order.key, error=problem))
                reports.close()
            except Closed as error:
                log.error("no way to deliver reports: %s", error)
                self._unreachable[text] = time.monotonic() + _FORGET

    def _sink(self, run: dict[str, Any]) -> Sink | None:
        """Where this run's records go; None when nobody is there."""
        text = json.dumps(run, sort_keys=True)
        if text in self._sinks and self._sinks[text].broken:
            self._sinks.pop(text).close()
        if text not in self._sinks:
            if time.monotonic() < self._unreachable.get(text, 0.0):
                return None
            for ended in [other for other, sink in self._sinks.items() if sink.gone()]:
                self._sinks.pop(ended).close()
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            try:
                with torch.inference_mode(False):  # its thread writes into what it makes here
                    self._sinks[text] = Sink(
                        read_destination(run),
                        token=os.environ[TOKEN_VARIABLE],
                        max_tokens=self.facts.max_tokens,
                        producer=self.facts.producer,
                        device=device,
                    )
            except Closed as error:
                log.error("no way to deliver reports: %s", error)
                self._unreachable[text] = time.monotonic() + _FORGET
                return None
        return self._sinks[text]


def captured_ids(layer_ids: tuple[int, ...]) -> list[int]:
    """Of these states, those that a model's own capture can give: not the embeddings' output, nor what leaves the last block."""
    return [i for i in layer_ids[:-1] if 0 < i]


def _difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of the first."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.float() - other.float()).norm() / one.float().norm().clamp_min(1e-30))
