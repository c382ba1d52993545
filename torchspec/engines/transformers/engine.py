"""The target run by Transformers, on any device: batches by length, one record a conversation.

``poll`` forwards one batch: conversations of like length, padded on the right, at most ``batch_tokens`` tokens with the padding; a thread writes its
records while the next one is computed (``record_writer.py``). No attention mask is given: a causal model's states never see what stands to their right,
and attention without a mask takes the fastest kernel and no T x T matrix. A conversation with images is a batch of its own. A batch that fails is tried again
one by one, so that a bad sample never takes its neighbours along.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease, result_of
from torchspec.engines.record_writer import CapturedSample, RecordWriter, one_line
from torchspec.engines.transformers.hidden_states import HiddenStateHooks
from torchspec.engines.transformers.load import load_model
from torchspec.images import BadImage, VisionTower, read_picture
from torchspec.target import Target

log = logging.getLogger(__name__)
_AHEAD = 2
"""Batches that may wait inside the engine, so that the next one starts without a round trip."""


class TransformersEngine:
    """See the module.

    Args:
        job: what to run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.target = Target(job.target)
        self.max_tokens = int(getattr(self.target.hf_config, "max_position_embeddings", None) or 2**31)
        self.spec = self.target.record_spec(job.spec.aux_layers, tokenizer=job.spec.tokenizer)
        self._queue: list[Lease] = []
        self._stats = EngineStats(0, 0, 0.0, 0.0)
        self._states: HiddenStateHooks | None = None
        self._tower = VisionTower(self.target) if job.images else None
        self._writer: RecordWriter | None = None
        self._writing: dict[str, Lease] = {}
        """Leases whose states the writer has, by key."""

    def start(self) -> dict[str, Any]:
        import transformers

        config = self.job.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model = load_model(
            self.job.target,
            device=self.job.device,
            attn_implementation=config.attn_implementation,
            images=self.job.images,
            extra=config.engine_args,
        )
        self._states = HiddenStateHooks(model, (*self.spec.aux_layers, self.target.num_layers), num_layers=self.target.num_layers)
        self._states.run(torch.zeros(1, 2, dtype=torch.int64, device=self.job.device))  # a target that gives none is refused now
        self._writer = RecordWriter(self.job.store, self.spec, producer=f"transformers {transformers.__version__}", device=self.job.device)
        return {
            "engine": "transformers",
            "versions": {"transformers": transformers.__version__, "torch": str(torch.__version__)},
            "device": self.job.device,
            "num_layers": self.target.num_layers,
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
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
        assert self._writer is not None
        started = time.monotonic()
        batch = self._next_batch()
        failed = self._compute(batch) if batch else []
        written = self._writer.results(0.0 if batch else timeout)
        results = [result_of(self._writing.pop(wrote.key), wrote) for wrote in written]
        finished = [result for result in results if isinstance(result, Finished)]
        failed += [result for result in results if isinstance(result, Failed)]
        write_s = sum(wrote.seconds for wrote in written)
        s = self._stats
        tokens = sum(len(lease.ids) // 4 for lease in batch)
        self._stats = EngineStats(s.samples + len(batch), s.tokens + tokens, s.busy_s + time.monotonic() - started, s.write_s + write_s)
        return finished, failed

    def stats(self) -> EngineStats:
        return self._stats

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _next_batch(self) -> list[Lease]:
        """The oldest lease and others of like length, so that little is padding; old ones are never passed over for long."""
        config = self.job.config
        if not self._queue or config.deterministic or self._queue[0].images:
            return [self._queue.pop(0)] if self._queue else []
        head = self._queue[0]
        alike = [i for i in range(1, len(self._queue)) if not self._queue[i].images]
        by_distance = sorted(alike, key=lambda i: (abs(len(self._queue[i].ids) - len(head.ids)), i))
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

    def _compute(self, batch: list[Lease]) -> list[Failed]:
        """Forward what can be forwarded and give it to the writer; returns the rest."""
        refused = {lease.id: problem for lease in batch if (problem := self._problem(lease))}
        failed = [Failed(lease, problem, retry=False) for lease, problem in refused.items()]
        good = [lease for lease in batch if lease.id not in refused]
        if good:
            try:
                self._forward(good)
            except BadImage as error:  # of the only one in this batch
                failed.append(Failed(good[0].id, str(error), retry=False))
            except (RuntimeError, ValueError, IndexError) as error:
                log.warning("batch of %d failed (%s): one by one", len(good), one_line(error))
                failed += self._one_by_one(good)
        return failed

    def _one_by_one(self, leases: list[Lease]) -> list[Failed]:
        failed = []
        for lease in leases:
            try:
                self._forward([lease])
            except (RuntimeError, ValueError, IndexError) as error:
                if self.job.device != "cpu":
                    torch.cuda.synchronize()  # raises when the device is lost for this process: the worker ends, another takes over
                failed.append(Failed(lease.id, one_line(error)))
        return failed

    def _problem(self, lease: Lease) -> str:
        """Why a sample would fail anywhere; empty when it would not."""
        ids = torch.frombuffer(bytearray(lease.ids), dtype=torch.int32) if lease.ids else torch.empty(0)
        if not 0 < ids.numel() <= self.max_tokens:
            return f"{ids.numel()} tokens; the target takes 1 to {self.max_tokens}"
        if int(ids.min()) < 0 or int(ids.max()) >= self.target.vocab_size:
            return f"token ids {int(ids.min())} to {int(ids.max())}; the target's vocabulary has {self.target.vocab_size}"
        return ""

    def _seen(self, lease: Lease, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the target is given of a conversation's images beside the ids.

        Raises:
            BadImage: an image is not there any more, or is another.
        """
        assert self._tower is not None
        inputs = self._tower.inputs([read_picture(image) for image in lease.images])
        if self._tower.has_axes:
            inputs["mm_token_type_ids"] = (ids == self._tower.image_id).int()  # from which Transformers reads where images are
        return {name: value.to(self.job.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def _forward(self, batch: list[Lease]) -> None:
        """Run the target on a batch, and hand the states on."""
        assert self._states is not None and self._writer is not None
        ids = [torch.frombuffer(bytearray(lease.ids), dtype=torch.int32) for lease in batch]
        padded = torch.zeros(len(ids), max(x.numel() for x in ids), dtype=torch.int64)
        for row, x in enumerate(ids):
            padded[row, : x.numel()] = x
        seen = self._seen(batch[0], padded) if batch[0].images else {}
        states = self._states.run(padded.to(self.job.device), seen)
        last = states[self.target.num_layers]
        with torch.inference_mode():
            aux = torch.cat([last[..., :0], *(states[layer] for layer in self.spec.aux_layers)], dim=-1)  # of no layers: no columns
        self._writing |= {lease.key: lease for lease in batch}
        self._writer.write([_sample(lease.key, x, aux[row], last[row]) for row, (lease, x) in enumerate(zip(batch, ids, strict=True))])


def _sample(key: str, ids: torch.Tensor, aux: torch.Tensor, last: torch.Tensor) -> CapturedSample:
    """A row of a batch, [T, n*D] and [T, D], without its padding."""
    tokens = ids.numel()
    return CapturedSample(key, ids, tokens, lambda: (aux[:tokens], last[:tokens]))
