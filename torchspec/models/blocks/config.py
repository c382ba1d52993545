"""Architecture of a block draft as numbers: one backbone (Qwen3's shape over the target's states), and what DSpark and DFlash 2 add to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from torchspec.errors import UserError
from torchspec.models.blocks.mask_token import Mask, default_mask
from torchspec.models.draft_defaults import default_rope, default_width, whole
from torchspec.models.ops.rope_parameters import check_rope
from torchspec.target import Target

Kind = Literal["dflash", "dspark", "dflash2"]
KINDS: tuple[Kind, ...] = ("dflash", "dspark", "dflash2")
_ALIASES = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "num_hidden_layers": "num_layers"}
_OF_KIND = {
    "markov_rank": "dspark", "confidence": "dspark",
    "conv_taps": "dflash2", "conv_group": "dflash2", "selector_rank": "dflash2", "selector_candidates": "dflash2",
}  # fmt: skip
"""Fields that one kind alone has."""


@dataclass(frozen=True)
class BlockConfig:
    """Everything that fixes the shapes and the arithmetic of a block draft."""

    kind: Kind
    hidden_size: int
    """H, the target's: the draft uses the target's embedding and head."""
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """V, the target's."""
    draft_vocab_size: int
    """W; equal to V where the vocabulary is not pruned."""
    aux_layers: tuple[int, ...]
    """Hidden-state indices in Transformers' counting, strictly increasing."""
    rope_parameters: dict[str, Any]
    """RoPE in Transformers 5's form: ``rope_type``, ``rope_theta`` and the kind's own fields."""
    max_position_embeddings: int
    mask_token_id: int
    """M, the token in every slot but the first."""
    learned_mask: bool = False
    """Its embedding is a row of the draft's own (``mask_embedding``) rather than the target's."""
    block_size: int = 16
    """S, slots of a block: the anchor and S - 1 masks."""
    num_layers: int = 5
    causal: bool = False
    """A slot sees the slots before it and itself; otherwise all slots of its block."""
    sliding_window: int | None = None
    """Positions that a slot sees, itself among them; None for the whole conversation."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    logit_scale: float = 1.0
    """What the target multiplies its logits by."""
    markov_rank: int = 256
    confidence: bool = True
    """DSpark: has a confidence head."""
    conv_taps: int = 2
    conv_group: int = 16
    selector_rank: int = 256
    selector_candidates: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError("draft.kind", self.kind, f"is not one of {', '.join(KINDS)}", "choose one of these")
        backbone = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings")
        for name in (*backbone, "markov_rank", "conv_taps", "conv_group", "selector_rank", "selector_candidates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"draft.{name}", value, "is no size", "use 1 or more")
        if not isinstance(self.block_size, int) or self.horizon < 1:
            raise UserError("draft.block_size", self.block_size, "drafts no token", f"use {1 + self.shift} or more")
        if self.num_heads % self.num_kv_heads:
            raise UserError("draft.num_key_value_heads", self.num_kv_heads, f"does not divide the {self.num_heads} heads", "use a divisor")
        if self.head_dim % 2:
            raise UserError("draft.head_dim", self.head_dim, "is odd", "RoPE needs an even one")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UserError("draft.draft_vocab_size", self.draft_vocab_size, f"is not in 1..{self.vocab_size}", "use at most the target's vocabulary")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError("draft.mask_token_id", self.mask_token_id, f"is not in 0..{self.vocab_size - 1}", "give a token that no text holds")
        if self.sliding_window is not None and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            raise UserError("draft.sliding_window", self.sliding_window, "is no number of positions", "use 1 or more, or null")
        check_rope(self.rope_parameters, latent=False)
        if self.kind == "dspark" and self.learned_mask:
            problem = "is not served with DSpark: vLLM takes the mask's embedding from the target's table"
            raise UserError("draft.learned_mask", True, problem, "set mask_token_id to a token that no text holds, and leave learned_mask out")
        if self.kind == "dflash2":
            self._check_dflash2()

    def _check_dflash2(self) -> None:
        if self.draft_vocab_size != self.vocab_size:
            problem = f"prunes the target's {self.vocab_size}: DFlash 2 is served with the whole vocabulary"
            raise UserError("draft.draft_vocab_size", self.draft_vocab_size, problem, "leave the vocabulary whole (no PruneVocabulary)")
        if self.hidden_size % self.conv_group:
            raise UserError("draft.conv_group", self.conv_group, f"does not divide the hidden size {self.hidden_size}", "use a divisor")
        if self.selector_candidates > self.vocab_size:
            raise UserError("draft.selector_candidates", self.selector_candidates, "is above the vocabulary", f"use at most {self.vocab_size}")

    @property
    def shift(self) -> int:
        """Slots at the front that predict nothing."""
        return 0 if self.kind == "dspark" else 1

    @property
    def horizon(self) -> int:
        """K, draft tokens of a block."""
        return self.block_size - self.shift

    @property
    def target_hidden_size(self) -> int:
        """D."""
        return self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return self.head_dim

    @property
    def qk_norm(self) -> bool:
        """Queries and keys have norms of their own (Qwen3's shape)."""
        return True

    def with_draft_vocabulary(self, size: int) -> BlockConfig:
        """The same draft with a head of ``size`` rows."""
        return replace(self, draft_vocab_size=size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "aux_layers": list(self.aux_layers)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> BlockConfig:
        """Back from :meth:`to_dict`."""
        return cls(**{**plain, "aux_layers": tuple(plain["aux_layers"])})

    @classmethod
    def from_target(cls, target: Target, *, kind: Kind, aux_layers: tuple[int, ...], logit_scale: float = 1.0, **changes: Any) -> BlockConfig:
        """Layers of the target's own sizes and RoPE.

        Args:
            target: the frozen model.
            kind: which draft.
            aux_layers: hidden-state indices fed to it.
            logit_scale: of the target's head.
            changes: fields to set otherwise.

        Raises:
            UserError: the target has no row for the mask, and DSpark cannot ship one.
        """
        config = whole(target.hf_config)
        heads = int(config.num_attention_heads)
        mask = Mask(changes["mask_token_id"], False) if "mask_token_id" in changes else default_mask(target, learn=kind != "dspark")
        described: dict[str, Any] = {
            "kind": kind,
            "hidden_size": target.hidden_size,
            "intermediate_size": default_width(config, hidden_size=target.hidden_size)[0],
            "num_heads": heads,
            "num_kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or target.hidden_size // heads),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": target.vocab_size,
            "aux_layers": tuple(aux_layers),
            "rope_parameters": changes["rope_parameters"] if "rope_parameters" in changes else default_rope(config)[0],
            "max_position_embeddings": int(getattr(config, "max_position_embeddings", None) or 131072),
            "rms_norm_eps": float(getattr(config, "rms_norm_eps", None) or 1e-6),
            "mask_token_id": mask.token,
            "learned_mask": mask.learned,
            "block_size": 7 if kind == "dspark" else 16,
            "logit_scale": logit_scale,
        }
        return cls(**{**described, **changes})

    @classmethod
    def from_fields(
        cls, given: Mapping[str, Any], *, target: Target, kind: Kind, aux_layers: tuple[int, ...], where: str, logit_scale: float = 1.0
    ) -> BlockConfig:
        """A user's architecture: fields of this class, the ones left out taken from the target.

        Transformers' own names for heads and layers (``num_attention_heads``, ``num_key_value_heads``, ``num_hidden_layers``) are understood too.

        Raises:
            UserError: unknown keys, keys of another kind, or sizes that do not fit the target.
        """
        named = {_ALIASES.get(name, name): value for name, value in given.items()}
        if tuple(named.pop("aux_layers", aux_layers)) != tuple(aux_layers):
            problem = f"differs from model.aux_layers={list(aux_layers)}"
            raise UserError(f"{where[:-1]}: aux_layers)", given["aux_layers"], problem, "set model.aux_layers alone")
        known = {f.name for f in fields(cls)} - {"kind", "logit_scale", "draft_vocab_size"}
        if unknown := sorted(named.keys() - known):
            raise UserError(where, unknown, f"are no fields of a {kind} draft", "remove them; docs/configuration.md lists the fields")
        if foreign := sorted(name for name in named if _OF_KIND.get(name, kind) != kind):
            raise UserError(where, foreign, f"are no fields of a {kind} draft", "remove them")
        for name, value in {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}.items():
            if named.get(name, value) != value:
                raise UserError(f"{where[:-1]}: {name})", named[name], f"does not fit the target, which has {value}", "leave it out")
        return cls.from_target(target, kind=kind, aux_layers=aux_layers, logit_scale=logit_scale, **named)
