"""A training step of an EAGLE-3 draft as one would write it from the paper: one conversation, full attention masks, fp32 logits, autocast.

The yardstick of ``train_step.py``. It shares the weights of a ``DraftTask`` and none of its code: every step attends over a growing list of keys with an
explicit mask, and autograd keeps every logit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.batch import PackedBatch
from torchspec.models.eagle3.task import DraftTask
from torchspec.supervision import as_unroll


class PlainStep(nn.Module):
    """Loss of a single-conversation pack in which every position is supervised; T tokens, K steps.

    Args:
        task: owner of the weights (dense draft without options).
        dtype: autocast to it; fp32 computes as it is.
    """

    def __init__(self, task: DraftTask, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.task = task
        self.dtype = dtype

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.task.draft.config.rms_norm_eps) * weight).to(self.dtype)

    def _rope(self, x: Tensor, position: Tensor) -> Tensor:
        angle = position[:, None].float() * self.task.draft.inverse_frequencies.float()
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        low, high = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[] loss: sum over steps of weight times the mean over supervised positions."""
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._loss(batch)

    def _loss(self, batch: PackedBatch) -> Tensor:
        draft, config = self.task.draft, self.task.draft.config
        layer, tokens, size = draft.layers[0], batch.num_tokens, config.head_dim
        attention, mlp = layer.self_attn, layer.mlp  # type: ignore[union-attr]
        with torch.no_grad():
            head = self.task.head
            logits = head.logits(batch.last)
            best = logits.argmax(-1)
            ids = None if head.order is None else head.order[: head.width]
            kept = logits if ids is None else logits[:, ids]
            p = kept.float().softmax(-1)
            inside = torch.ones_like(best, dtype=torch.bool) if ids is None else torch.isin(best, ids)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=best.device).tril()
        diagonal = torch.eye(tokens, dtype=torch.bool, device=best.device)
        hidden = draft.fc(batch.aux)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        total = torch.zeros((), device=best.device)
        for k in range(as_unroll(batch.rows).steps):
            embedded = F.embedding(batch.input_ids.roll(-1 - k), draft.embedding_table)
            both = torch.cat([self._norm(embedded, layer.input_layernorm.weight), self._norm(hidden, layer.hidden_norm.weight)], dim=-1)  # type: ignore[union-attr, arg-type]
            query, key, value = (project(both).unflatten(-1, (-1, size)).transpose(0, 1) for project in (attention.q_proj, attention.k_proj, attention.v_proj))  # type: ignore[union-attr, operator]
            keys.append(self._rope(key, batch.position + k))
            values.append(value)
            mask = torch.cat([causal, *[diagonal] * k], dim=-1)
            mixed = F.scaled_dot_product_attention(
                self._rope(query, batch.position + k)[None], torch.cat(keys, 1)[None], torch.cat(values, 1)[None], attn_mask=mask, enable_gqa=True
            )
            hidden = hidden + attention.o_proj(mixed[0].transpose(0, 1).flatten(1))  # type: ignore[union-attr, operator]
            normed = self._norm(hidden, layer.post_attention_layernorm.weight)  # type: ignore[union-attr, arg-type]
            hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))  # type: ignore[union-attr, operator]
            rows = tokens - 2 - k
            log_q = draft.lm_head(self._norm(hidden[:rows], draft.norm.weight)).float().log_softmax(-1)
            at = slice(1 + k, 1 + k + rows)
            total = total + self.task.step_weights[k] * (-(p[at] * log_q).sum(-1) * inside[at]).sum() / batch.counts[k]
        return total
