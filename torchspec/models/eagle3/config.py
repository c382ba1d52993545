"""Architecture of an EAGLE-3 draft, as plain numbers.

Derived from the target's configuration, or read from a JSON file that a user writes; what the two must agree on (hidden size of the target, vocabulary) is
checked by name. Options and their meaning: EAGLE-3 (arXiv 2503.01840), EAGLE-3.1 (2605.09992: ``fc_norm`` and ``norm_output``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torchspec.errors import UserError
from torchspec.models.draft_defaults import default_rope, default_width, whole
from torchspec.models.ops.latent_projections import LatentSizes
from torchspec.models.ops.rope_parameters import check_rope
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
    mla: LatentSizes | None = None
    """Latent attention (DeepSeek) of these sizes instead of the ordinary one; ``head_dim`` is then nope + rope, and every head has a key of its own."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"draft.{name}", value, "is no size", "use 1 or more")
        if self.norm_before_fc and self.fc_norm:
            raise UserError("draft.fc_norm", True, "excludes norm_before_fc", "set one of them")
        if self.num_heads % self.num_kv_heads:
            raise UserError("draft.num_key_value_heads", self.num_kv_heads, f"does not divide the {self.num_heads} heads", "use a divisor")
        if not self.qk_norm and self.hidden_size % self.num_heads:
            problem = f"does not divide the hidden size {self.hidden_size}, as the configuration class that servers read asks for"
            raise UserError("draft.num_attention_heads", self.num_heads, problem, "use a divisor (head_dim may be any even size), or qk_norm")
        if self.rotary_dim % 2:
            raise UserError("draft.head_dim", self.rotary_dim, "is odd", "RoPE needs an even one")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UserError("draft.draft_vocab_size", self.draft_vocab_size, f"is not in 1..{self.vocab_size}", "use at most the target's vocabulary")
        check_rope(self.rope_parameters, latent=self.mla is not None)
        if self.mla is not None:
            self._check_latent(self.mla)
        if self.qk_norm and self.attention_bias:
            raise UserError("draft.attention_bias", True, "is not served with qk_norm: vLLM's Qwen3 draft has no bias on o_proj", "drop one of them")

    def _check_latent(self, mla: LatentSizes) -> None:
        fixed = {"head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim, "num_kv_heads": self.num_heads}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise UserError(f"draft.{name}", getattr(self, name), f"does not fit latent attention, which makes it {value}", "leave it out")
        for name in ("attention_bias", "qk_norm", "norm_before_fc"):
            if getattr(self, name):
                raise UserError(f"draft.{name}", True, "is not served with latent attention", "leave it out, or set mla to null")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

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
        mla = plain.get("mla")
        return cls(**{**plain, "aux_layers": tuple(plain["aux_layers"]), "mla": None if mla is None else LatentSizes(**mla)})

    @classmethod
    def from_target(cls, target: Target, *, aux_layers: tuple[int, ...], **changes: Any) -> DraftConfig:
        """One layer of the target's own sizes, norms, RoPE and kind of attention.

        Args:
            target: the frozen model.
            aux_layers: from ``Target.aux_layers``.
            changes: fields to set otherwise.
        """
        config = whole(target.hf_config)
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        if not changes.get("qk_norm"):  # a target such as GLM-4.5 has 96 heads of a hidden size that 96 does not divide
            heads = _dividing(heads, of=int(changes.get("hidden_size", target.hidden_size)), by=kv_heads)
        described: dict[str, Any] = {
            "hidden_size": target.hidden_size,
            "intermediate_size": default_width(config, hidden_size=target.hidden_size)[0],
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": int(getattr(config, "head_dim", None) or target.hidden_size // int(config.num_attention_heads)),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": target.vocab_size,
            "target_hidden_size": target.hidden_size,
            "aux_layers": tuple(aux_layers),
            "rope_parameters": changes["rope_parameters"] if "rope_parameters" in changes else default_rope(config)[0],
            "max_position_embeddings": _positions(config),
            "rms_norm_eps": float(getattr(config, "rms_norm_eps", None) or 1e-6),
        }
        mla = changes.get("mla", LatentSizes.of(config))
        if mla is not None:
            heads = int(changes.get("num_heads", heads))
            described |= {"mla": mla, "num_kv_heads": heads, "head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim}
        return cls(**{**described, **changes})

    @classmethod
    def from_fields(cls, given: Mapping[str, Any], *, target: Target, aux_layers: tuple[int, ...], where: str) -> DraftConfig:
        """A user's architecture: fields of this class, the ones left out taken from the target.

        Transformers' own names for heads and layers (``num_attention_heads``, ``num_key_value_heads``, ``num_hidden_layers``) are understood too.

        Raises:
            UserError: unknown keys, or sizes that do not fit the target.
        """
        named = {_ALIASES.get(name, name): value for name, value in given.items()}
        unknown = sorted(named.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(where, unknown, "are no fields of a draft", "remove them; docs/configuration.md lists the fields")
        fixed = {"vocab_size": target.vocab_size, "target_hidden_size": target.hidden_size}
        for name, value in fixed.items():
            if named.get(name, value) != value:
                raise UserError(_inside(where, name), named[name], f"does not fit the target, which has {value}", "leave it out")
        if tuple(named.pop("aux_layers", aux_layers)) != tuple(aux_layers):
            problem = f"differs from model.aux_layers={list(aux_layers)}"
            raise UserError(_inside(where, "aux_layers"), given["aux_layers"], problem, "set model.aux_layers alone")
        if isinstance(named.get("mla"), dict):
            wrong = sorted(named["mla"].keys() ^ {f.name for f in fields(LatentSizes)})
            if wrong:
                raise UserError(_inside(where, "mla"), wrong, "are missing or unknown", "docs/configuration.md lists the five sizes")
            named["mla"] = LatentSizes(**named["mla"])
        return cls.from_target(target, aux_layers=aux_layers, **named)


def default_layers(target: Target) -> tuple[int, ...]:
    """Aux layers [2, L//2, L-3], those of the paper as vLLM serves them.

    Raises:
        UserError: the target has fewer than seven layers.
    """
    layers = target.num_layers
    if layers < 7:
        raise UserError("model.aux_layers", None, f"has no default for a target of {layers} layers", "list the indices, for example [1, 2]")
    return (2, layers // 2, layers - 3)


def _inside(where: str, name: str) -> str:
    """``model.draft (FILE: NAME)``."""
    return f"{where[:-1]}: {name})"


_ALIASES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "num_hidden_layers": "num_layers"}


def _positions(config: Any) -> int:
    """Longest text of the target by any name; without one (ALiBi, recurrence) what drafts are served with at most."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    return next((int(value) for name in names if (value := getattr(config, name, None))), 131072)


def _dividing(heads: int, *, of: int, by: int) -> int:
    """The largest number of heads, at most ``heads``, that divides the hidden size and that the key heads divide; ``heads`` where there is none."""
    return next((h for h in range(heads, 0, -1) if of % h == 0 and h % by == 0), heads)
