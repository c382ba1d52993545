"""The target's tokenizer: a fast one, which knows where in a text its tokens are, with the ids that a server would send.

Which class a server takes is not always the one that is loaded first here: checkpoints ship slow tokenizers as code (Kimi), files of two libraries side by
side (Mistral), or a ``tokenizer.json`` that the class named beside it does not follow. So what is loaded comes with what it must agree with
(:class:`Served`): vLLM's choice for these files. A few probes choose between several ways to load; the data's own texts are compared before training
(``data/served.py``).

Transformers' ``AutoTokenizer`` with ``mistral_format=False`` is what vLLM asks, except where it takes mistral-common (``mistral_tokenizer.py``).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

from torchspec.custom_code import does_not_run, reason_of
from torchspec.errors import UserError
from torchspec.files import FETCH, is_pointer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from torchspec.target import TargetConfig

log = logging.getLogger(__name__)
PATTERNS = ("*.json", "*.jinja", "*.py", "*.model", "*.model.v*", "*.tiktoken", "*.txt", "additional_chat_templates/*")
"""Files of a hub repository that a tokenizer may be made of."""
_LARGE = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")
"""Files of a tokenizer that repositories keep in Git LFS."""
PROBES = (
    "It's what they'll say: we've 1234567 THINGS, don't we? it's that's you're",
    "Hello  world,\n\n   x = {'a': [1, 2.50]};\t// HTTPServer camelCase\r\n",
    "naïve café Ångström Привет мир ñandú 你好世界，2024年5月 こんにちは 안녕하세요 مرحبا",
    "🙂👩‍👩‍👧 ½ ﬁ e\u0301 …—“quoted” https://a.b/c?d=e&f=%20g  \n \n",
)
"""Texts by which one of several ways to load is chosen."""


@dataclass(frozen=True)
class Served:
    """What a server makes of text, where that is not the loaded tokenizer itself."""

    name: str
    """How to call it in an error."""
    fix: str
    """What to do where the loaded one differs."""
    encode: Callable[[str], list[int]] | None = None
    """Ids of a text, control tokens in it taken as such."""
    prompt: Callable[[Sequence[Any], list[Any] | None], list[int] | None] | None = None
    """Ids of messages with the generation prompt; None where the server takes no such messages."""


@dataclass(frozen=True)
class Loaded:
    """A tokenizer, and what it must agree with on the data."""

    tokenizer: PreTrainedTokenizerBase
    served: Served | None = None


def load_tokenizer(config: TargetConfig, hf_config: PretrainedConfig) -> Loaded:
    """The target's tokenizer.

    Args:
        config: where the target is, and whether its code may run.
        hf_config: its configuration, already read.

    Raises:
        UserError: there is none that loads.
    """
    from torchspec.mistral_tokenizer import is_mistral, load_mistral
    from torchspec.tiktoken_files import is_known

    names = file_names(config)
    try:
        described = described_tokenizer(config, names)
        if is_mistral(names):
            found = load_mistral(config, hf_config, names)
        elif (reference := own_class(described)) is not None or is_known(folder_of(config)):
            found = _of_own_code(config, hf_config, names, described, reference)
        else:
            found = _of_transformers(config, hf_config, names)
    except UserError:
        raise
    except Exception as error:  # files that are no tokenizer's raise whatever reads them
        for file in sorted(Path(config.path) / name for name in names if name in _LARGE and Path(config.path).is_dir()):
            if is_pointer(file):
                raise UserError("data.target.path", str(file), "is a pointer of Git LFS, not the tokenizer", FETCH) from error
        fix = "add the tokenizer files to the target (tokenizer.json and tokenizer_config.json)"
        raise UserError("data.target.path", config.path, f"has no tokenizer that loads ({reason_of(error)})", fix) from error
    if not found.tokenizer.chat_template and "chat_template.json" in names:  # a processor's; servers fall back to it
        try:
            found.tokenizer.chat_template = json.loads((folder_of(config) / "chat_template.json").read_text())["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            problem = f"has a chat_template.json without a chat template ({reason_of(error)})"
            raise UserError("data.target.path", config.path, problem, "copy that file from the target's publisher anew, or add chat_template.jinja") from error
    return found


def described_tokenizer(config: TargetConfig, names: frozenset[str]) -> dict[str, Any]:
    """The target's tokenizer_config.json; empty where it has none."""
    described: dict[str, Any] = json.loads((folder_of(config) / "tokenizer_config.json").read_text()) if "tokenizer_config.json" in names else {}
    return described


