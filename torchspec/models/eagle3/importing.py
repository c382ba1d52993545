"""Published EAGLE-3 drafts read back: vLLM's plain form, speculators', SGLang's and SpecForge's.

Keys are matched exactly: a missing or unknown one is an error, except what may lawfully be absent (the embedding, which is the target's; a
full-vocabulary head, likewise; ``t2d``) and what only repeats another tensor (``hidden_norm`` of later layers). Older names are known: ``midlayer``,
``aux_norm_low/mid/high``, a ``model.`` prefix. The exporter's self-check reads its own output with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from torchspec.errors import UserError
from torchspec.models.eagle3.config import DraftConfig, LatentSizes, default_layers
from torchspec.models.eagle3.formats import FLAGS
from torchspec.models.eagle3.network import Eagle3Draft
from torchspec.models.family import Draft
from torchspec.models.ops.rope_parameters import rope_of
from torchspec.models.target_head import TargetHead, read_embedding
from torchspec.models.vocabulary import VocabularyMapping
from torchspec.target import Target

_KINDS = {
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "Eagle3Qwen3ForCausalLM": "qwen3",
    "Qwen3ForCausalLMEagle3": "qwen3",
    "Eagle3DeepseekV2ForCausalLM": "deepseek_v2",
    "Eagle3DeepseekV3ForCausalLM": "deepseek_v2",
}
_ROUNDING = 0.01
"""Relative difference of an embedding that another float type may make."""
_RENAMED = (("midlayer.", "layers.0."), ("aux_norm_low.", "fc_norm.0."), ("aux_norm_mid.", "fc_norm.1."), ("aux_norm_high.", "fc_norm.2."))


def read_draft(described: dict[str, Any], tensors: dict[str, Tensor], target: Target, *, where: str) -> Draft:
    """A published draft, whole: a head that was left to the target is filled in from it.

    Args:
        described: its ``config.json``.
        tensors: all of it, by the names in its files.
        target: the model it drafts for; gives what may be left out (default layer ids, the target's hidden size, head and embedding).
        where: for errors.

    Raises:
        UserError: another kind of draft, missing or unknown keys, or sizes that do not fit the target.
    """
    config = config_of(described, target, where=where)
    tensors = _renamed(tensors, where=where)
    vocabulary = _vocabulary(tensors, config, where=where)
    _drop_repeated_norms(tensors, config, where=where)
    embedding = None if config.owns_embedding else tensors.pop("embed_tokens.weight", None)
    order = tensors.pop("order", None)
    if order is not None and "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    _check_names(tensors, config, where=where, head_may_be_absent=vocabulary is None and not config.owns_embedding)
    if embedding is not None and tuple(embedding.shape) != (config.vocab_size, config.hidden_size):
        raise UserError("draft", where, f"has embed_tokens of shape {tuple(embedding.shape)}", f"the target's is {config.vocab_size, config.hidden_size}")
    if embedding is not None:
        _check_embedding(embedding, target, where=where)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = TargetHead.of(target).weight
    return Draft(config, tensors, vocabulary, embedding)


def config_of(described: dict[str, Any], target: Target, *, where: str) -> DraftConfig:
    """The architecture that a published ``config.json`` describes.

    Args:
        described: the file's content.
        target: see :func:`read_draft`.
        where: for errors.

    Raises:
        UserError: another kind of draft, a field that we cannot honour, or sizes that do not fit the target.
    """
    kind, network = _network(described, where)
    _refuse_unknown(network, where)
    mla = None
    if kind == "deepseek_v2":
        mla = LatentSizes(**{name: network.get(name) for name in LatentSizes.__dataclass_fields__})  # type: ignore[arg-type]
    heads, hidden = _size(network, "num_attention_heads", where), _size(network, "hidden_size", where)
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla is not None else network.get("head_dim") or hidden // heads
    config = DraftConfig(
        hidden_size=hidden,
        intermediate_size=_size(network, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=heads if mla is not None else network.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocab_size=_size(network, "vocab_size", where),
        draft_vocab_size=described.get("draft_vocab_size") or _size(network, "vocab_size", where),
        target_hidden_size=described.get("target_hidden_size") or hidden,
        aux_layers=_layers(described, target, where),
        rope_parameters=rope_of(SimpleNamespace(**network, _name_or_path=where), exact=True),
        max_position_embeddings=_size(network, "max_position_embeddings", where),
        num_layers=_size(network, "num_hidden_layers", where),
        rms_norm_eps=float(network.get("rms_norm_eps", 1e-6)),
        initializer_range=float(network.get("initializer_range", 0.02)),
        attention_bias=bool(network.get("attention_bias", False)),
        qk_norm=kind == "qwen3",
        mla=mla,
        **{flag: _flag(described, flag, where) for flag in FLAGS},
    )
    for name, ours, theirs in (("vocab_size", config.vocab_size, target.vocab_size), ("hidden size", config.target_hidden_size, target.hidden_size)):
        if ours != theirs:
            raise UserError("draft", where, f"was made for a target of {name} {ours}; this one has {theirs}", "give the draft's own target")
    count = described.get("num_aux_hidden_states") or network.get("num_aux_hidden_states")
    if count is not None and count != len(config.aux_layers):
        raise UserError("draft", where, f"says {count} aux states and {list(config.aux_layers)} as their layers", "correct its config.json")
    return config


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is an EAGLE-3 draft's."""
    form = described.get("speculators_model_type")
    return form == "eagle3" if form is not None else any(name in _KINDS for name in described.get("architectures") or [])


def _network(described: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Kind of attention, and the dictionary that holds the transformer's sizes."""
    form = described.get("speculators_model_type")
    if form is not None:
        network = described.get("transformer_layer_config")
        kind = (network or {}).get("model_type", "llama")
        if form != "eagle3" or not isinstance(network, dict) or kind not in {"llama", "qwen3"}:
            raise UserError("draft", where, f"is a speculators draft of type {form} ({kind})", "give an eagle3 one of llama or qwen3 layers")
        if "norm_before_residual" not in described:
            raise UserError("draft", where, "does not say norm_before_residual, which readers of this format fill in differently", "add it to config.json")
        return kind, network
    names = list(described.get("architectures") or [])
    found = [_KINDS[name] for name in names if name in _KINDS]
    if not found:
        raise UserError("draft", where, f"is of architecture {names}", f"give an EAGLE-3 draft: {', '.join(sorted(_KINDS))}")
    return found[0], described


def _refuse_unknown(network: dict[str, Any], where: str) -> None:
    """Options of a transformer that change what it computes and that a draft here does not have."""
    wanted = {"hidden_act": "silu", "mlp_bias": False, "bias": False, "qkv_bias": False, "logit_scale": 1.0, "use_sliding_window": False}
    for name, value in wanted.items():
        if network.get(name, value) not in (value, None):
            raise UserError("draft", where, f"has {name}={network[name]}", "such a draft cannot be trained here")
    if "sliding_attention" in (network.get("layer_types") or []):
        raise UserError("draft", where, "attends to a sliding window", "such a draft cannot be trained here")


def _size(network: dict[str, Any], name: str, where: str) -> int:
    value = network.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError("draft", where, f"has {name}={value}", "correct its config.json")
    return value


def _flag(described: dict[str, Any], name: str, where: str) -> bool:
    """A flag, which older drafts keep under ``eagle_config``."""
    inner = (described.get("eagle_config") or {}).get(name)
    outer = described.get(name)
    if name == "fc_norm" and outer is None:
        outer = described.get("use_aux_norm")
    if inner is not None and outer is not None and bool(inner) != bool(outer):
        raise UserError("draft", where, f"says {name}={outer} and {inner} under eagle_config", "correct its config.json")
    return bool(outer if outer is not None else inner)


def _layers(described: dict[str, Any], target: Target, where: str) -> tuple[int, ...]:
    """Aux layers in our counting: top-level ids are in it, those of ``eagle_config`` alone are one less (SGLang, SpecForge)."""
    eagle = described.get("eagle_config") or {}
    ids = described.get("eagle_aux_hidden_state_layer_ids")
    older = eagle.get("eagle_aux_hidden_state_layer_ids")
    if not eagle.get("use_aux_hidden_state", True):
        raise UserError("draft", where, "uses no aux states (EAGLE-1 or 2)", "give an EAGLE-3 draft")
    if ids is None and older is not None:
        ids = [i + 1 for i in older]
    return target.aux_layers(list(ids)) if ids else default_layers(target)


def _renamed(tensors: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """By today's names."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("model.")
        for old, now in _RENAMED:
            new = now + new.removeprefix(old) if new.startswith(old) else new
        if new in found:
            raise UserError("draft", where, f"holds {new} twice, once as {name}", "remove one of them")
        found[new] = tensor
    return found


def _vocabulary(tensors: dict[str, Tensor], config: DraftConfig, *, where: str) -> VocabularyMapping | None:
    """The draft vocabulary, taken out of ``tensors``; rows in another order leave an entry ``order`` for the head."""
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    pruned = config.draft_vocab_size < config.vocab_size
    if not pruned:
        if d2t is not None and bool(d2t.any()):
            raise UserError("draft", where, "has a d2t that moves ids although draft_vocab_size is the whole vocabulary", "correct its config.json")
        return None
    if d2t is None:
        raise UserError("draft", where, "has a pruned vocabulary and no d2t", "it cannot be served or trained without it")
    if tuple(d2t.shape) != (config.draft_vocab_size,):
        raise UserError("draft", where, f"has d2t of shape {tuple(d2t.shape)} for draft_vocab_size={config.draft_vocab_size}", "correct its config.json")
    ids = torch.arange(config.draft_vocab_size) + d2t.long()
    ordered, order = ids.sort()
    if int(ordered[0]) < 0 or int(ordered[-1]) >= config.vocab_size or bool((ordered[1:] == ordered[:-1]).any()):
        raise UserError("draft", where, "has a d2t that does not give distinct target ids as draft id + d2t", "d2t holds offsets, not ids: rewrite it")
    mapping = VocabularyMapping(ordered, config.vocab_size)
    if t2d is not None and not torch.equal(t2d.bool(), mapping.t2d):
        raise UserError("draft", where, "has d2t and t2d that contradict each other", "rewrite the wrong one")
    if not torch.equal(ids, ordered):
        tensors["order"] = order
    return mapping


def _drop_repeated_norms(tensors: dict[str, Tensor], config: DraftConfig, *, where: str) -> None:
    """Later layers have one input norm, which vLLM calls ``input_layernorm`` and SGLang ``hidden_norm``."""
    for i in range(1, config.num_layers):
        hidden = tensors.pop(f"layers.{i}.hidden_norm.weight", None)
        mine = tensors.setdefault(f"layers.{i}.input_layernorm.weight", hidden) if hidden is not None else None
        if hidden is not None and mine is not None and not torch.equal(hidden, mine):
            raise UserError("draft", where, f"has different input_layernorm and hidden_norm in layer {i}", "servers read one or the other: remove one")


def _check_embedding(embedding: Tensor, target: Target, *, where: str) -> None:
    """A server gives a draft the embedding that it was published with, training the target's: they must be the same but for rounding."""
    table = read_embedding(target).float()
    difference = float((embedding.float() - table).norm() / table.norm().clamp(min=1e-30))
    if not difference <= _ROUNDING:
        problem = f"holds an embed_tokens that is not the target's (relative difference {difference:.2g})"
        raise UserError("draft", where, problem, "give the target that it was made for; a draft with random embeddings cannot be used")


def _check_names(tensors: dict[str, Tensor], config: DraftConfig, *, where: str, head_may_be_absent: bool) -> None:
    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in Eagle3Draft(config).named_parameters()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if head_may_be_absent:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"holds {', '.join(unknown)}, which its config.json does not describe"] if unknown else []
        raise UserError("draft", where, " and ".join(said), "its files are not those of one draft")
    wrong = [f"{name} {tuple(tensor.shape)} instead of {expected[name]}" for name, tensor in tensors.items() if tuple(tensor.shape) != expected[name]]
    if wrong:
        raise UserError("draft", where, f"has tensors of another shape: {', '.join(wrong)}", "its config.json does not describe them")
