"""Tokenizers of Mistral's models: ``tokenizer.json`` where there is one, else a fast one made from ``tekken.json``, both held against mistral-common.

vLLM takes mistral-common, for ids and for the chat format, where a target has Mistral's own weight files (``consolidated*.safetensors``) beside its own
tokenizer (``tekken.json``, ``tokenizer.model.v*``); of all others it asks Transformers, with ``mistral_format=False``, which gives mistral-common where
``tokenizer_config.json`` names its class. Some published ``tokenizer.json`` cut
words otherwise than the models were trained with (Transformers' ``fix_mistral_regex``); mistral-common's ids show it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from torchspec.custom_code import reason_of
from torchspec.errors import UserError
from torchspec.tokenizer import Loaded, Served, agreeing, automatic, described_tokenizer, folder_of, remade

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from torchspec.target import TargetConfig

log = logging.getLogger(__name__)


def is_mistral(names: frozenset[str]) -> bool:
    """Whether a target has a tokenizer of Mistral's own format."""
    return "tekken.json" in names or served_by_mistral_common(names)


def served_by_mistral_common(names: frozenset[str]) -> bool:
    """Whether vLLM takes mistral-common for a target with these files (``tokenizers/registry.py`` of vLLM 0.32)."""
    return any(fnmatch(name, "consolidated*.safetensors") for name in names) and own_file(names) is not None


def own_file(names: frozenset[str]) -> str | None:
    """The file of Mistral's own tokenizer format, the newest where there are several."""
    if "tekken.json" in names:
        return "tekken.json"
    return max((name for name in names if fnmatch(name, "tokenizer.model.v*")), default=None)


def load_mistral(config: TargetConfig, hf_config: PretrainedConfig, names: frozenset[str]) -> Loaded:
    """The tokenizer of a target that has Mistral's own file.

    Args:
        config, hf_config: of the target.
        names: its files.

    Raises:
        UserError: there is no way to load one; mistral-common is needed for it and is not installed.
    """
    folder = folder_of(config)
    name = own_file(names)
    assert name is not None
    file = folder / name
    common = _common(file)
    named = described_tokenizer(config, names).get("tokenizer_class") == "MistralCommonBackend"
    by_common = named or served_by_mistral_common(names)
    ways: list[Callable[[], Any]] = []
    if "tokenizer.json" in names:
        ways.append(lambda: _of_file(config, hf_config, names))
        if by_common:
            ways.append(lambda: _of_file(config, hf_config, names, fix_mistral_regex=True))
    if name == "tekken.json" and (by_common or "tokenizer.json" not in names):
        ways.append(lambda: _converted(config, file))
    if not ways:
        ways.append(lambda: automatic(config, hf_config))
    if common is None:
        problem = f"has Mistral's own tokenizer ({name}), and mistral-common, which reads it, is not installed"
        if by_common:
            raise UserError("data.target.path", config.path, problem, "pip install mistral-common")
        return Loaded(agreeing(ways, None, path=config.path))
    if by_common:
        why = "let tokenizer_class in tokenizer_config.json be TokenizersBackend" if named else "move consolidated*.safetensors away"
        fix = f"give rows with input_ids and loss_mask (main.py regenerate with --engine server writes them), or {why}"
        served = Served("mistral-common, which vLLM takes for this target", fix, encode=_encode(common), prompt=_prompt(common))
    else:
        fix = 'set "fix_mistral_regex": true in tokenizer_config.json, for training and serving alike, or add the right tokenizer.json'
        served = Served(f"mistral-common by its {name}", fix, encode=_encode(common))
    tokenizer = agreeing(ways, served, path=config.path)
    if not tokenizer.chat_template or by_common:
        tokenizer.chat_template = _template(file) or tokenizer.chat_template
    return Loaded(tokenizer, served)


def _of_file(config: TargetConfig, hf_config: PretrainedConfig, names: frozenset[str], **more: Any) -> Any:
    """The tokenizer of tokenizer.json, also where tokenizer_config.json names mistral-common's class, which AutoTokenizer then takes instead."""
    tokenizer = automatic(config, hf_config, **more)
    if getattr(tokenizer, "is_fast", False):
        return tokenizer
    from tokenizers import Tokenizer

    return remade(config, Tokenizer.from_file(str(folder_of(config) / "tokenizer.json")), described_tokenizer(config, names))


def _common(file: Path) -> Any | None:
    """mistral-common's tokenizer of a file; None where that package is not installed."""
    try:
        from transformers.tokenization_mistral_common import MistralCommonBackend

        return MistralCommonBackend(file)
    except ImportError:
        return None


def _converted(config: TargetConfig, file: Path) -> Any:
    """A fast tokenizer made from tekken.json."""
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    tokenizer = convert_tekken_tokenizer(str(file))
    tokenizer.name_or_path = config.path
    return tokenizer


def _template(file: Path) -> str | None:
    """The chat template that renders as mistral-common does; None where it can make none."""
    try:
        from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

        return str(convert_tokenizer_to_chat_template(file))
    except Exception as error:  # versions that it does not know
        log.warning("mistral-common makes no chat template of %s (%s)", file.name, reason_of(error))
        return None


def _encode(common: Any) -> Callable[[str], list[int]] | None:
    """Ids of a text by mistral-common, which itself never reads control tokens in text; None for SentencePiece, whose pieces begin with a space."""
    inner = common.tokenizer.instruct_tokenizer.tokenizer
    if not hasattr(inner, "_special_tokens_reverse_vocab"):
        return None
    special: dict[str, int] = dict(inner._special_tokens_reverse_vocab)
    control = re.compile("(" + "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) + ")")

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for piece in filter(None, control.split(text)):
            ids += [special[piece]] if piece in special else inner.encode(piece, bos=False, eos=False)
        return ids

    return encode


def _prompt(common: Any) -> Callable[[Sequence[Any], list[Any] | None], list[int] | None]:
    """Ids of messages by mistral-common, as vLLM's chat endpoint asks for them."""

    def prompt(messages: Sequence[Any], tools: list[Any] | None) -> list[int] | None:
        try:
            return list(common.apply_chat_template([dict(message) for message in messages], tools=tools, tokenize=True, return_dict=False))
        except Exception:  # messages that it refuses, such as call ids of another length: the server would as well
            return None

    return prompt
