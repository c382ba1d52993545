"""The three tensors of the target that training needs, read without loading the target: embedding table, final norm, output head.

Their names are found by building the model on the meta device and asking it, so that prefixes, tied tables and unusual norms need no list of architectures.
The norm runs as the target's own class (some multiply by 1 + w); logit scales and soft caps come from the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.models.fp8 import MULTIPLE, Fp8Weight, quantise, quantise_stacked
from torchspec.target import Target


@dataclass(frozen=True)
class _Names:
    """Where the tensors are in the target, by parameter name; and the norm's class, still on the meta device."""

    embedding: str
    head: str
    head_bias: str | None
    tied: bool
    norm: dict[str, str]
    norm_module: nn.Module


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
            UserError: when the target has no safetensors, or no output head or final norm is found.
        """
        names = _find(target)
        wanted = [names.embedding if names.tied else names.head, *names.norm.values(), *([names.head_bias] if names.head_bias else [])]
        tensors = read_tensors(target, wanted)
        config = target.hf_config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            tensors[wanted[0]],
            tensors[names.head_bias] if names.head_bias else None,
            norm_module=names.norm_module,
            norm_tensors={short: tensors[full] for short, full in names.norm.items()},
            scale=scale,
            soft_cap=getattr(config, "final_logit_softcapping", None),
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
        UserError: see :func:`read_tensors`.
    """
    name = _find(target).embedding
    return read_tensors(target, [name])[name]


def _find(target: Target) -> _Names:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = target.auto_class().from_config(target.full_hf_config, trust_remote_code=target.custom_model)
        except ValueError:
            model = AutoModelForCausalLM.from_config(target.hf_config, trust_remote_code=target.custom_model)
    name_of = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UserError("data.target.path", target.config.path, "has no input embedding or output head", "give a causal language model")
    tied = (
        bool(getattr(target.full_hf_config, "tie_word_embeddings", False) or getattr(target.hf_config, "tie_word_embeddings", False))
        or head.weight is embedding.weight
    )
    norm_name, norm = _final_norm(model, target.hidden_size)
    bias = getattr(head, "bias", None)
    # with tied weights both names are the same parameter; the embedding's own name is the one that is stored
    embedding_name = next(name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding.weight)
    head_name = next(
        (name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head.weight and name != embedding_name), embedding_name
    )
    return _Names(
        embedding=embedding_name,
        head=head_name,
        head_bias=name_of.get(id(bias)) if bias is not None else None,
        tied=tied,
        norm={name: f"{norm_name}.{name}" for name, _ in norm.named_parameters()},
        norm_module=norm,
    )


def _final_norm(model: nn.Module, width: int) -> tuple[str, nn.Module]:
    """The norm after the stack of blocks: a sibling of the longest ModuleList, after it, whose parameters are all [D]."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if stacks:
        stack_name, stack = max(stacks, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))
        parent_name = stack_name.rpartition(".")[0]
        parent = model.get_submodule(parent_name) if parent_name else model
        seen = False
        for name, child in parent.named_children():
            seen = seen or child is stack
            shapes = [tuple(p.shape) for p in child.parameters()]
            if seen and child is not stack and shapes and all(shape == (width,) for shape in shapes):
                return f"{parent_name}.{name}" if parent_name else name, child
    raise UserError("data.target", type(model).__name__, "has no final norm after its blocks that we can find", "report this architecture")


def read_tensors(target: Target, names: list[str]) -> dict[str, Tensor]:
    """Single tensors of a target's safetensors, in the target's type; no other tensor is read.

    Raises:
        UserError: no safetensors, or a name that is in none of them.
    """
    from safetensors import safe_open

    locate, available = _files(target)
    found: dict[str, Tensor] = {}
    for name in names:
        stored = _stored_name(name, available)
        if stored is None:
            raise UserError("data.target.path", target.config.path, f"holds no tensor {name}", "check that the checkpoint is complete")
        with safe_open(locate(stored), framework="pt") as handle:
            found[name] = handle.get_tensor(stored).to(target.dtype)
    return found


def _stored_name(name: str, available: set[str]) -> str | None:
    """The name in the files: the same, or the one that agrees on the longest tail (Transformers adds and renames prefixes)."""
    if name in available:
        return name
    parts = name.split(".")
    for start in range(len(parts) - 1):
        tail = ".".join(parts[start:])
        matches = [other for other in available if other == tail or other.endswith("." + tail)]
        if len(matches) == 1:
            return matches[0]
    return None


def _files(target: Target) -> tuple[Callable[[str], Path], set[str]]:
    """How to find the file of a tensor, and the names there are."""
    from safetensors import safe_open

    index = _file(target, "model.safetensors.index.json")
    if index is not None:
        shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]

        def locate(name: str) -> Path:
            shard = _file(target, shard_of[name])
            if shard is None:
                raise UserError("data.target.path", target.config.path, f"lacks the shard {shard_of[name]}", "complete the checkpoint")
            return shard

        return locate, set(shard_of)
    single = _file(target, "model.safetensors")
    if single is None:
        raise UserError(
            "data.target.path", target.config.path, "holds no safetensors weights", "convert the checkpoint: load it with Transformers and save_pretrained it"
        )
    with safe_open(single, framework="pt") as handle:
        return lambda _: single, set(handle.keys())


def _file(target: Target, name: str) -> Path | None:
    folder = Path(target.config.path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    found: Any = cached_file(target.config.path, name, revision=target.config.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