def file_names(config: TargetConfig) -> frozenset[str]:
    """Names of the target's files, in its folder or on the hub; of a hub that cannot be asked, those in the cache."""
    path = Path(config.path)
    if not path.is_dir():
        from huggingface_hub import HfApi

        try:
            return frozenset(HfApi().list_repo_files(config.path, revision=config.revision))
        except Exception:  # offline, or a gate: the cache has what has been seen
            path = folder_of(config)
    return frozenset(str(file.relative_to(path)) for file in path.rglob("*"))


def folder_of(config: TargetConfig) -> Path:
    """A folder with what the target's tokenizer is made of."""
    path = Path(config.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=list(PATTERNS), ignore_patterns=["*.safetensors.index.json"]))


def own_class(described: dict[str, Any]) -> str | None:
    """Reference (``module.Class``) to the tokenizer class that a checkpoint ships; None where it ships none. A fast one before a slow one.

    Args:
        described: tokenizer_config.json.
    """
    given = described.get("auto_map") or {}
    classes = given if isinstance(given, list) else given.get("AutoTokenizer")
    return next((name for name in reversed(classes) if name), None) if isinstance(classes, list) else classes


def automatic(config: TargetConfig, hf_config: PretrainedConfig | None, *, trust: bool = False, **more: Any) -> Any:
    """What Transformers' AutoTokenizer makes of the files, as vLLM asks it.

    Args:
        config, hf_config: of the target.
        trust: run the tokenizer code that ships with it.
        more: further arguments.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.path, revision=config.revision, config=hf_config, trust_remote_code=trust, mistral_format=False, **more)


def remade(config: TargetConfig, backend: Any, described: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A fast tokenizer of another backend, with everything else (special tokens, chat templates) as the target's files have it.

    Args:
        config: of the target.
        backend: ``tokenizers.Tokenizer``.
        described: tokenizer_config.json.
    """
    from transformers import TokenizersBackend

    source = folder_of(config)
    with tempfile.TemporaryDirectory(prefix="torchspec-tokenizer-") as name:
        folder = Path(name)
        backend.save(str(folder / "tokenizer.json"))
        kept = {key: value for key, value in described.items() if key not in ("auto_map", "backend")}
        (folder / "tokenizer_config.json").write_text(json.dumps({**kept, "tokenizer_class": "TokenizersBackend"}))
        for file in ("special_tokens_map.json", "chat_template.jinja"):
            if (source / file).is_file():
                (folder / file).write_bytes((source / file).read_bytes())
        if (source / "additional_chat_templates").is_dir():
            copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
        tokenizer = TokenizersBackend.from_pretrained(folder)
    tokenizer.name_or_path = config.path
    tokenizer.init_kwargs.pop("name_or_path", None)
    return tokenizer


