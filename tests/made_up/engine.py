"""The made-up engine ``plain``: Transformers, one conversation at a time. ``data.engine: tests.made_up.engine:PLAIN``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchspec.engines.engine import EngineStats, Job
from torchspec.engines.messages import Failed, Finished, Lease, result_of
from torchspec.engines.record_writer import CapturedSample, RecordWriter
from torchspec.engines.table import EngineKind
from torchspec.target import Target

PLAIN = EngineKind(worker="tests.made_up.engine:PlainEngine", package="transformers")


class PlainEngine:
    """Of a :class:`Job`; loading happens in ``start``."""

    def __init__(self, job: Job) -> None:
        self.job, self.target = job, Target(job.target)
        self.spec = self.target.record_spec(job.spec.aux_layers, tokenizer=job.spec.tokenizer)
        self.max_tokens = int(self.target.hf_config.max_position_embeddings)
        self.waiting: list[Lease] = []
        self.writing: dict[str, Lease] = {}  # by the key of the record
        self.samples = self.tokens = 0

    def start(self) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM, __version__

        self.model = AutoModelForCausalLM.from_pretrained(self.job.target.path, dtype=self.target.dtype).eval()
        self.last: list[torch.Tensor] = []  # what enters the final norm
        self.model.model.norm.register_forward_pre_hook(lambda module, given: self.last.append(given[0]))
        self.writer = RecordWriter(self.job.store, self.spec, producer=f"plain {__version__}", device="cpu")
        return {"engine": "plain", "versions": {"transformers": __version__}, "device": "cpu", "num_layers": self.target.num_layers}

    def room(self) -> tuple[int, int]:
        return max(4 - len(self.waiting), 0), 4096

    def submit(self, leases: Sequence[Lease]) -> None:
        self.waiting.extend(leases)

    def cancel(self, leases: Sequence[int]) -> list[int]:
        dropped = [lease.id for lease in self.waiting if lease.id in leases]
        self.waiting = [lease for lease in self.waiting if lease.id not in leases]
        return dropped

    @torch.inference_mode()
    def poll(self, timeout: float) -> tuple[list[Finished], list[Failed]]:
        if self.waiting:
            lease = self.waiting.pop(0)
            ids = torch.frombuffer(bytearray(lease.ids), dtype=torch.int32)
            found = self.model(ids[None].long(), output_hidden_states=True, use_cache=False).hidden_states
            last = self.last.pop()
            states = (*found[:-1], last)  # index L is what enters the final norm; Transformers gives what leaves it
            aux = torch.cat([states[i][0] for i in self.spec.aux_layers], dim=-1)
            self.writing[lease.key] = lease
            self.writer.write([CapturedSample(lease.key, ids, ids.numel(), lambda: (aux, last[0]))])
            self.samples, self.tokens = self.samples + 1, self.tokens + ids.numel()
        results = [result_of(self.writing.pop(wrote.key), wrote) for wrote in self.writer.results(timeout)]
        return [r for r in results if isinstance(r, Finished)], [r for r in results if isinstance(r, Failed)]

    def stats(self) -> EngineStats:
        return EngineStats(self.samples, self.tokens, 0.0, 0.0)

    def close(self) -> None:
        self.writer.close()
