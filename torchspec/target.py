"""The frozen target LLM: where it is, and the facts that everything else reads from it.

Configured once (``data.target``) and linked to the model. Sizes, layer count, RoPE and norms are read from the target's
own configuration, never typed by the user. Weights are not touched here: ``models/target_head.py`` reads single tensors.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchspec.custom_code import MODEL_KEYS, load_config, needs_custom_model, reason_of
from torchspec.errors import UserError
from torchspec.fingerprint import of_directory, of_hub_cache
from torchspec.paths import home
from torchspec.proxies import through_to_hub
from torchspec.stored import StoredTensors
from torchspec.tokenizer import Loaded, Served, described_tokenizer, file_names, load_tokenizer, own_class
from torchspec.transfer.spec import RecordSpec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class TargetConfig:
    """Which model is the target."""

    path: str
    """Hub id (``org/name``) or local directory of the target, in Transformers' format."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; ignored for a local directory."""
    dtype: Dtype = "auto"
    """Type the engine runs the target in and stores its states as: auto (the checkpoint's own), bfloat16, float16 or float32."""
    trust_remote_code: bool = False
    """Allow code that ships with the checkpoint to run. Used for a configuration or model that Transformers does not have itself, and for the tokenizer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", home(self.path))


class Target:
    """Facts about the target, read once.

    Args:
        config: where it is.

    Raises:
        UserError: when the path holds no readable configuration, or the model is no causal LM with a hidden size.
    """

    def __init__(self, config: TargetConfig) -> None:
        self.config = config

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The text part of the Transformers configuration."""
        return self.full_hf_config.get_text_config()

    @cached_property
    def full_hf_config(self) -> PretrainedConfig:
        """The whole Transformers configuration (a multimodal one has parts)."""
        path = Path(self.config.path)
        if path.exists() and not (path / "config.json").is_file():
            raise UserError("data.target.path", self.config.path, "holds no config.json", "give a model directory in Transformers' format or a hub id")
        if not path.exists() and (path.is_absolute() or self.config.path.startswith(".") or len(path.parts) > 2):
            raise UserError("data.target.path", self.config.path, "does not exist, and is no hub id either", f"check the path, as seen from {Path.cwd()}")
        try:
            loaded = load_config(self.config)
        except UserError:
            raise
        except Exception as error:  # what a strict configuration class raises is no OSError or ValueError
            raise UserError(
                "data.target.path",
                self.config.path,
                f"cannot be read, as a folder or from the hub{through_to_hub()} ({reason_of(error)})",
                "check the path or id, the network, and config.json",
            ) from error
        if getattr(loaded.get_text_config(), "hidden_size", None) is None:
            raise UserError("data.target.path", self.config.path, f"is a {loaded.model_type} without hidden_size", "give a causal language model")
        return loaded

    @property
    def takes_images(self) -> bool:
        """Whether it is a vision-language model."""
        return getattr(self.full_hf_config, "vision_config", None) is not None

    @cached_property
    def custom_model(self) -> bool:
        """Whether its model class is the checkpoint's own code."""
        return needs_custom_model(self.full_hf_config.to_dict())

    @property
    def model_files(self) -> dict[str, Any]:
        """Arguments of any ``from_pretrained`` of the model, beside the path: which revision, configuration and code."""
        return {"revision": self.config.revision, "config": deepcopy(self.full_hf_config), "trust_remote_code": self.custom_model}

    @cached_property
    def stored(self) -> StoredTensors:
        """Its safetensors."""
        return StoredTensors(self.config, explicit=getattr(self.full_hf_config, "transformers_weights", None), quantization=_plain(self._quantization()))

    def _quantization(self) -> Any:
        """``quantization_config``, which Kimi keeps in the text part."""
        return getattr(self.full_hf_config, "quantization_config", None) or getattr(self.hf_config, "quantization_config", None)

    def auto_class(self) -> Any:
        """Transformers' auto class that loads it: of causal models, or of those for images and text where the first does not know it."""
        import transformers as t

        if self.custom_model:
            return getattr(t, next(key for key in MODEL_KEYS if key in self.full_hf_config.auto_map))
        kind = type(self.full_hf_config)
        vision_alone = kind in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in t.MODEL_FOR_CAUSAL_LM_MAPPING
        return t.AutoModelForImageTextToText if vision_alone else t.AutoModelForCausalLM

    @property
    def hidden_size(self) -> int:
        """D, width of the residual stream."""
        return int(self.hf_config.hidden_size)

    @property
    def num_layers(self) -> int:
        """L, number of blocks."""
        return int(self.hf_config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """V, rows of the output head (padding rows included)."""
        return int(self.hf_config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the running target and of the stored states.

        Raises:
            UserError: the checkpoint's own is none that states are stored in.
        """
        import torch

        name: str = self.config.dtype
        if name == "auto":
            stored = getattr(self.hf_config, "dtype", None) or getattr(self.full_hf_config, "dtype", None)
            name = str(stored).removeprefix("torch.") if stored is not None else self._stored_type()
        allowed = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        if name not in allowed:
            raise UserError("data.target.dtype", self.config.dtype, f"is {name} here, which states are not stored in", f"set {', '.join(allowed)}")
        return allowed[name]

    def _stored_type(self) -> str:
        """What the files say where the configuration says nothing, as Transformers has it."""
        try:
            return self.stored.common_type() or "bfloat16"
        except UserError:  # no safetensors: who reads weights says so
            return "bfloat16"

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the target's weights or configuration do, on every machine the same.

        A local directory: a hash of its configuration and of samples of its weights (see :mod:`torchspec.fingerprint` for what it sees). A hub id, or a
        snapshot in the hub's cache: the id and the resolved commit.

        Raises:
            UserError: the directory holds no configuration.
        """
        path = Path(self.config.path)
        if not path.is_dir():
            commit = getattr(self.full_hf_config, "_commit_hash", None)
            return f"{self.config.path}@{commit or self.config.revision or 'main'}"
        try:
            return of_hub_cache(path) or of_directory(path)
        except (OSError, ValueError) as error:
            raise UserError("data.target.path", self.config.path, f"cannot be read ({error})", "give a model directory in Transformers' format") from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer.

        Raises:
            UserError: when the target is none that can be read, or ships none that loads.
        """
        return self._loaded_tokenizer.tokenizer

    @property
    def served(self) -> Served | None:
        """What the tokenizer must agree with on the data, since a server takes another one; None where it is the same.

        Raises:
            UserError: see :meth:`tokenizer`.
        """
        return self._loaded_tokenizer.served

    @property
    def custom_tokenizer(self) -> bool:
        """Whether it ships tokenizer code, which a server runs."""
        return own_class(described_tokenizer(self.config, file_names(self.config))) is not None

    @cached_property
    def _loaded_tokenizer(self) -> Loaded:
        return load_tokenizer(self.config, self.full_hf_config)  # a target that is not there has no tokenizer either, but other words for it

    def end_ids(self) -> list[int]:
        """Ids that end what the target generates: by its generation config, its configuration and its tokenizer."""
        from transformers import GenerationConfig

        try:
            generation = GenerationConfig.from_pretrained(self.config.path, revision=self.config.revision or "main").eos_token_id
        except (OSError, ValueError):  # it ships none
            generation = None
        try:
            end = getattr(self.tokenizer(), "eos_token_id", None)
        except UserError:  # rows may come tokenised
            end = None
        found: set[int] = set()
        for given in (generation, self.hf_config.eos_token_id, end):
            found.update([given] if isinstance(given, int) else given or [])
        return sorted(i for i in found if 0 <= i < self.vocab_size)

    def aux_layers(self, chosen: list[int]) -> tuple[int, ...]:
        """Hidden-state indices fed to the draft (index i = residual stream after i blocks; L = before the final norm), checked.

        Args:
            chosen: a family's default is its own (``Family.aux_layers``). None of them: records hold the last hidden state alone.

        Raises:
            UserError: when ids are not strictly increasing inside [0, L].
        """
        layers = self.num_layers
        if any(not 0 <= i <= layers for i in chosen):
            raise UserError("model.aux_layers", chosen, f"must lie in 0..{layers}", "use Transformers' hidden_states indices")
        if any(b <= a for a, b in pairwise(chosen)):
            raise UserError("model.aux_layers", chosen, "is not strictly increasing", "sort the indices and drop repeats")
        return tuple(chosen)

    def record_spec(self, aux_layers: tuple[int, ...], *, tokenizer: str) -> RecordSpec:
        """What a record of this target's states says of itself.

        Args:
            aux_layers: hidden-state indices fed to the draft.
            tokenizer: fingerprint of tokenizer and chat template, or "".
        """
        return RecordSpec(
            target=self.fingerprint,
            tokenizer=tokenizer,
            aux_layers=aux_layers,
            hidden_size=self.hidden_size,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for logs and manifests."""
        return {
            "path": self.config.path,
            "fingerprint": self.fingerprint,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "vocab_size": self.vocab_size,
        }


def _plain(quantization: Any) -> dict[str, Any]:
    return dict(quantization.to_dict() if hasattr(quantization, "to_dict") else quantization or {})