def agreeing(candidates: Iterable[Callable[[], Any]], served: Served | None, *, path: str) -> Any:
    """The first of several ways to load that agrees with what is served on :data:`PROBES`; where none does, the first that loads.

    Raises:
        UserError: none of them loads.
    """
    loaded, problem = [], "nothing to load"
    for candidate in candidates:
        try:
            tokenizer = candidate()
        except Exception as error:  # the next way may do
            problem = reason_of(error)
            continue
        if served is None or served.encode is None or all(ids_of(tokenizer, text) == served.encode(text) for text in PROBES):
            return tokenizer
        loaded.append(tokenizer)
    if not loaded:
        raise UserError("data.target.path", path, f"has no tokenizer that loads ({problem})", "add a tokenizer.json to the target")
    return loaded[0]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is already rendered: nothing is added to it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _of_transformers(config: TargetConfig, hf_config: PretrainedConfig, names: frozenset[str]) -> Loaded:
    """The ordinary case. Classes that make their pipeline themselves, of a vocabulary, need not cut as the tokenizer.json does that it was read from."""
    tokenizer = automatic(config, hf_config)
    if "tokenizer.json" not in names or not tokenizer.is_fast or "__init__" not in type(tokenizer).__dict__ or type(tokenizer).__name__ == "TokenizersBackend":
        return Loaded(tokenizer)
    fix = (
        'let "tokenizer_class" in tokenizer_config.json be "TokenizersBackend", for training and serving alike, if the model was trained with the '
        "tokenizer.json; remove that file if it was not"
    )
    name = type(tokenizer).__name__
    return Loaded(tokenizer, Served(f"its tokenizer.json as it stands (Transformers builds {name} from the vocabulary alone)", fix, encode=_raw(config)))


def _raw(config: TargetConfig) -> Callable[[str], list[int]]:
    """Ids by the target's tokenizer.json itself."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder_of(config) / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def _of_own_code(config: TargetConfig, hf_config: PretrainedConfig, names: frozenset[str], described: dict[str, Any], reference: str | None) -> Loaded:
    """A checkpoint that ships tokenizer code, or a vocabulary in tiktoken's format: what that code gives is what is served."""
    from tokenizers import Tokenizer
    from transformers import TokenizersBackend

    from torchspec.tiktoken_files import fast_of, read_encoding, running_encoding

    slow, failure = None, None
    if reference is not None and config.trust_remote_code:
        try:
            slow = automatic(config, hf_config, trust=True)
        except Exception as error:  # code for another Transformers; its pattern can still be read
            failure = error
            log.warning("the tokenizer code of %s does not run here (%s): its pattern is read instead", config.path, reason_of(error))
        if slow is not None and slow.is_fast:
            return Loaded(slow)
    encoding = running_encoding(slow) if slow is not None else read_encoding(folder_of(config), described, reference)
    ways: list[Callable[[], Any]] = []
    if encoding is not None:
        known = encoding
        ways.append(lambda: remade(config, fast_of(known), described))
    if "tokenizer.json" in names:
        ways.append(lambda: remade(config, Tokenizer.from_file(str(folder_of(config) / "tokenizer.json")), described))
    if not ways:
        ways.append(lambda: TokenizersBackend.from_pretrained(folder_of(config)))
    fix = "add a tokenizer.json with the ids of the tokenizer code that ships with the target, or give rows with input_ids and loss_mask"
    if slow is not None:
        code: Any = slow
        served = Served(f"the target's own {type(slow).__name__}", fix, encode=lambda text: ids_of(code, text))
    elif reference is None:
        fix = "add the tokenizer code of the target's publisher (tokenization_*.py and auto_map), which servers run"
        converted = automatic(config, hf_config)
        served = Served("what Transformers makes of tiktoken.model, and vLLM with it", fix, encode=lambda text: ids_of(converted, text))
    elif encoding is not None:
        served = Served(f"tiktoken with the pattern of {encoding.origin}", fix, encode=encoding.encode)
    elif failure is not None:
        raise does_not_run(config.path, "tokenizer", failure) from failure
    elif "tokenizer.json" in names:
        log.warning("%s ships tokenizer code (%s) that is not run (trust_remote_code: false): its ids are not compared", config.path, reference)
        return Loaded(agreeing(ways, None, path=config.path))
    else:
        problem = f"ships code of its own for its tokenizer ({reference}), and no tokenizer.json"
        raise UserError("data.target.path", config.path, problem, "read that code, and set trust_remote_code to true")
    return Loaded(agreeing(ways, served, path=config.path), served)
