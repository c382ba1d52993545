"""Answers by the target with Transformers: batches of prompts of like length, a key-value cache, finished rows taken out.

Rows are padded on the left, so that every row's next token is at the same place. When enough rows of a batch have ended, the cache is cut
down to the ones still running: a long answer does not keep a whole batch computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchspec.engines.engine import Answer, Sampling
from torchspec.engines.transformers.load import load_model
from torchspec.target import Target, TargetConfig

_COMPACT = 0.75
"""Share of rows still running below which the batch is cut down."""


class TransformersGenerator:
    """See the module.

    Args:
        config: the target.
        batch_size: rows of a batch.
        device: auto, cpu or a CUDA device.
        attn_implementation: of Transformers, or auto.
    """

    def __init__(self, config: TargetConfig, *, batch_size: int = 32, device: str = "auto", attn_implementation: str = "auto") -> None:
        self.device = ("cuda:0" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.batch_size = batch_size
        self.target = Target(config)
        self.model = load_model(config, device=self.device, attn_implementation=attn_implementation)
        self.ends = torch.tensor(self.target.end_ids(), device=self.device)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Answer]:
        """Answers, batch by batch from the longest prompts to the shortest, each batch in order of finishing."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        generator = torch.Generator(device=self.device).manual_seed(sampling.seed)
        for low in range(0, len(order), self.batch_size):
            yield from self._batch(order[low : low + self.batch_size], prompts, sampling, generator)

    def close(self) -> None:
        """Free the model."""
        self.model = None

    @torch.inference_mode()
    def _batch(self, indices: list[int], prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator) -> Iterator[Answer]:
        from transformers import DynamicCache

        longest = max(len(prompts[i]) for i in indices)
        ids = torch.zeros(len(indices), longest, dtype=torch.int64)
        mask = torch.zeros(len(indices), longest, dtype=torch.int64)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]), dtype=torch.int64)
            mask[row, longest - len(prompts[i]) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        position = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self.model.config)
        rows = list(indices)
        running = torch.ones(len(rows), dtype=torch.bool)
        new: dict[int, list[int]] = {i: [] for i in indices}
        for step in range(sampling.max_new_tokens):
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = _choose(out.logits[:, -1].float(), sampling, generator)
            ended = torch.isin(token, self.ends).cpu()
            chosen = token.tolist()
            for row, i in enumerate(rows):
                if not running[row]:
                    continue
                new[i].append(chosen[row])
                if ended[row] or step + 1 == sampling.max_new_tokens:
                    running[row] = False
                    yield Answer(i, new.pop(i), "stop" if ended[row] else "length")
            if not bool(running.any()):
                return
            if float(running.float().mean()) < _COMPACT:
                kept = torch.nonzero(running)[:, 0]
                on_device = kept.to(self.device)
                cache.batch_select_indices(on_device)
                mask, position, token = mask[on_device], position[on_device], token[on_device]
                rows = [rows[int(row)] for row in kept]
                running = torch.ones(len(rows), dtype=torch.bool)
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            position = position[:, -1:] + 1


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token [B] of fp32 logits [B, V]: the most likely at temperature 0, else nucleus sampling (Holtzman et al., arXiv 1904.09751)."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        ordered, index = p.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered > sampling.top_p] = 0.0  # the first token always stays
        p = torch.zeros_like(p).scatter_(-1, index, ordered)
    picked: Any = torch.multinomial(p, 1, generator=generator)
    return picked[:, 0]
