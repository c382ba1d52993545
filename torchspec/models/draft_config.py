"""Architecture of a dense EAGLE-3 draft, as plain numbers.

Derived from the target's configuration, or read from a JSON file that a user writes; what the two must agree on (hidden size of the target, vocabulary) is
checked by name. Options and their meaning: EAGLE-3 (arXiv 2503.01840), EAGLE-3.1 (2605.09992: ``fc_norm`` and ``norm_output``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torchspec.errors import UserError
from torchspec.target import Target


@dataclass(frozen=True)
class DraftConfig:
    """Everything that fixes the shapes and the arithmetic of a draft."""

    hidden_size: int
    """H."""
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """V, the target's."""
    draft_vocab_size: int
    """W; equal to V where the vocabulary is not pruned."""
    target_hidden_size: int
    """D."""
    aux_layers: tuple[int, ...]
    """Hidden-state indices in Transformers' counting, strictly increasing."""
    rope_parameters: dict[str, Any]
    """RoPE in Transformers 5's form: ``rope_type``, ``rope_theta`` and the kind's own fields."""
    max_position_embeddings: int
    num_layers: int = 1
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    """Per-head RMSNorm of queries and keys before RoPE (Qwen3 style)."""
    norm_before_residual: bool = False
    """The first layer's residual is the normed hidden state."""
    norm_before_fc: bool = False
    """One RMSNorm over the concatenated aux states before fc."""
    fc_norm: bool = False
    """One RMSNorm for each aux state before fc."""
    norm_output: bool = False
    """The state handed to the next step is the normed one."""

    def __post_init__(self) -> None:
        if self.norm_before_fc and self.fc_norm:
            raise UserError("draft.fc_norm", True, "excludes norm_before_fc", "set one of them")
        if self.num_heads % self.num_kv_heads:
            raise UserError("draft.num_key_value_heads", self.num_kv_heads, f"does not divide the {self.num_heads} heads", "use a divisor")
        if self.head_dim % 2:
            raise UserError("draft.head_dim", self.head_dim, "is odd", "RoPE needs an even one")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UserError("draft.draft_vocab_size", self.draft_vocab_size, f"is not in 1..{self.vocab_size}", "use at most the target's vocabulary")
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"draft.{name}", getattr(self, name), "is below 1", "use 1 or more")
        if self.rope_parameters.get("rope_theta") is None:
            raise UserError("draft.rope_parameters", self.rope_parameters, "holds no rope_theta", "give the base of the rotary embedding")

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft trains an embedding of its own (H differs from D) instead of using the target's."""
        return self.hidden_size != self.target_hidden_size

    def with_draft_vocabulary(self, size: int) -> DraftConfig:
        """The same draft with a head of ``size`` rows."""
        return replace(self, draft_vocab_size=size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "aux_layers": list(self.aux_layers)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DraftConfig:
        """Back from :meth:`to_dict`."""
        return cls(**{**plain, "aux_layers": tuple(plain["aux_layers"])})

    @classmethod
    def from_target(cls, target: Target, *, aux_layers: tuple[int, ...], **changes: Any) -> DraftConfig:
        """One layer of the target's own sizes, norms and RoPE.

        Args:
            target: the frozen model.
            aux_layers: from ``Target.aux_layers``.
            changes: fields to set otherwise.
        """
        config = target.hf_config
        heads = int(config.num_attention_heads)
        described: dict[str, Any] = {
            "hidden_size": target.hidden_size,
            "intermediate_size": int(getattr(config, "intermediate_size", None) or 4 * target.hidden_size),
            "num_heads": heads,
            "num_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or target.hidden_size // heads),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": target.vocab_size,
            "target_hidden_size": target.hidden_size,
            "aux_layers": tuple(aux_layers),
            "rope_parameters": rope_of(config),
            "max_position_embeddings": int(config.max_position_embeddings),
            "rms_norm_eps": float(getattr(config, "rms_norm_eps", None) or 1e-6),
        }
        return cls(**{**described, **changes})

    @classmethod
    def from_json(cls, path: str | Path, *, target: Target, aux_layers: tuple[int, ...]) -> DraftConfig:
        """A user's architecture file: fields of this class, the ones left out taken from the target.

        Transformers' own names for heads and layers (``num_attention_heads``, ``num_key_value_heads``, ``num_hidden_layers``) are understood too.

        Raises:
            UserError: a missing file, unknown keys, or sizes that do not fit the target.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError("model.draft", str(path), "does not exist", "give a JSON file such as configs/drafts/eagle3.json")
        try:
            given = json.loads(file.read_text())
        except ValueError as error:
            raise UserError("model.draft", str(path), f"is no JSON ({error})", "correct the file") from error
        given = {_ALIASES.get(name, name): value for name, value in given.items()}
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"model.draft ({file.name})", unknown, "are no fields of a draft", "remove them; docs/configuration.md lists the fields")
        fixed = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
        for name, value in fixed.items():
            if given.get(name, value) != value:
                raise UserError(f"model.draft ({file.name}: {name})", given[name], f"does not fit the target, which has {value}", "leave it out")
        if "aux_layers" in given and tuple(given["aux_layers"]) != tuple(aux_layers):
            raise UserError(
                f"model.draft ({file.name}: aux_layers)", given["aux_layers"], f"differs from model.aux_layers={list(aux_layers)}", "set model.aux_layers alone"
            )
        given.pop("aux_layers", None)
        return cls.from_target(target, aux_layers=aux_layers, **given)

    @classmethod
    def from_export(cls, described: dict[str, Any], *, aux_layers: tuple[int, ...]) -> DraftConfig:
        """The draft that an exported ``config.json`` describes (layer ids may lawfully be absent there, so they are given)."""
        flags = {name: bool(described.get(name, False)) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias")}
        return cls(
            hidden_size=described["hidden_size"],
            intermediate_size=described["intermediate_size"],
            num_heads=described["num_attention_heads"],
            num_kv_heads=described["num_key_value_heads"],
            head_dim=described["head_dim"],
            vocab_size=described["vocab_size"],
            draft_vocab_size=described["draft_vocab_size"],
            target_hidden_size=described["target_hidden_size"],
            aux_layers=tuple(described.get("eagle_aux_hidden_state_layer_ids", aux_layers)),
            rope_parameters=dict(described["rope_parameters"]),
            max_position_embeddings=described["max_position_embeddings"],
            num_layers=described["num_hidden_layers"],
            rms_norm_eps=described["rms_norm_eps"],
            qk_norm=described["model_type"] == "qwen3",
            **flags,
        )


_ALIASES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "num_hidden_layers": "num_layers"}


def rope_of(config: Any) -> dict[str, Any]:
    """RoPE of a Transformers configuration, in the form of version 5, wherever the version keeps it.

    Raises:
        UserError: when no base is found (a default would train every draft wrongly without a word), or layers of the target differ in theirs without a
            global one.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if parameters and "rope_theta" not in parameters and all(isinstance(value, dict) for value in parameters.values()):
        # one entry a layer type (Gemma-3): the draft attends to everything, as full-attention layers do
        parameters = dict(parameters.get("full_attention") or next(iter(parameters.values())))
    if not parameters:
        parameters = dict(getattr(config, "rope_scaling", None) or {})
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(config, "rope_theta", None)
    if parameters["rope_theta"] is None:
        raise UserError(
            "data.target.path", getattr(config, "_name_or_path", ""), "has a configuration without a RoPE base", "give rope_parameters in model.draft"
        )
    parameters["rope_type"] = parameters.pop("type", None) or parameters.get("rope_type") or "default"
    parameters["rope_theta"] = float(parameters["rope_theta"])
    return parameters
