"""Whose classes run a target: Transformers' own wherever it has them, the checkpoint's for what has none.

Checkpoints ship code (``auto_map`` of config.json) that was written for the Transformers of their day; it often does not import under a later one,
which by then has the classes itself. So configuration and model are decided here, and the tokenizer apart from them (``tokenizer.py``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torchspec.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from torchspec.target import TargetConfig

MODEL_KEYS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Keys of ``auto_map`` under which a checkpoint names model classes of its own."""
_SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Model types that Transformers does not list, and the one whose configuration and model they are (vLLM's registry says so too)."""


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def needs_custom_model(described: dict[str, Any]) -> bool:
    """Whether only the checkpoint's own code has its model class.

    That is so where Transformers has no model of this type, and where the checkpoint names a class that Transformers does not have: another model
    under a known type, which Transformers' class would compute wrongly.

    Args:
        described: config.json.
    """
    from transformers.models.auto import modeling_auto as auto

    ships = described.get("auto_map") or {}
    if not any(key in ships for key in MODEL_KEYS):
        return False
    kind = _SAME_AS.get(str(described.get("model_type")), described.get("model_type"))
    native = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    named = next(iter(described.get("architectures") or []), None)
    return kind not in native or (named is not None and _family(named) not in {_family(name) for name in native.values() if isinstance(name, str)})


def _family(class_name: str) -> str:
    """What a model class is called apart from its task and its spelling (KimiK25ForCausalLM, Kimi_K25ForConditionalGeneration: kimik25)."""
    return re.sub(r"[^a-z0-9]", "", re.split(r"For[A-Z]|LMHead|Model$", class_name)[0].lower())


def load_config(config: TargetConfig) -> PretrainedConfig:
    """The Transformers configuration of a target.

    Args:
        config: where it is, and whether its code may run.

    Raises:
        UserError: it needs its own code, which may not run, or does not run with this Transformers.
        OSError, ValueError: nothing is there, or nothing that Transformers understands.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, __version__

    described, _ = PretrainedConfig.get_config_dict(config.path, revision=config.revision)
    kind, custom = described.get("model_type"), needs_custom_model(described)
    ships_config = "AutoConfig" in (described.get("auto_map") or {})
    if (custom and not config.trust_remote_code) or (ships_config and kind not in CONFIG_MAPPING and kind not in _SAME_AS and not config.trust_remote_code):
        model = (described.get("architectures") or ["a model"])[0]
        problem = f"is {model} of type {kind}, which Transformers {__version__} does not have: it ships the code"
        raise UserError("data.target.path", config.path, problem, "read that code, and set trust_remote_code to true")
    if not custom and kind in _SAME_AS:
        return CONFIG_MAPPING[_SAME_AS[kind]].from_dict(described, name_or_path=config.path)
    own = ships_config and (custom or kind not in CONFIG_MAPPING)
    try:
        return AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=own)
    except Exception as error:
        if own:
            raise does_not_run(config.path, "configuration", error) from error
        raise


def does_not_run(path: str, what: str, error: Exception) -> UserError:
    """The error for a checkpoint whose own code fails.

    Args:
        path: of the target.
        what: configuration, model or tokenizer.
        error: what it raised.
    """
    from transformers import __version__

    problem = f"ships code of its own for its {what} that does not run with Transformers {__version__} ({reason_of(error)})"
    return UserError("data.target.path", path, problem, "mend that code, or take a copy of the target whose classes this Transformers has")
