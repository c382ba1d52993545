"""Which stored tensors are the target's embedding table, output head and final norm, by the rules by which Transformers
would load them.

The class is built on the meta device and asked for its modules; every stored name goes through Transformers' own
renamings (``core_model_loading``), so that prefixes, wrappers and legacy names need no list. Whether head and table are
one tensor is decided as Transformers 5 does: both stored, each is what it is; one stored, it stands for both if the
configuration ties them; else the checkpoint lacks it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchspec.errors import UserError
from torchspec.models.logits_rule import LogitsRule, logits_rule
from torchspec.stack import text_stack
from torchspec.stored import is_number
from torchspec.target import Target

_PARTS = ("weight_packed", "weight_shape", "weight_scale_inv", "weight_scale", "weight_zero_point", "scale", "qweight", "weight_blocks", "weight:qdata")
"""Last parts of names beside or in place of a quantised weight."""


class TargetTensors:
    """Names and values; use :func:`tensors_of`.

    Args:
        target: the frozen model.

    Raises:
        UserError: no embedding, output head or final norm is found, or the checkpoint does not hold them.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        model = on_meta(target)
        embedding, head = _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")
        if embedding is None or head is None:
            raise UserError("data.target.path", target.config.path, "has no input embedding or output head", "give a causal language model")
        stack = text_stack(model, num_layers=target.num_layers)
        self.norm_module: nn.Module = stack.norm
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        tables = [f"{name}.weight" for name in _names_of(model, embedding)]
        heads = _names_of(model, head)
        tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        norm = {name: [f"{at}.{name}" for at in _names_of(model, stack.norm)] for name, _ in stack.norm.named_parameters()}
        weights, biases = [f"{name}.weight" for name in heads], [f"{name}.bias" for name in heads]
        self._sources = _sources(model, target, {*tables, *weights, *biases, *tied, *tied.values(), *(name for names in norm.values() for name in names)})
        self.embedding = self._resolve(tables, tied)
        self.head = self._resolve(weights, tied)
        self.head_bias = self._resolve(biases, tied) if getattr(head, "bias", None) is not None else None
        self.norm = {short: self._resolve(names, tied) for short, names in norm.items()}
        self.tied = self.embedding == self.head
        """Whether table and head are one stored tensor."""
        self.rule = _rule(target, model, head_name=heads[0])

    def read(self, name: str) -> Tensor:
        """A parameter in the target's type, as Transformers would have it.

        Args:
            name: :attr:`embedding`, :attr:`head`, :attr:`head_bias`, or one of :attr:`norm`.

        Raises:
            UserError: its shape is another than the configuration says, or it is quantised in a way that is not read.
        """
        stored, parts = self.target.stored, self._sources[name]
        value = stored.read(parts["weight"]) if "weight" in parts else None
        if value is None or not is_number(value.dtype):
            value = self._dequantised(name, value, {part: stored.read(key) for part, key in parts.items() if part != "weight"})
        if tuple(value.shape) != self._shapes[name]:
            problem = f"holds {name} of {list(value.shape)}, where the configuration says {list(self._shapes[name])}"
            raise UserError("data.target.path", self.target.config.path, problem, "check config.json against the weights")
        return value.to(self.target.dtype)

    def _dequantised(self, name: str, weight: Tensor | None, parts: Mapping[str, Tensor]) -> Tensor:
        stored = self.target.stored
        if weight is not None and weight.ndim == 2 and weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return stored.dequantise(weight, next((parts[part] for part in ("weight_scale_inv", "weight_scale", "scale") if part in parts), None), name=name)
        if parts.keys() >= {"weight_packed", "weight_scale", "weight_shape"} and "weight_zero_point" not in parts:
            return stored.unpack(parts["weight_packed"], parts["weight_scale"], parts["weight_shape"], name=name)
        kept = ", ".join(sorted({*parts, *([] if weight is None else [str(weight.dtype)])}))
        problem = f"holds {name} quantised in a way that is not read here ({kept})"
        raise UserError("data.target.path", self.target.config.path, problem, "give a checkpoint with it unquantised")

    def _resolve(self, names: list[str], tied: Mapping[str, str]) -> str:
        """The parameter whose stored tensor stands for one that has these names.

        Raises:
            UserError: none is stored.
        """
        for name in names:
            if name in self._sources:
                return name
        sources = {tied[name] for name in names if name in tied} | set(names) & set(tied.values())
        for name in sorted(sources) + [other for other, source in tied.items() if source in sources]:
            if name in self._sources:
                return name
        raise UserError("data.target.path", self.target.config.path, f"holds no tensor {names[0]}", "check that the checkpoint is complete")


