"""The three tensors of the target that training needs, read without loading the target: embedding table, final norm, output head.

Which tensors they are says ``target_tensors.py``. The norm runs as the target's own class (some multiply by 1 + w); logit scales and soft caps are the class's
own too (``logits_rule.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.models.ops.fp8 import MULTIPLE, Fp8Weight, quantise, quantise_stacked
from torchspec.models.ops.not_finite import named, not_finite
from torchspec.models.target_tensors import tensors_of
from torchspec.target import Target


class TargetHead(nn.Module):
    """Final norm and output head of the target, frozen.

    Its tensors are non-persistent buffers: they never enter a checkpoint and are never sharded or trained.

    Args:
        weight: [V, D].
        bias: [V] or None.
        norm_module: the target's own final norm.
        norm_tensors: its tensors by name.
        scale: logits are multiplied by it.
        soft_cap: logits become cap * tanh(logits / cap), where not None.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, norm_module: nn.Module, norm_tensors: dict[str, Tensor], scale: float = 1.0, soft_cap: float | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("order", None, persistent=False)
        for name, tensor in norm_tensors.items():
            self.register_buffer(f"norm_{name}", tensor, persistent=False)
        self._norm: tuple[nn.Module, tuple[str, ...]] = (norm_module, tuple(norm_tensors))  # in a tuple: not a submodule
        self.scale = scale
        self.soft_cap = soft_cap
        self.width = weight.shape[0]
        self._narrow: Fp8Weight | None = None

    weight: Tensor
    """[V, D], rows in the target's order until :meth:`put_first`."""
    bias: Tensor | None
    order: Tensor | None
    """[V] target id of each row, where they are not in the target's order."""
    width: int
    """W: how many rows come first, see :meth:`put_first`; all of them before it."""

    def put_first(self, draft_ids: Tensor) -> None:
        """Sort the rows of this very head, those of the draft vocabulary first, so that its logits and the others are products of their own.

        The rows are copied: a table shared with the target's embedding is held twice from then on.

        Args:
            draft_ids: [W] distinct target ids, in the order of the draft's rows.

        Raises:
            RuntimeError: they are sorted already.
        """
        if self.order is not None:
            raise RuntimeError(f"the rows of this target head are sorted already, {self.width} of them first: read the head again for another vocabulary")
        others = torch.ones(self.weight.shape[0], dtype=torch.bool, device=draft_ids.device)
        others[draft_ids] = False
        self.order = torch.cat([draft_ids, others.nonzero()[:, 0]]).to(self.weight.device)
        self.weight = self.weight[self.order]
        self.bias = None if self.bias is None else self.bias[self.order]
        self.width = draft_ids.shape[0]

    def normed(self, last: Tensor) -> Tensor:
        """The target's final norm of its last states, [..., D] in the head's type."""
        module, names = self._norm
        tensors = {name: getattr(self, f"norm_{name}") for name in names}
        normed: Tensor = torch.func.functional_call(module, tensors, (last.to(self.weight.dtype),))
        return normed

    def parts(self, normed: Tensor, *, rounded: bool = False) -> tuple[Tensor, Tensor | None]:
        """[R, W] logits of the draft vocabulary, and [R, V - W] of all other tokens or None where there are none; fp32 where a cap or scale applies.

        Args:
            normed: [R, D], from :meth:`normed`.
            rounded: the second by an 8-bit product, in bf16, where D allows it. Which of two nearly equal tokens is likelier may come out the other way
                round. The rows in 8 bits are made at the first call and stay beside the others, at half the size of bf16 ones.
        """
        number = self.weight.shape[0] - self.width
        if not number or not rounded or self.weight.shape[1] % MULTIPLE:
            whole = self._project(normed, slice(None))
            return whole[:, : self.width], whole[:, self.width :] if number else None
        if self._narrow is None:
            self._narrow = Fp8Weight(quantise_stacked([self.weight[self.width :], self.weight.new_zeros(-number % MULTIPLE, self.weight.shape[1])]))
        rest = self._narrow.forward(quantise(normed), torch.bfloat16)[:, :number]
        return self._project(normed, slice(0, self.width)), self._finish(rest if self.bias is None else rest + self.bias[self.width :])

    def _apply(self, *args: Any, **kwargs: Any) -> TargetHead:
        """Any move or cast: rows in 8 bits are made anew."""
        self._narrow = None
        return super()._apply(*args, **kwargs)

    def _project(self, normed: Tensor, rows: slice) -> Tensor:
        return self._finish(F.linear(normed, self.weight[rows], None if self.bias is None else self.bias[rows]))

    def _finish(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits.float() * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits.float() / self.soft_cap) * self.soft_cap
        return logits

    def logits(self, last: Tensor) -> Tensor:
        """[..., V] logits of states before the final norm, in the target's order."""
        found = self._project(self.normed(last), slice(None))
        return found if self.order is None else torch.empty_like(found).index_copy_(-1, self.order, found)

    @classmethod
    def of(cls, target: Target) -> TargetHead:
        """Read the head of a target.

        Raises:
            UserError: when the target has no safetensors, or no output head or final norm is found in them.
        """
        found = tensors_of(target)
        return cls(
            found.read(found.head),
            None if found.head_bias is None else found.read(found.head_bias),
            norm_module=found.norm_module,
            norm_tensors={short: found.read(name) for short, name in found.norm.items()},
            scale=found.rule.scale,
            soft_cap=found.rule.soft_cap,
        )

    def rms_weight(self) -> Tensor | None:
        """[D] fp32 weight of an equal plain RMSNorm (x / rms(x) * weight), or None where the target's norm is of another kind.

        Found by asking the norm: an RMSNorm maps a vector of equal entries to its weight. A second, uneven vector confirms it.
        """
        if self._norm[1] != ("weight",):
            return None
        weight = self.normed(self.weight.new_full((1, self.weight.shape[1]), 64.0))[0].float()
        uneven = torch.linspace(-50.0, 64.0, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        expected = uneven.float() * uneven.float().square().mean().rsqrt() * weight
        return weight if torch.allclose(self.normed(uneven[None])[0].float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max())) else None


def read_embedding(target: Target) -> Tensor:
    """The target's raw input embedding table, [V, D].

    Raises:
        UserError: see :class:`~torchspec.models.target_tensors.TargetTensors`.
    """
    found = tensors_of(target)
    return found.read(found.embedding)


def is_tied(target: Target) -> bool:
    """Whether embedding table and output head are one stored tensor.

    Raises:
        UserError: see :class:`~torchspec.models.target_tensors.TargetTensors`.
    """
    return tensors_of(target).tied


def refuse_damaged(target: Target, *modules: nn.Module) -> None:
    """Refuse a target whose head, norm or embedding are not made of numbers.

    Args:
        target: for the error.
        modules: that hold them as buffers.

    Raises:
        UserError: NaN or infinity in one of them.
    """
    buffers = [(name.removeprefix("norm_"), tensor) for module in modules for name, tensor in module.named_buffers()]
    if wrong := not_finite(buffers):
        problem = f"has a head, norm or embedding that is not made of numbers ({named(wrong)})"
        raise UserError("data.target.path", target.config.path, problem, "the files are damaged: fetch or convert the target again")
