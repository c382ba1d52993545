"""The target run by Transformers, on any device: batches by length, one record a conversation.

``poll`` runs one batch: conversations of like length, padded on the right (a causal model's states do not see the padding), at most ``batch_tokens`` tokens
with the padding. States are copied
from the device straight into a registered buffer of the store and put from there. A batch that fails is tried again one by one, so that a bad sample never
takes its neighbours along.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.hooks import HiddenStates
from torchspec.engines.messages import Failed, Finished, Lease
from torchspec.errors import UserError
from torchspec.target import Target, TargetConfig
from torchspec.transfer import open_store
from torchspec.transfer.record import RecordSpec, seal, views
from torchspec.transfer.store import Store, StoreError

log = logging.getLogger(__name__)
_AHEAD = 2
"""Batches that may wait inside the engine, so that the next one starts without a round trip."""
_FULL_WAIT = 60.0
"""Seconds to wait for room in a store that is full against expectation."""


def load_model(config: TargetConfig, *, device: str, attn_implementation: str, extra: dict[str, Any] | None = None) -> Any:
    """The target for inference.

    Raises:
        UserError: it does not load.
    """
    from transformers import AutoModelForCausalLM

    target = Target(config)
    options = {"dtype": target.dtype, "attn_implementation": attn_implementation, **(extra or {})}
    try:
        model = AutoModelForCausalLM.from_pretrained(config.path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError("data.target.path", config.path, f"does not load ({str(error).splitlines()[0]})", "check the checkpoint and data.engines") from error
    loaded: Any = model
    return loaded.to(device).eval().requires_grad_(False)


class TransformersEngine:
    """See the module.

    Args:
        job: what to run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.target = Target(job.target)
        self.max_tokens = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**31)
        self.spec = RecordSpec(
            target=self.target.fingerprint,
            tokenizer=job.spec.tokenizer,
            aux_layers=job.spec.aux_layers,
            hidden_size=self.target.hidden_size,
            dtype=str(self.target.dtype).removeprefix("torch."),
        )
        self._queue: list[Lease] = []
        self._stats = EngineStats(0, 0, 0.0, 0.0)
        self._store: Store | None = None
        self._buffer: Tensor | None = None
        self._states: HiddenStates | None = None
        self._producer = ""

    def start(self) -> dict[str, Any]:
        import transformers

        config = self.job.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model = load_model(self.job.target, device=self.job.device, attn_implementation=config.attn_implementation, extra=config.engine_args)
        self._states = HiddenStates(model, (*self.spec.aux_layers, self.target.num_layers), num_layers=self.target.num_layers)
        self._store = open_store(self.job.store)
        self._producer = f"transformers {transformers.__version__}"
        return {
            "engine": "transformers",
            "versions": {"transformers": transformers.__version__, "torch": str(torch.__version__)},
            "device": self.job.device,
            "num_layers": self.target.num_layers,
            "threads": torch.get_num_threads(),
        }

    def room(self) -> tuple[int, int]:
        config = self.job.config
        samples = _AHEAD * config.batch_samples - len(self._queue)
        tokens = _AHEAD * config.batch_tokens - sum(len(lease.ids) // 4 for lease in self._queue)
        return max(samples, 0), max(tokens, 0)

    def submit(self, leases: Sequence[Lease]) -> None:
        self._queue.extend(leases)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        wanted = set(leases)
        dropped = [lease.id for lease in self._queue if lease.id in wanted]
        self._queue = [lease for lease in self._queue if lease.id not in wanted]
        return dropped

    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        batch = self._next_batch()
        if not batch:
            return [], []
        started = time.monotonic()
        finished: list[Finished] = []
        failed: list[Failed] = []
        write_s = 0.0
        try:
            finished, write_s = self._capture(batch)
        except (RuntimeError, StoreError, ValueError, IndexError) as error:
            if len(batch) == 1:
                failed = [Failed(batch[0].id, _one_line(error))]
            else:
                log.warning("batch of %d failed (%s): trying one by one", len(batch), _one_line(error))
                for lease in batch:
                    try:
                        one, more = self._capture([lease])
                        finished += one
                        write_s += more
                    except (RuntimeError, StoreError, ValueError, IndexError) as again:
                        failed.append(Failed(lease.id, _one_line(again)))
        s = self._stats
        tokens = sum(len(lease.ids) // 4 for lease in batch)
        self._stats = EngineStats(s.samples + len(batch), s.tokens + tokens, s.busy_s + time.monotonic() - started, s.write_s + write_s)
        return finished, failed

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        self._buffer = None
        if self._store is not None:
            self._store.close()
            self._store = None

    def _next_batch(self) -> list[Lease]:
        """The oldest lease and others of like length, so that little is padding; old ones are never passed over for long."""
        if not self._queue:
            return []
        if self.job.config.deterministic:
            return [self._queue.pop(0)]
        config = self.job.config
        head = self._queue[0]
        by_distance = sorted(range(1, len(self._queue)), key=lambda i: (abs(len(self._queue[i].ids) - len(head.ids)), i))
        chosen, longest = [0], len(head.ids)
        for i in by_distance:
            longest = max(longest, len(self._queue[i].ids))
            if len(chosen) >= config.batch_samples or (len(chosen) + 1) * longest // 4 > config.batch_tokens:
                break
            chosen.append(i)
        batch = [self._queue[i] for i in sorted(chosen)]
        taken = set(chosen)
        self._queue = [lease for i, lease in enumerate(self._queue) if i not in taken]
        return batch

    def _capture(self, batch: list[Lease]) -> tuple[list[Finished], float]:
        """Forward a batch, write its records; returns the results and the seconds spent on writing."""
        assert self._states is not None
        ids = [torch.frombuffer(bytearray(lease.ids), dtype=torch.int32) for lease in batch]
        longest = max(x.numel() for x in ids)
        padded = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros(len(ids), longest, dtype=torch.int64)
        for row, x in enumerate(ids):
            padded[row, : x.numel()] = x
            mask[row, : x.numel()] = 1
        position = torch.arange(longest).expand(len(ids), -1)
        device = self.job.device
        states = self._states.run(padded.to(device), mask.to(device), position.to(device))
        started = time.monotonic()
        finished = self._write(batch, ids, states)
        return finished, time.monotonic() - started

    def _write(self, batch: list[Lease], ids: list[Tensor], states: dict[int, Tensor]) -> list[Finished]:
        spec = self.spec
        sizes = [spec.nbytes(x.numel()) for x in ids]
        buffer = self._room_for(sum(sizes))
        values: list[Tensor] = []
        at = 0
        for row, (x, size) in enumerate(zip(ids, sizes, strict=True)):
            slot = buffer[at : at + size]
            at += size
            n = x.numel()
            into_ids, into_aux, into_last = views(slot, spec, n, n)
            into_ids.copy_(x)
            for i, layer in enumerate(spec.aux_layers):
                into_aux[:, i * spec.hidden_size : (i + 1) * spec.hidden_size].copy_(states[layer][row, :n], non_blocking=True)
            into_last.copy_(states[self.target.num_layers][row, :n], non_blocking=True)
            values.append(slot)
        if self.job.device != "cpu":
            torch.cuda.current_stream().synchronize()
        values = [seal(slot, spec, x.numel(), x.numel(), producer=self._producer) for slot, x in zip(values, ids, strict=True)]
        self._put([lease.key for lease in batch], values)
        return [Finished(lease.id, value.numel(), x.numel()) for lease, value, x in zip(batch, values, ids, strict=True)]

    def _put(self, keys: list[str], values: list[Tensor]) -> None:
        """Put; a full store (which credit should prevent) is waited for."""
        assert self._store is not None
        deadline = time.monotonic() + _FULL_WAIT
        delay = 0.05
        while True:
            try:
                self._store.put(keys, values)
                return
            except StoreError as error:
                if error.reason != "full" or time.monotonic() > deadline:
                    raise
                log.warning("the store is full; waiting %.2f s", delay)
                time.sleep(delay)
                delay = min(2 * delay, 2.0)

    def _room_for(self, nbytes: int) -> Tensor:
        assert self._store is not None
        if self._buffer is None or self._buffer.numel() < nbytes:
            self._buffer = self._store.buffer(max(nbytes, self.spec.nbytes(self.job.config.batch_tokens)))
        return self._buffer


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