_KNOWN: WeakKeyDictionary[Target, TargetTensors] = WeakKeyDictionary()


def tensors_of(target: Target) -> TargetTensors:
    """Those of a target, found once.

    Raises:
        UserError: see :class:`TargetTensors`.
    """
    if target not in _KNOWN:
        _KNOWN[target] = TargetTensors(target)
    return _KNOWN[target]


def on_meta(target: Target) -> nn.Module:
    """The target's class without weights.

    Raises:
        UserError: Transformers has none for it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = target.auto_class().from_config(copy.deepcopy(target.full_hf_config), trust_remote_code=target.custom_model)
        except ValueError:
            try:
                model = AutoModelForCausalLM.from_config(copy.deepcopy(target.hf_config), trust_remote_code=target.custom_model)
            except ValueError as error:
                problem = f"is a {target.full_hf_config.model_type}, of which Transformers has no language model"
                raise UserError("data.target.path", target.config.path, problem, "give a causal language model") from error
    built: nn.Module = model
    return built


def _asked(model: nn.Module, question: str) -> nn.Module | None:
    """What the class calls its table or head, if it is one matrix."""
    try:
        found: Any = getattr(model, question)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and isinstance(getattr(found, "weight", None), Tensor) and found.weight.ndim == 2 else None


def _names_of(model: nn.Module, wanted: nn.Module) -> list[str]:
    """Every path to a module; a class may have one under two names."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is wanted]


def _sources(model: nn.Module, target: Target, wanted: set[str]) -> dict[str, dict[str, str]]:
    """Parameter → part of it → stored name, of those that are stored.

    Raises:
        UserError: Transformers makes one of several stored tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, expected = str(getattr(model, "base_model_prefix", "")), model.state_dict()
    found: dict[str, dict[str, str]] = {}
    for key in _worth_renaming(sorted(target.stored.shards, key=dot_natural_key), wanted):
        part = next((part for part in _PARTS if key.endswith(f".{part}")), None)
        asked = key if part is None else f"{key.removesuffix(part)}weight"
        renamed, converter = rename_source_key(asked, renamings, converters, prefix, expected)
        if renamed not in expected and asked in expected:
            renamed, converter = rename_source_key(asked, [], [], prefix, expected)
        if renamed not in wanted:
            continue
        if converter is not None:
            raise UserError("data.target.path", target.config.path, f"holds {renamed} in parts ({key})", "load it with Transformers and save_pretrained it")
        found.setdefault(renamed, {}).setdefault(part or "weight", key)
    return {name: parts for name, parts in found.items() if parts.keys() & {"weight", "weight_packed", "qweight", "weight_blocks", "weight:qdata"}}


def _worth_renaming(stored: Iterable[str], wanted: set[str]) -> Iterable[str]:
    """Of hundreds of thousands of names of experts none is asked for: names with a number are left out where no wanted
    one has a number."""

    def numbered(name: str) -> bool:
        return any(piece.isdigit() for piece in name.split("."))

    return stored if any(numbered(name) for name in wanted) else (name for name in stored if not numbered(name))


def _rule(target: Target, model: nn.Module, *, head_name: str) -> LogitsRule:
    """The class's own rule; where a wrapper has none, that of its text part's class.

    Transformers' wrappers of Cohere and Granite leave the scale of the text model out, which changes no greedy answer
    but every probability; the text class and every server have it.
    """
    from transformers import AutoModelForCausalLM

    width, rows = target.hidden_size, target.vocab_size
    rule = logits_rule(model, head_name=head_name, width=width, rows=rows)
    text = target.hf_config
    if rule != LogitsRule() or text is target.full_hf_config or type(text) not in AutoModelForCausalLM._model_mapping:
        return rule
    with torch.device("meta"):
        inner: Any = AutoModelForCausalLM.from_config(copy.deepcopy(text))
    names = _names_of(inner, inner.get_output_embeddings())
    return logits_rule(inner, head_name=names[0], width=width, rows=rows)
